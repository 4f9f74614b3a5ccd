"""LayerNorm and RMSNorm over [rows, cols], plain and behind dropout + residual add.

Bytes: forward reads x and writes y; backward reads x and dy and writes dx. The weight, the
statistics and the weight gradient are a row or a column of that and left out.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import llmkern.functional as LF
from llmkern.bench.cases.kernel import kernel_case
from llmkern.bench.registry import Case, Cost, Maker, Tensors

EPS = 1e-5


def layer_norm(
    rows: int,
    cols: int,
    dtype: torch.dtype,
    *,
    backward: bool = True,
    compile: bool = False,
    tags: frozenset[str] = frozenset(),
) -> Case:
    def make(m: Maker) -> Tensors:
        return {
            "x": m.normal(rows, cols),
            "weight": 1 + m.normal(cols, scale=0.1),
            "bias": m.normal(cols, scale=0.1),
            "dy": m.normal(rows, cols),
        }

    moves = 5 if backward else 2
    return kernel_case(
        "layer_norm",
        {"rows": rows, "cols": cols},
        dtype,
        make=make,
        ours=lambda t: LF.layer_norm(t["x"], (cols,), t["weight"], t["bias"], EPS),
        torch_=lambda t: F.layer_norm(t["x"], (cols,), t["weight"], t["bias"], EPS),
        wanted=("x", "weight", "bias") if backward else (),
        cost=Cost(0.0, moves * rows * cols * dtype.itemsize),
        compile=compile,
        tags=tags,
    )


def rms_norm(
    rows: int, cols: int, dtype: torch.dtype, *, backward: bool = True, compile: bool = False
) -> Case:
    def make(m: Maker) -> Tensors:
        return {
            "x": m.normal(rows, cols),
            "weight": 1 + m.normal(cols, scale=0.1),
            "dy": m.normal(rows, cols),
        }

    moves = 5 if backward else 2
    return kernel_case(
        "rms_norm",
        {"rows": rows, "cols": cols},
        dtype,
        make=make,
        ours=lambda t: LF.rms_norm(t["x"], (cols,), t["weight"], EPS),
        torch_=lambda t: F.rms_norm(t["x"], (cols,), t["weight"], EPS),
        wanted=("x", "weight") if backward else (),
        cost=Cost(0.0, moves * rows * cols * dtype.itemsize),
        compile=compile,
    )


def add_layer_norm(
    rows: int, cols: int, dtype: torch.dtype, *, dropout_p: float, compile: bool = False
) -> Case:
    """Pre-norm form: y = norm(z) and the new residual stream z = dropout(x) + residual. Forward
    reads two tensors and writes two; backward reads z, dy and dz and writes dx and dresidual."""

    def make(m: Maker) -> Tensors:
        return {
            "x": m.normal(rows, cols),
            "residual": m.normal(rows, cols),
            "weight": 1 + m.normal(cols, scale=0.1),
            "bias": m.normal(cols, scale=0.1),
            "dy": m.normal(rows, cols),
            "dz": m.normal(rows, cols),
        }

    def ours(t: Tensors) -> tuple[Tensor, Tensor]:
        return LF.add_layer_norm(
            t["x"], t["residual"], (cols,), t["weight"], t["bias"], EPS,
            dropout_p=dropout_p, prenorm=True,
        )  # fmt: skip

    def torch_(t: Tensors) -> tuple[Tensor, Tensor]:
        z = F.dropout(t["x"], dropout_p) + t["residual"]
        return F.layer_norm(z, (cols,), t["weight"], t["bias"], EPS), z

    return kernel_case(
        "add_layer_norm",
        {"rows": rows, "cols": cols},
        dtype,
        make=make,
        ours=ours,
        torch_=torch_,
        wanted=("x", "residual", "weight", "bias"),
        cotangents=("dy", "dz"),
        cost=Cost(0.0, 9 * rows * cols * dtype.itemsize),
        label=f"dropout {dropout_p:g}" if dropout_p else "",
        random=dropout_p > 0.0,
        compile=compile,
    )
