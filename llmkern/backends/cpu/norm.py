"""LayerNorm and RMSNorm: csrc/cpu/norm.cpp."""

import functools

import torch
from torch import Tensor

from llmkern import numerics, random
from llmkern.backends.cpu import _ext
from llmkern.backends.cpu._ext import DTYPE_CODES, address, rows_of
from llmkern.specs import NormSpec

_FEW_ELEMENTS = 16384  # 64 KiB of float32: backward finds them in the second-level cache again


def supports(spec: NormSpec) -> str | None:
    return _ext.unavailable(spec.device)


@functools.lru_cache(maxsize=4096)
def _described(spec: NormSpec) -> tuple[tuple, torch.dtype]:
    """The leading argument of the bindings, and the dtype of statistics; None where there are
    none: for few elements, computing them again is cheaper than one more tensor."""
    code = DTYPE_CODES[spec.dtype]
    weight_code = code if spec.weight_dtype is None else DTYPE_CODES[spec.weight_dtype]
    threshold = random.threshold(spec.dropout_p) if spec.dropout_p else 0
    shape = (code, DTYPE_CODES[spec.x_dtype], weight_code, spec.rows, spec.cols, spec.eps, spec.rms,
             spec.unit_offset, threshold)  # fmt: skip
    keep = spec.keep_statistics or spec.rows * spec.cols > _FEW_ELEMENTS
    return shape, numerics.compute_dtype(spec.dtype) if keep else None


def _address(t: Tensor | None) -> tuple[Tensor | None, int]:
    """A contiguous form of `t`, to be kept alive during the call, and its address; 0 for None."""
    if t is None:
        return None, 0
    if not t.is_contiguous():
        t = t.contiguous()
    return t, t.data_ptr()


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
    rows = spec.rows
    shape, statistics_dtype = _described(spec)
    x_rows, x_stride = rows_of(x, rows, spec.cols)
    residual_rows, residual_stride = None, 0
    if residual is not None:
        residual_rows, residual_stride = rows_of(residual, rows, spec.cols)
    weight, weight_address = _address(weight)
    bias, bias_address = _address(bias)
    y = _empty(x, spec.dtype)
    z = torch.empty_like(y) if spec.keep_z else None
    # Sizes as arguments, not as a tuple: half the time again.
    statistics = None
    if statistics_dtype is not None:
        statistics = torch.empty(1 if spec.rms else 2, rows, dtype=statistics_dtype, device="cpu")
    _ext.load().module.norm_fwd(
        shape,
        0 if seed is None else seed.data_ptr(),
        x_rows.data_ptr(),
        x_stride,
        0 if residual_rows is None else residual_rows.data_ptr(),
        residual_stride,
        weight_address,
        bias_address,
        0 if z is None else z.data_ptr(),
        y.data_ptr(),
        0 if statistics is None else statistics.data_ptr(),
    )
    return y, z, statistics


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
    weight, weight_address = _address(weight)
    dz, dz_address = _address(dz)
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
        _described(spec)[0],
        address(seed),
        z_rows.data_ptr(),
        z_stride,
        weight_address,
        address(statistics),
        dy_rows.data_ptr(),
        dy_stride,
        dz_address,
        address(dx),
        address(dresidual),
        address(dweight),
        address(dbias),
        address(scratch),
    )
    return dx, dresidual, dweight, dbias
