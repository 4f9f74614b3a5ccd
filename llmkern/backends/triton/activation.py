"""Activations: activation_kernels.py.

Tensors that fill their memory are processed in memory order whatever their strides, as torch does;
the output has the strides of the input.
"""

import functools
from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor

from llmkern.backends.triton import _launch, tiles_elementwise
from llmkern.backends.triton._launch import Compilation, compilation
from llmkern.backends.triton._views import plane_of
from llmkern.specs import ActivationSpec


def supports(spec: ActivationSpec) -> str | None:
    return _launch.unavailable(spec.device) or _launch.unsupported(spec.dtype)


@functools.cache
def _kernels() -> ModuleType:
    from llmkern.backends.triton import activation_kernels

    return activation_kernels


def _fills_memory(t: Tensor, like: Tensor) -> bool:
    """True where `like`, an empty_like, could copy the strides of t: no gap, no overlap."""
    return t.stride() == like.stride()


def _launch_flat(spec: ActivationSpec, x: Tensor, dy: Tensor | None, y: Tensor) -> None:
    if spec.elements == 0:
        return
    block = tiles_elementwise.BLOCK
    with _launch.guard(x.device):
        _kernels().activation_flat[(-(-spec.elements // block),)](
            x, dy, y, spec.elements, spec.activation, block, num_warps=tiles_elementwise.NUM_WARPS
        )


def _launch_planes(spec: ActivationSpec, x: tuple, dy: tuple | None, y: tuple) -> None:
    """Each argument as plane_of gives it; all with the same rows and columns."""
    _, rows, cols, x_stride = x
    if rows == 1:
        _launch_flat(spec, x[0], None if dy is None else dy[0], y[0])
        return
    tile = tiles_elementwise.pick_rows(cols)
    grid = (-(-rows // tile.rows), -(-cols // tile.chunk))
    dy, dy_stride = (None, 0) if dy is None else (dy[0], dy[3])
    with _launch.guard(x[0].device):
        _kernels().activation_rows[grid](
            x[0], dy, y[0], x_stride, dy_stride, y[3], rows, cols, spec.activation, *tile,
            num_warps=tiles_elementwise.NUM_WARPS,
        )  # fmt: skip


def forward(spec: ActivationSpec, x: Tensor, inplace: bool) -> Tensor:
    out = x if inplace else torch.empty_like(x)
    if x.is_contiguous() or (not inplace and _fills_memory(x, out)):
        _launch_flat(spec, x, None, out)
        return out
    plane = plane_of(x)
    if inplace:
        _launch_planes(spec, plane, None, plane)
        return x if plane[0].data_ptr() == x.data_ptr() else x.copy_(plane[0].view(x.shape))
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch_planes(spec, plane, None, (out, *plane[1:3], plane[2]))
    return out


def backward(spec: ActivationSpec, dy: Tensor, x: Tensor) -> Tensor:
    """dy * f'(x); for relu, x may be its output."""
    dx = torch.empty_like(x)
    if _fills_memory(x, dx) and _fills_memory(dy, dx):
        _launch_flat(spec, x, dy, dx)
        return dx
    planes = plane_of(x), plane_of(dy)
    if planes[0][1:3] != planes[1][1:3]:
        planes = plane_of(x.contiguous()), plane_of(dy.contiguous())
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch_planes(spec, *planes, (dx, *planes[0][1:3], planes[0][2]))
    return dx


def compilations(capability: int) -> Iterator[Compilation]:
    """Each function, forward and backward, on dense bf16; one on the rows of a slice."""
    warps = tiles_elementwise.NUM_WARPS
    for activation in ("relu", "gelu", "gelu_tanh", "silu"):
        for direction, gradient in (("forward", None), ("backward", "*bf16")):
            yield compilation(f"activation_flat bf16 {activation} {direction}",
                              lambda: _kernels().activation_flat,
                              {"x": "*bf16", "dy": gradient, "y": "*bf16", "elements": "i32"},
                              {"ACTIVATION": activation, "BLOCK": tiles_elementwise.BLOCK},
                              warps)  # fmt: skip
    tile = tiles_elementwise.pick_rows(1024)
    strides = {"x_stride": "i32", "dy_stride": "i32", "y_stride": "i32"}
    yield compilation("activation_rows fp32 gelu backward", lambda: _kernels().activation_rows,
                      {"x": "*fp32", "dy": "*fp32", "y": "*fp32", **strides, "rows": "i32",
                       "cols": "i32"},
                      {"ACTIVATION": "gelu", "ROWS": tile.rows, "CHUNK": tile.chunk},
                      warps, (*strides, "cols"))  # fmt: skip
