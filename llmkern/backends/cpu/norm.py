"""LayerNorm and RMSNorm: csrc/cpu/norm.cpp."""

import torch
from torch import Tensor

from llmkern import random
from llmkern.backends.cpu import _ext
from llmkern.backends.cpu._ext import DTYPE_CODES, address, rows_of
from llmkern.specs import NormSpec


def supports(spec: NormSpec) -> str | None:
    return _ext.unavailable(spec.device)


def _common(spec: NormSpec, seed: Tensor | None) -> tuple:
    code = DTYPE_CODES[spec.dtype]
    weight_code = code if spec.weight_dtype is None else DTYPE_CODES[spec.weight_dtype]
    threshold = random.threshold(spec.dropout_p) if spec.dropout_p else 0
    return (code, weight_code, spec.rows, spec.cols, spec.eps, spec.rms, spec.unit_offset, threshold,
            address(seed))  # fmt: skip


def _contiguous(t: Tensor | None) -> Tensor | None:
    return t if t is None or t.is_contiguous() else t.contiguous()


def _statistics(x: Tensor, size: int) -> Tensor:
    return torch.empty(size, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)


def forward(
    spec: NormSpec,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, cols = spec.rows, spec.cols
    x_rows, x_stride = rows_of(x, rows, cols)
    residual_rows, residual_stride = (None, 0) if residual is None else rows_of(residual, rows, cols)
    weight, bias = _contiguous(weight), _contiguous(bias)
    y = torch.empty(x.shape, dtype=x.dtype)
    z = torch.empty(x.shape if spec.keep_z else 0, dtype=x.dtype)
    mean, rstd = _statistics(x, 0 if spec.rms else rows), _statistics(x, rows)
    _ext.load().module.norm_fwd(
        *_common(spec, seed),
        x_rows.data_ptr(),
        x_stride,
        address(residual_rows),
        residual_stride,
        address(weight),
        address(bias),
        z.data_ptr(),
        y.data_ptr(),
        mean.data_ptr(),
        rstd.data_ptr(),
    )
    return y, z, mean, rstd


def backward(
    spec: NormSpec,
    dy: Tensor,
    dz: Tensor | None,
    z: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    seed: Tensor | None,
    wants: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, cols = spec.rows, spec.cols
    module = _ext.load().module
    z_rows, z_stride = rows_of(z, rows, cols)
    dy_rows, dy_stride = rows_of(dy, rows, cols)
    dz, weight = _contiguous(dz), _contiguous(weight)
    dx = torch.empty(z.shape, dtype=z.dtype)
    dresidual = torch.empty(z.shape if spec.add and spec.dropout_p else 0, dtype=z.dtype)
    like = torch.empty(cols, dtype=z.dtype) if weight is None else weight
    dweight = torch.empty(like.shape if wants[0] else 0, dtype=like.dtype)
    dbias = torch.empty(like.shape if wants[1] else 0, dtype=like.dtype)
    scratch = _statistics(z, module.NORM_BWD_CHUNKS * 2 * cols if wants[0] or wants[1] else 0)
    module.norm_bwd(
        *_common(spec, seed),
        z_rows.data_ptr(),
        z_stride,
        address(weight),
        mean.data_ptr(),
        rstd.data_ptr(),
        dy_rows.data_ptr(),
        dy_stride,
        address(dz),
        dx.data_ptr(),
        dresidual.data_ptr(),
        dweight.data_ptr(),
        dbias.data_ptr(),
        scratch.data_ptr(),
    )
    return dx, dresidual, dweight, dbias
