"""LayerNorm and RMSNorm: csrc/cuda/norm_fwd.cu, norm_bwd.cu."""

import torch
from torch import Tensor

from llmkern import random
from llmkern.backends.cuda import _ext
from llmkern.backends.cuda._ext import DTYPE_CODES, Launch, contiguous, rows_of, shown
from llmkern.specs import NormSpec


def supports(spec: NormSpec) -> str | None:
    if spec.rows > _ext.INT32_MAX or spec.cols > _ext.MAX_COLS:
        return f"its kernels take up to {_ext.INT32_MAX} rows of {_ext.MAX_COLS}"
    return _ext.refusal(spec.device, spec.dtype, spec.x_dtype, spec.weight_dtype or spec.dtype)


def _shape(spec: NormSpec) -> tuple:
    code = DTYPE_CODES[spec.dtype]
    weight_code = code if spec.weight_dtype is None else DTYPE_CODES[spec.weight_dtype]
    threshold = random.threshold(spec.dropout_p) if spec.dropout_p else 0
    return (code, DTYPE_CODES[spec.x_dtype], weight_code, spec.rows, spec.cols, spec.eps, spec.rms,
            spec.unit_offset, threshold)  # fmt: skip


def _empty(like: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(like.shape, dtype=dtype, device=like.device)


def forward(
    spec: NormSpec,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    x_rows, x_stride = rows_of(x, spec.rows, spec.cols)
    residual_rows, residual_stride = None, 0
    if residual is not None:
        residual_rows, residual_stride = rows_of(residual, spec.rows, spec.cols)
    weight, bias = contiguous(weight), contiguous(bias)
    y = _empty(x, spec.dtype)
    z = _empty(x, spec.dtype) if spec.keep_z else None
    statistics = torch.empty(1 if spec.rms else 2, spec.rows, dtype=torch.float32, device=x.device)
    with Launch(x, spec) as launch:
        launch.norm_fwd(
            _shape(spec),
            shown(seed),
            shown(x_rows),
            x_stride,
            shown(residual_rows),
            residual_stride,
            shown(weight),
            shown(bias),
            shown(z),
            shown(y),
            shown(statistics),
        )
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
    rows, cols = spec.rows, spec.cols
    z_rows, z_stride = rows_of(z, rows, cols)
    dy_rows, dy_stride = rows_of(dy, rows, cols)
    weight, dz = contiguous(weight), contiguous(dz)
    dx = _empty(z, spec.x_dtype) if wants[0] else None
    dresidual = None
    if wants[0] and spec.add and (spec.dropout_p or spec.x_dtype != spec.dtype):
        dresidual = _empty(z, spec.dtype)
    affine_dtype = spec.dtype if spec.weight_dtype is None else spec.weight_dtype
    dweight, dbias = (
        torch.empty(cols, dtype=affine_dtype, device=z.device) if wanted else None
        for wanted in wants[1:]
    )
    with Launch(z, spec) as launch:
        size = launch.module.norm_bwd_scratch(rows, cols) if wants[1] or wants[2] else 0
        scratch = torch.empty(size, dtype=torch.float32, device=z.device)
        launch.norm_bwd(
            _shape(spec),
            shown(seed),
            shown(z_rows),
            z_stride,
            shown(weight),
            shown(statistics),
            shown(dy_rows),
            dy_stride,
            shown(dz),
            shown(dx),
            shown(dresidual),
            shown(dweight),
            shown(dbias),
            shown(scratch),
        )
    return dx, dresidual, dweight, dbias
