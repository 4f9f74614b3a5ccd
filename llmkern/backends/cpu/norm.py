"""LayerNorm and RMSNorm: csrc/cpu/norm.cpp."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from llmkern import numerics, random
from llmkern.backends.cpu import _ext
from llmkern.backends.cpu._ext import DTYPE_CODES, rows_of
from llmkern.specs import NormSpec

_FEW_ELEMENTS = 16384  # 64 KiB of float32: backward finds them in the second-level cache again


def supports(spec: NormSpec) -> str | None:
    return _ext.unavailable(spec.device)


@functools.lru_cache(maxsize=4096)
def _shape(spec: NormSpec) -> object:
    """The bindings' form of a spec."""
    code = DTYPE_CODES[spec.dtype]
    weight_code = code if spec.weight_dtype is None else DTYPE_CODES[spec.weight_dtype]
    threshold = random.threshold(spec.dropout_p) if spec.dropout_p else 0
    return _ext.load().module.NormShape(
        code, DTYPE_CODES[spec.x_dtype], weight_code, spec.rows, spec.cols, spec.eps, spec.rms,
        spec.unit_offset, threshold,
    )  # fmt: skip


def _keeps_statistics(spec: NormSpec) -> bool:
    """For few elements, computing them again is cheaper than one more tensor."""
    return spec.keep_statistics or spec.rows * spec.cols > _FEW_ELEMENTS


def _empty(like: Tensor, dtype: torch.dtype) -> Tensor:
    """A contiguous tensor of like's shape. empty_like takes half the time of empty with a shape."""
    if like.dtype == dtype and like.is_contiguous():
        return torch.empty_like(like)
    return torch.empty(like.shape, dtype=dtype, device="cpu")


def forward(
    spec: NormSpec,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    rows, cols = spec.rows, spec.cols
    y = _empty(x, spec.dtype)
    x, x_stride = rows_of(x, rows, cols)
    residual_stride = 0
    if residual is not None:
        residual, residual_stride = rows_of(residual, rows, cols)
    weight = None if weight is None else weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    z = torch.empty_like(y) if spec.keep_z else None
    statistics = None
    if _keeps_statistics(spec):  # sizes as arguments, not as a tuple: half the time
        wide = numerics.compute_dtype(spec.dtype)
        statistics = torch.empty(1 if spec.rms else 2, rows, dtype=wide, device="cpu")
    _ext.load().module.norm_fwd(
        _shape(spec), seed, x, x_stride, residual, residual_stride,
        weight, bias, z, y, statistics,
    )  # fmt: skip
    return y, z, statistics


def bind(spec: NormSpec) -> Callable:
    """`forward` for one spec. Of a small call without a residual little is left: the Python above
    takes longer than its kernel."""
    general = functools.partial(forward, spec)
    if spec.add or spec.keep_z or _keeps_statistics(spec):
        return general
    norm_fwd, empty_like = _ext.load().module.norm_fwd, torch.empty_like
    shape, cols = _shape(spec), spec.cols

    def small(x, residual, weight, bias, seed):
        for t in (x, weight, bias):
            if t is not None and not t.is_contiguous():
                return general(x, residual, weight, bias, seed)
        y = empty_like(x)
        norm_fwd(shape, None, x, cols, None, 0, weight, bias, None, y, None)
        return y, None, None

    return small


def backward(
    spec: NormSpec,
    dy: Tensor,
    dz: Tensor | None,
    z: Tensor,
    weight: Tensor | None,
    statistics: Tensor | None,
    seed: Tensor | None,
    wants: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    rows, cols = spec.rows, spec.cols
    module = _ext.load().module
    z_rows, z_stride = rows_of(z, rows, cols)
    dy_rows, dy_stride = rows_of(dy, rows, cols)
    weight = None if weight is None else weight.contiguous()
    dz = None if dz is None else dz.contiguous()
    dx = _empty(z, spec.x_dtype) if wants[0] else None
    dresidual = None
    if wants[0] and spec.add and (spec.dropout_p or spec.x_dtype != spec.dtype):
        dresidual = _empty(z, spec.dtype)
    dweight = dbias = scratch = None
    if wants[1] or wants[2]:
        affine_dtype = spec.dtype if spec.weight_dtype is None else spec.weight_dtype
        dweight = torch.empty(cols, dtype=affine_dtype, device="cpu") if wants[1] else None
        dbias = torch.empty(cols, dtype=affine_dtype, device="cpu") if wants[2] else None
        size = module.norm_bwd_scratch(rows, cols)
        scratch = torch.empty(size, dtype=numerics.compute_dtype(spec.dtype), device="cpu")
    module.norm_bwd(
        _shape(spec),
        seed,
        z_rows,
        z_stride,
        weight,
        statistics,
        dy_rows,
        dy_stride,
        dz,
        dx,
        dresidual,
        dweight,
        dbias,
        scratch,
    )
    return dx, dresidual, dweight, dbias
