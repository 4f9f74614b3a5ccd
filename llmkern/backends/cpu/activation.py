"""Activations: csrc/cpu/elementwise.cpp.

Tensors that fill their memory are processed in memory order whatever their strides, as torch does;
the output has the strides of the input.
"""

import torch
from torch import Tensor

from llmkern.backends.cpu import _ext
from llmkern.backends.cpu._ext import DTYPE_CODES, plane_of
from llmkern.specs import ActivationSpec

CODES = {"relu": 1, "gelu": 2, "gelu_tanh": 3, "silu": 4}


def supports(spec: ActivationSpec) -> str | None:
    return _ext.unavailable(spec.device)


def _fills_memory(t: Tensor, like: Tensor) -> bool:
    """True where `like`, an empty_like, could copy the strides of t: no gap, no overlap."""
    return t.stride() == like.stride()


def forward(spec: ActivationSpec, x: Tensor, inplace: bool) -> Tensor:
    out = x if inplace else torch.empty_like(x)
    if x.is_contiguous() or (not inplace and _fills_memory(x, out)):
        flat, rows, cols, stride = x, 1, spec.elements, spec.elements
        y, y_stride = out, spec.elements
    else:
        flat, rows, cols, stride = plane_of(x)
        y, y_stride = (
            (flat, stride) if inplace else (torch.empty(x.shape, dtype=x.dtype, device="cpu"), cols)
        )
    _ext.load().module.activation_fwd(
        DTYPE_CODES[spec.dtype],
        CODES[spec.activation],
        rows,
        cols,
        flat,
        stride,
        y,
        y_stride,
    )
    if inplace:
        return x if y.data_ptr() == x.data_ptr() else x.copy_(y.view(x.shape))
    return y


def backward(spec: ActivationSpec, dy: Tensor, x: Tensor) -> Tensor:
    """dy * f'(x); for relu, x may be its output."""
    dx = torch.empty_like(x)
    if _fills_memory(x, dx) and _fills_memory(dy, dx):
        planes = [(t, 1, spec.elements, spec.elements) for t in (x, dy)]
    else:
        planes = [plane_of(x), plane_of(dy)]
        if planes[0][1:3] != planes[1][1:3]:
            planes = [plane_of(x.contiguous()), plane_of(dy.contiguous())]
        dx = torch.empty(x.shape, dtype=x.dtype, device="cpu")
    (x_flat, rows, cols, x_stride), (dy_flat, _, _, dy_stride) = planes
    _ext.load().module.activation_bwd(
        DTYPE_CODES[spec.dtype],
        CODES[spec.activation],
        rows,
        cols,
        x_flat,
        x_stride,
        dy_flat,
        dy_stride,
        dx,
    )
    return dx
