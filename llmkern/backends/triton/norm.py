"""LayerNorm and RMSNorm: norm_kernels.py, norm_bwd_kernels.py."""

import functools
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from llmkern import random
from llmkern.backends.triton import _launch, tiles_norm
from llmkern.backends.triton._launch import Compilation, compilation
from llmkern.backends.triton._views import contiguous, rows_of
from llmkern.specs import NormSpec


def supports(spec: NormSpec) -> str | None:
    return _launch.unavailable(spec.device) or _launch.unsupported(spec.dtype)


@functools.cache
def _forward_kernels() -> ModuleType:
    from llmkern.backends.triton import norm_kernels

    return norm_kernels


@functools.cache
def _backward_kernels() -> ModuleType:
    from llmkern.backends.triton import norm_bwd_kernels

    return norm_bwd_kernels


class _Plan(NamedTuple):
    """What a call's spec decides: looked up, so that a call costs the host little."""

    launch: Callable  # the kernel with its grid
    numbers: tuple  # the arguments after the strides
    num_warps: int
    dropout: int  # the kernels' DROPOUT
    tile: tiles_norm.NormTile


def _dropout(spec: NormSpec) -> tuple[int, int, float]:
    """The kernels' DROPOUT, threshold and scale."""
    threshold = random.threshold(spec.dropout_p)
    mode = 0 if threshold == 0 else 1 if spec.cols % 8 == 0 else 2
    return mode, threshold, random.scale(spec.dropout_p)


def _itemsize(spec: NormSpec) -> int:
    return min(spec.dtype.itemsize, spec.x_dtype.itemsize)


@functools.lru_cache(maxsize=4096)
def _forward_plan(spec: NormSpec, capability: int) -> _Plan:
    mode, threshold, scale = _dropout(spec)
    tile = tiles_norm.pick_forward(spec.rows, spec.cols, _itemsize(spec), capability)
    numbers = (spec.rows, spec.cols, spec.eps, threshold, scale, spec.rms, spec.unit_offset, mode)
    kernels = _forward_kernels()
    if tile.chunks:
        launch = kernels.norm_fwd[(tile.programs,)]
        numbers += (*tile[:4], tile.covers(spec.cols))
    else:
        launch = kernels.norm_fwd_wide[(spec.rows,)]
        numbers += (tile.chunk,)
    return _Plan(launch, numbers, tile.num_warps, mode, tile)


@functools.lru_cache(maxsize=4096)
def _backward_plan(spec: NormSpec, capability: int) -> _Plan:
    mode, threshold, scale = _dropout(spec)
    tile = tiles_norm.pick_backward(spec.rows, spec.cols, _itemsize(spec), capability)
    numbers = (spec.rows, spec.cols, threshold, scale, spec.rms, spec.unit_offset, mode)
    kernels = _backward_kernels()
    if tile.chunks:
        launch = kernels.norm_bwd[(tile.programs,)]
        numbers += (*tile[:3], tile.covers(spec.cols))
    else:
        launch = kernels.norm_bwd_wide[(spec.rows,)]
        numbers += (tile.chunk,)
    return _Plan(launch, numbers, tile.num_warps, mode, tile)


