"""Dropout and activations on their own, over [rows, cols].

Bytes: forward reads x and writes y, backward reads dy (and x, for an activation) and writes dx.
What a dropout mask costs to keep is the implementation's own affair and not counted.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

import llmkern.functional as LF
from llmkern.bench.cases.kernel import kernel_case
from llmkern.bench.registry import Case, Cost, Maker, Tensors

OURS = {
    "relu": lambda x: LF.relu(x),
    "gelu": lambda x: LF.gelu(x),
    "gelu_tanh": lambda x: LF.gelu(x, approximate="tanh"),
    "silu": lambda x: LF.silu(x),
}
TORCH = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}


def _make(rows: int, cols: int):
    def make(m: Maker) -> Tensors:
        return {"x": m.normal(rows, cols), "dy": m.normal(rows, cols)}

    return make


def dropout(
    rows: int, cols: int, dtype: torch.dtype, *, p: float = 0.1, backward: bool = False,
    compile: bool = False,
) -> Case:  # fmt: skip
    moves = 4 if backward else 2
    return kernel_case(
        "dropout",
        {"rows": rows, "cols": cols},
        dtype,
        make=_make(rows, cols),
        ours=lambda t: LF.dropout(t["x"], p),
        torch_=lambda t: F.dropout(t["x"], p),
        wanted=("x",) if backward else (),
        cost=Cost(0.0, moves * rows * cols * dtype.itemsize),
        label=f"p {p:g}",
        random=True,
        compile=compile,
    )


def activation(
    name: str, rows: int, cols: int, dtype: torch.dtype, *, backward: bool = True,
    compile: bool = False,
) -> Case:  # fmt: skip
    moves = 5 if backward else 2
    return kernel_case(
        "activation",
        {"rows": rows, "cols": cols},
        dtype,
        make=_make(rows, cols),
        ours=lambda t: OURS[name](t["x"]),
        torch_=lambda t: TORCH[name](t["x"]),
        wanted=("x",) if backward else (),
        cost=Cost(0.0, moves * rows * cols * dtype.itemsize),
        label=name,
        compile=compile,
    )
