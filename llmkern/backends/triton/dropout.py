"""Dropout: dropout_kernels.py."""

import functools
from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor

from llmkern import random
from llmkern.backends.triton import _launch, tiles_elementwise
from llmkern.backends.triton._launch import Compilation, compilation
from llmkern.backends.triton._views import plane_of
from llmkern.specs import DropoutSpec


def supports(spec: DropoutSpec) -> str | None:
    return _launch.unavailable(spec.device) or _launch.unsupported(spec.dtype)


@functools.cache
def _kernels() -> ModuleType:
    from llmkern.backends.triton import dropout_kernels

    return dropout_kernels


def forward(spec: DropoutSpec, x: Tensor, seed: Tensor, inplace: bool) -> Tensor:
    """x with dropped elements 0 and kept ones scaled; x itself where inplace."""
    threshold, scale = random.threshold(spec.p), random.scale(spec.p)
    if threshold == 0:
        return x if inplace else x.clone(memory_format=torch.contiguous_format)
    flat, rows, cols, stride = plane_of(x)
    if inplace:
        out, out_stride = flat, stride
    else:
        out, out_stride = torch.empty(x.shape, dtype=x.dtype, device=x.device), cols
    if spec.elements:
        _launch_kernel((flat, seed, out), rows, cols, (stride, out_stride), threshold, scale)
    if inplace and out.data_ptr() != x.data_ptr():
        return x.copy_(out.view(x.shape))
    return x if inplace else out


def _launch_kernel(tensors, rows, cols, strides, threshold, scale) -> None:
    warps = tiles_elementwise.NUM_WARPS
    with _launch.guard(tensors[0].device):
        if rows == 1:
            block = tiles_elementwise.BLOCK
            _kernels().dropout_flat[(-(-cols // block),)](
                *tensors, cols, threshold, scale, block, num_warps=warps
            )
        else:
            tile = tiles_elementwise.pick_rows(cols)
            grid = (-(-rows // tile.rows), -(-cols // tile.chunk))
            _kernels().dropout_rows[grid](
                *tensors, *strides, rows, cols, threshold, scale, cols % 8 == 0, *tile,
                num_warps=warps,
            )  # fmt: skip


def backward(spec: DropoutSpec, dy: Tensor, seed: Tensor) -> Tensor:
    return forward(spec, dy, seed, False)


def compilations(capability: int) -> Iterator[Compilation]:
    """Dense tensors, and the rows of a slice."""
    numbers = {"threshold": "i32", "scale": "fp32"}
    for dtype in ("bf16", "fp32"):
        tensors = {"x": "*" + dtype, "seed": "*i64", "y": "*" + dtype}
        yield compilation(f"dropout_flat {dtype}", lambda: _kernels().dropout_flat,
                          {**tensors, "elements": "i32", **numbers},
                          {"BLOCK": tiles_elementwise.BLOCK},
                          tiles_elementwise.NUM_WARPS)  # fmt: skip
    tile = tiles_elementwise.pick_rows(1024)
    sizes = {"x_stride": "i32", "y_stride": "i32", "rows": "i32", "cols": "i32"}
    for aligned in (True, False):
        yield compilation(f"dropout_rows bf16 {'' if aligned else 'un'}aligned",
                          lambda: _kernels().dropout_rows,
                          {"x": "*bf16", "seed": "*i64", "y": "*bf16", **sizes, **numbers},
                          {"ALIGNED": aligned, "ROWS": tile.rows, "CHUNK": tile.chunk},
                          tiles_elementwise.NUM_WARPS,
                          ("x_stride", "y_stride", "cols") if aligned else ())  # fmt: skip