def forward(
    spec: NormSpec,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    rows, cols, device = spec.rows, spec.cols, x.device
    y = torch.empty(x.shape, dtype=spec.dtype, device=device)
    z = torch.empty_like(y) if spec.keep_z else None
    statistics = torch.empty(1 if spec.rms else 2, rows, dtype=torch.float32, device=device)
    if rows * cols == 0:
        return y, z, statistics
    x, x_stride = rows_of(x, rows, cols)
    residual_stride = 0
    if residual is not None:
        residual, residual_stride = rows_of(residual, rows, cols)
    plan = _forward_plan(spec, _launch.capability(device))
    with _launch.guard(device):
        plan.launch(
            x, residual, contiguous(weight), contiguous(bias), seed if plan.dropout else None,
            y, z, statistics, x_stride, residual_stride, *plan.numbers, num_warps=plan.num_warps,
        )  # fmt: skip
    return y, z, statistics


def backward(
    spec: NormSpec,
    dy: Tensor,
    dz: Tensor | None,
    z: Tensor,
    weight: Tensor | None,
    statistics: Tensor,
    seed: Tensor | None,
    wants: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    rows, cols, device = spec.rows, spec.cols, z.device
    dx = dresidual = None
    if wants[0]:
        dx = torch.empty(z.shape, dtype=spec.x_dtype, device=device)
        if spec.add and (spec.dropout_p or spec.x_dtype != spec.dtype):
            dresidual = torch.empty(z.shape, dtype=spec.dtype, device=device)
    if rows * cols == 0 or not any(wants):
        return dx, dresidual, *(_zeros(spec, device) if want else None for want in wants[1:])
    dy, dy_stride = rows_of(dy, rows, cols)
    z, z_stride = rows_of(z, rows, cols)
    dz_stride = 0
    if dz is not None:
        dz, dz_stride = rows_of(dz, rows, cols)
    plan = _backward_plan(spec, _launch.capability(device))
    parts = [
        torch.empty(plan.tile.programs, cols, dtype=torch.float32, device=device) if want else None
        for want in wants[1:]
    ]
    seed = seed if plan.dropout and wants[0] else None
    tensors = (dy, dz, z, contiguous(weight), statistics, seed, dx, dresidual)
    strides = (dy_stride, dz_stride, z_stride)
    with _launch.guard(device):
        if plan.tile.chunks:
            plan.launch(*tensors, *parts, *strides, *plan.numbers, num_warps=plan.num_warps)
        else:
            if dx is not None:
                plan.launch(*tensors, *strides, *plan.numbers, num_warps=plan.num_warps)
            if any(wants[1:]):
                _partial_sums(spec, plan.tile, dy, dy_stride, z, z_stride, statistics, parts)
        return dx, dresidual, *_sum_parts(spec, parts)


def _affine_dtype(spec: NormSpec) -> torch.dtype:
    return spec.dtype if spec.weight_dtype is None else spec.weight_dtype


def _zeros(spec: NormSpec, device: torch.device) -> Tensor:
    return torch.zeros(spec.cols, dtype=_affine_dtype(spec), device=device)


def _partial_sums(spec, tile, dy, dy_stride, z, z_stride, statistics, parts) -> None:
    block = tiles_norm.AFFINE
    grid = (-(-spec.cols // block.chunk), tile.programs)
    _backward_kernels().norm_bwd_affine[grid](
        dy, z, statistics, *parts, dy_stride, z_stride, spec.rows, spec.cols, spec.rms,
        block.rows, block.chunk, num_warps=block.num_warps,
    )  # fmt: skip


def _sum_parts(spec: NormSpec, parts: list[Tensor | None]) -> list[Tensor | None]:
    """Gradients of weight and bias from their partial sums."""
    sums = [
        None if p is None else torch.empty(spec.cols, dtype=_affine_dtype(spec), device=p.device)
        for p in parts
    ]
    pairs = [(p, s) for p, s in zip(parts, sums, strict=True) if p is not None]
    if pairs:
        pairs.append((None, None))
        (first_parts, first), (second_parts, second) = pairs[:2]
        block = tiles_norm.pick_sum(len(first_parts))
        grid = (-(-spec.cols // block.chunk), len(pairs) - 1)
        _backward_kernels().column_sum[grid](
            first_parts, second_parts, first, second, len(first_parts), spec.cols,
            block.rows, block.chunk, num_warps=block.num_warps,
        )  # fmt: skip
    return sums


def compilations(capability: int) -> Iterator[Compilation]:
    """Every kernel in the forms that 2048 rows of ordinary models take."""
    for cols, dtype, rms, add, dropout in (
        (768, "bf16", False, False, 0),
        (1024, "bf16", False, False, 0),
        (4096, "bf16", False, False, 0),
        (1024, "fp32", False, False, 0),
        (4096, "bf16", True, False, 0),
        (4096, "bf16", True, True, 0),
        (1024, "bf16", False, True, 1),
        (1024, "fp32", False, True, 1),
        (1030, "fp16", False, True, 2),
        (32768, "bf16", False, True, 1),
    ):
        pointer = "*" + dtype
        marks = (" rms" * rms, " add" * add, " dropout" * bool(dropout))
        form = f"{cols} {dtype}{''.join(marks)}"
        flags = {"RMS": rms, "UNIT_OFFSET": False, "DROPOUT": dropout}
        types = {
            "weight": pointer, "bias": None if rms else pointer, "statistics": "*fp32",
            "seed": "*i64" if dropout else None, "stream": pointer if add else None,
        }  # fmt: skip
        yield _forward_form(form, capability, cols, pointer, types, flags)
        yield from _backward_forms(form, capability, cols, pointer, types, flags)
    sums = tiles_norm.pick_sum(tiles_norm.multiprocessors(capability))
    types = {"first_parts": "*fp32", "second_parts": "*fp32", "first": "*bf16", "second": "*bf16",
             "parts": "i32", "cols": "i32"}  # fmt: skip
    flags = {"PARTS": sums.rows, "CHUNK": sums.chunk}
    yield compilation("column_sum bf16", lambda: _backward_kernels().column_sum, types, flags,
                      sums.num_warps, ("cols",))  # fmt: skip


_SIZES = {"rows": "i32", "cols": "i32"}


def _forward_form(form, capability, cols, pointer, types, flags) -> Compilation:
    tile = tiles_norm.pick_forward(2048, cols, 4 if pointer == "*fp32" else 2, capability)
    arguments = {
        "x": pointer, "residual": types["stream"], "weight": types["weight"],
        "bias": types["bias"], "seed": types["seed"], "y": pointer, "z": types["stream"],
        "statistics": "*fp32", "x_stride": "i32", "residual_stride": "i32", **_SIZES,
        "eps": "fp32", "threshold": "i32", "scale": "fp32",
    }  # fmt: skip
    divisible = ("cols", "x_stride", "residual_stride") if cols % 16 == 0 else ()
    if not tile.chunks:
        return compilation(f"norm_fwd_wide {form}", lambda: _forward_kernels().norm_fwd_wide,
                           arguments, flags | {"CHUNK": tile.chunk}, tile.num_warps,
                           divisible)  # fmt: skip
    shape = {"ROWS": tile.block_rows, "CHUNK": tile.chunk, "CHUNKS": tile.chunks,
             "LANES": tile.lanes, "EVEN": tile.covers(cols)}  # fmt: skip
    return compilation(f"norm_fwd {form}", lambda: _forward_kernels().norm_fwd, arguments,
                       flags | shape, tile.num_warps, divisible)  # fmt: skip


def _backward_forms(form, capability, cols, pointer, types, flags) -> Iterator[Compilation]:
    tile = tiles_norm.pick_backward(2048, cols, 4 if pointer == "*fp32" else 2, capability)
    own = pointer if types["seed"] else None  # dresidual
    parts = {"dweight": "*fp32", "dbias": types["bias"] and "*fp32"}
    given = {"dy": pointer, "dz": types["stream"], "z": pointer, "weight": types["weight"],
             "statistics": "*fp32", "seed": types["seed"], "dx": pointer,
             "dresidual": own}  # fmt: skip
    strides = {"dy_stride": "i32", "dz_stride": "i32", "z_stride": "i32"}
    numbers = {**strides, **_SIZES, "threshold": "i32", "scale": "fp32"}
    divisible = ("cols", *strides) if cols % 16 == 0 else ()
    if tile.chunks:
        shape = {"ROWS": tile.block_rows, "CHUNK": tile.chunk, "CHUNKS": tile.chunks,
                 "EVEN": tile.covers(cols)}  # fmt: skip
        yield compilation(f"norm_bwd {form}", lambda: _backward_kernels().norm_bwd,
                          given | parts | numbers, flags | shape, tile.num_warps,
                          divisible)  # fmt: skip
        return
    yield compilation(f"norm_bwd_wide {form}", lambda: _backward_kernels().norm_bwd_wide,
                      given | numbers, flags | {"CHUNK": tile.chunk}, tile.num_warps,
                      divisible)  # fmt: skip
    block = tiles_norm.AFFINE
    yield compilation(
        f"norm_bwd_affine {form}",
        lambda: _backward_kernels().norm_bwd_affine,
        {"dy": pointer, "z": pointer, "statistics": "*fp32", **parts, "dy_stride": "i32",
         "z_stride": "i32", **_SIZES},
        {"RMS": flags["RMS"], "ROWS": block.rows, "CHUNK": block.chunk},
        block.num_warps,
        ("cols", "dy_stride", "z_stride") if divisible else (),
    )  # fmt: skip
