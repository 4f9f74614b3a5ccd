"""Linear layers: y = dropout(act(x W^T + b)) + residual over [M, K] x [N, K], and gated pairs.

FLOPs: 2 M N K for each product, of which backward has two. Bytes: each operand, the output and the
gradients once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import llmkern.functional as LF
from llmkern.bench import baselines
from llmkern.bench.cases.kernel import kernel_case
from llmkern.bench.registry import Case, Cost, Maker, Tensors, Variant

ACTIVATIONS = {
    None: lambda x: x,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}


def linear(
    m_: int,
    k: int,
    n: int,
    dtype: torch.dtype,
    *,
    activation: str | None = None,
    residual: bool = False,
    dropout_p: float = 0.0,
    backward: bool = False,
    compile: bool = False,
    budget_s: float = 2.0,
) -> Case:
    def make(m: Maker) -> Tensors:
        tensors = {
            "x": m.normal(m_, k),
            "weight": m.weight(n, k),
            "bias": m.normal(n, scale=k**-0.5),
            "dy": m.normal(m_, n),
        }
        return tensors | ({"residual": m.normal(m_, n)} if residual else {})

    def ours(t: Tensors) -> Tensor:
        return LF.linear(
            t["x"], t["weight"], t["bias"],
            activation=activation, residual=t.get("residual"), dropout_p=dropout_p,
        )  # fmt: skip

    def torch_(t: Tensors) -> Tensor:
        y = ACTIVATIONS[activation](F.linear(t["x"], t["weight"], t["bias"]))
        y = F.dropout(y, dropout_p) if dropout_p else y
        return y + t["residual"] if residual else y

    contenders: tuple[Variant, ...] = ()
    if not (backward or residual or dropout_p):
        contenders = (baselines.onednn_linear(activation),)
    wanted = ("x", "weight", "bias", *(("residual",) if residual else ())) if backward else ()
    label = [activation or "", "residual" if residual else ""]
    label.append(f"dropout {dropout_p:g}" if dropout_p else "")
    elements = m_ * k + n * k + m_ * n * (2 if residual else 1)
    return kernel_case(
        "linear",
        {"M": m_, "K": k, "N": n},
        dtype,
        make=make,
        ours=ours,
        torch_=torch_,
        wanted=wanted,
        cost=Cost(
            2.0 * m_ * n * k * (3 if backward else 1),
            elements * dtype.itemsize * (3 if backward else 1),
        ),
        label=" ".join(word for word in label if word),
        random=dropout_p > 0.0,
        compile=compile,
        contenders=contenders,
        budget_s=budget_s,
    )


def linear_gated(
    m_: int,
    k: int,
    n: int,
    dtype: torch.dtype,
    *,
    activation: str = "silu",
    backward: bool = False,
    compile: bool = False,
) -> Case:
    """act(x Wg^T) * (x Wu^T): SwiGLU with silu, GEGLU with gelu."""

    def make(m: Maker) -> Tensors:
        return {
            "x": m.normal(m_, k),
            "gate": m.weight(n, k),
            "up": m.weight(n, k),
            "dy": m.normal(m_, n),
        }

    def torch_(t: Tensors) -> Tensor:
        return ACTIVATIONS[activation](F.linear(t["x"], t["gate"])) * F.linear(t["x"], t["up"])

    return kernel_case(
        "linear",
        {"M": m_, "K": k, "N": n},
        dtype,
        make=make,
        ours=lambda t: LF.linear_gated(t["x"], t["gate"], t["up"], activation=activation),
        torch_=torch_,
        wanted=("x", "gate", "up") if backward else (),
        cost=Cost(
            4.0 * m_ * n * k * (3 if backward else 1),
            (m_ * k + 2 * n * k + m_ * n) * dtype.itemsize * (3 if backward else 1),
        ),
        label=f"gated {activation}",
        compile=compile,
    )
