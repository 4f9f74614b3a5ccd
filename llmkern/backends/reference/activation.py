"""Activations in plain torch; formulas: csrc/include/llmkern/activation.h.

torch's own give NaN where a formula is inf * 0. Beyond |x| = 1e4 every function here is at its
limit, so clamping there gives the limits instead.
"""

import torch
from torch import Tensor
from torch.nn import functional

from llmkern import numerics
from llmkern.specs import ActivationSpec

_LIMIT = 1e4


def supports(spec: ActivationSpec) -> str | None:
    return None


def forward(spec: ActivationSpec, x: Tensor, inplace: bool) -> Tensor:
    wide = x.to(numerics.compute_dtype(spec.dtype))
    if spec.activation == "relu":
        y = functional.relu(wide)
    elif spec.activation == "silu":
        y = functional.silu(wide.clamp(min=-_LIMIT))
    else:
        approximate = "tanh" if spec.activation == "gelu_tanh" else "none"
        y = functional.gelu(wide.clamp(min=-_LIMIT), approximate=approximate)
        # The tanh form cubes its argument: inf - inf for a huge one.
        y = torch.where(wide > _LIMIT, wide, y)
    y = y.to(spec.dtype)
    return x.copy_(y) if inplace else y


def backward(spec: ActivationSpec, dy: Tensor, x: Tensor) -> Tensor:
    """dy * f'(x); for relu, x may be its output."""
    dtype = numerics.compute_dtype(spec.dtype)
    d, wide = dy.to(dtype), x.to(dtype).clamp(-_LIMIT, _LIMIT)
    if spec.activation == "relu":
        dx = torch.where(wide <= 0.0, 0.0, d)
    elif spec.activation == "silu":
        dx = torch.ops.aten.silu_backward(d, wide)
    else:
        approximate = "tanh" if spec.activation == "gelu_tanh" else "none"
        dx = torch.ops.aten.gelu_backward(d, wide, approximate=approximate)
    return dx.to(spec.dtype)
