"""Linear layers with epilogues in plain torch; formulas: csrc/include/llmkern/gemm.h."""

import math

import torch
from torch import Tensor

from llmkern import numerics, random
from llmkern.specs import LinearSpec
from llmkern.torch_private import reshaped_output


def supports(spec: LinearSpec) -> str | None:
    return None


def _wide(t: Tensor | None, spec: LinearSpec) -> Tensor | None:
    return None if t is None else t.to(numerics.compute_dtype(spec.dtype))


def _activate(z: Tensor, activation: str | None) -> Tensor:
    functional = torch.nn.functional
    if activation is None:
        return z
    if activation == "gelu_tanh":
        return functional.gelu(z, approximate="tanh")
    return {"relu": functional.relu, "gelu": functional.gelu, "silu": functional.silu}[activation](
        z
    )


def _derivative(z: Tensor, activation: str) -> Tensor:
    if activation == "relu":
        return (z > 0).to(z.dtype)
    if activation == "silu":
        s = torch.sigmoid(z)
        return s * (1 + z * (1 - s))
    if activation == "gelu":
        density = torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
        return 0.5 * (1 + torch.erf(z / math.sqrt(2))) + z * density
    c = math.sqrt(2 / math.pi)
    t = torch.tanh(c * (z + 0.044715 * z**3))
    return 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * c * (1 + 3 * 0.044715 * z * z)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    z = x @ weight.T
    return z if bias is None else z + bias


def _drop(t: Tensor, spec: LinearSpec, seed: Tensor | None) -> Tensor:
    if spec.dropout_p == 0.0:
        return t
    keep = random.flat_keep_mask(seed, tuple(t.shape), spec.dropout_p)
    return torch.where(keep, t * random.scale(spec.dropout_p), 0.0)


def forward(
    spec: LinearSpec,
    x: Tensor,
    weight: Tensor,
    up_weight: Tensor | None,
    bias: Tensor | None,
    up_bias: Tensor | None,
    residual: Tensor | None,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, preact, up_preact); the last two are empty unless spec.keep_preact (and gated)."""
    rows = _wide(x, spec).reshape(spec.rows, spec.in_features)
    z = _product(rows, _wide(weight, spec), _wide(bias, spec))
    y, u = _activate(z, spec.activation), None
    if spec.gated:
        u = _product(rows, _wide(up_weight, spec), _wide(up_bias, spec))
        y = y * u
    y = _drop(y, spec, seed)
    if residual is not None:
        y = y + _wide(residual, spec).reshape(y.shape)
    shape = (*x.shape[:-1], spec.out_features)
    kept = [x.new_empty(0), x.new_empty(0)]
    if spec.keep_preact:
        kept = [x.new_empty(0) if t is None else t.to(spec.dtype).reshape(shape) for t in (z, u)]
    # No view of y: autograd forbids to modify a Function's output where it is one.
    return reshaped_output(y.to(spec.dtype), shape), kept[0], kept[1]


def backward(
    spec: LinearSpec,
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    up_weight: Tensor | None,
    preact: Tensor,
    up_preact: Tensor,
    seed: Tensor | None,
    wants: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of (x, weight, up_weight, bias, up_bias); empty where `wants` says no."""
    shape = (spec.rows, spec.out_features)
    g, gu = _drop(_wide(dy, spec).reshape(shape), spec, seed), None
    if spec.activation is not None:
        z = _wide(preact, spec).reshape(shape)
        if spec.gated:
            u = _wide(up_preact, spec).reshape(shape)
            gu = g * _activate(z, spec.activation)
            g = g * u
        g = g * _derivative(z, spec.activation)
    rows = _wide(x, spec).reshape(spec.rows, spec.in_features)
    empty = x.new_empty(0)
    found = [empty.clone() for _ in wants]
    if wants[0]:
        dx = g @ _wide(weight, spec)
        if spec.gated:
            dx = dx + gu @ _wide(up_weight, spec)
        found[0] = dx.reshape(x.shape)
    if wants[1]:
        found[1] = g.T @ rows
    if wants[2]:
        found[2] = gu.T @ rows
    if wants[3]:
        found[3] = g.sum(0)
    if wants[4]:
        found[4] = gu.sum(0)
    return tuple(t.to(spec.dtype) for t in found)
