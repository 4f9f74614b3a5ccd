"""LayerNorm and RMSNorm in plain torch; formulas: csrc/include/llmkern/norm.h."""

import torch
from torch import Tensor

from llmkern import numerics, random
from llmkern.specs import NormSpec
from llmkern.torch_private import reshaped_output


def supports(spec: NormSpec) -> str | None:
    return None


def _rows(t: Tensor, spec: NormSpec) -> Tensor:
    return t.reshape(spec.rows, spec.cols).to(numerics.compute_dtype(spec.dtype))


def _scale(weight: Tensor, spec: NormSpec) -> Tensor:
    w = weight.reshape(-1).to(numerics.compute_dtype(spec.dtype))
    return w + 1 if spec.unit_offset else w


def _keep(spec: NormSpec, seed: Tensor) -> Tensor:
    return random.flat_keep_mask(seed, (spec.rows, spec.cols), spec.dropout_p)


def _mean(z: Tensor) -> Tensor:
    """Of each row, as an offset from its first element: exact where all elements are equal. Scaled,
    so that no difference of finite elements overflows. Then as an offset from that, for rows whose
    first element stands far from the others."""
    scale = 2.0**-40
    first = z[:, :1].sum(1)  # 0 without columns
    offset = (z * scale - first[:, None] * scale).mean(1)
    mean = torch.addcmul(first, offset, torch.full_like(offset, 1 / scale))
    rest = (z - mean[:, None]).mean(1)
    return mean + torch.where(rest.isfinite(), rest, 0.0)


def forward(
    spec: NormSpec,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    z = _rows(x, spec)
    if spec.dropout_p > 0.0:
        z = torch.where(_keep(spec, seed), z * random.scale(spec.dropout_p), 0.0)
    if residual is not None:
        # The sum is the stream that the next layer reads: rounded before it is normalised.
        z = (z + _rows(residual, spec)).to(spec.dtype).to(z.dtype)
    mean = _mean(z)
    centred = z if spec.rms else z - mean[:, None]
    rstd = (centred.square().mean(1) + spec.eps).rsqrt()
    y = centred * rstd[:, None]
    if weight is not None:
        y = y * _scale(weight, spec)
    if bias is not None:
        y = y + bias.reshape(-1).to(y.dtype)
    statistics = torch.stack([rstd] if spec.rms else [mean, rstd])
    # Not views: autograd forbids to modify a Function's output where it is one.
    kept = reshaped_output(z.to(spec.dtype), x.shape) if spec.keep_z else None
    return reshaped_output(y.to(spec.dtype), x.shape), kept, statistics


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
    if statistics is None:  # the backend that ran forward computes them again
        alone = spec._replace(add=False, dropout_p=0.0, keep_z=False)
        statistics = forward(alone, z, None, None, None, None)[2]
    d = _rows(dy, spec)
    centred = _rows(z, spec) if spec.rms else _rows(z, spec) - statistics[0, :, None]
    rstd = statistics[-1, :, None]
    xhat = centred * rstd
    affine_dtype = spec.dtype if spec.weight_dtype is None else spec.weight_dtype
    dweight = (d * xhat).sum(0).to(affine_dtype) if wants[1] else None
    dbias = d.sum(0).to(affine_dtype) if wants[2] else None
    if not wants[0]:
        return None, None, dweight, dbias
    g = d if weight is None else d * _scale(weight, spec)
    gradient = g - xhat * (g * xhat).mean(1, keepdim=True)
    if not spec.rms:
        gradient = gradient - g.mean(1, keepdim=True)
    gradient = gradient * rstd
    if dz is not None:
        gradient = gradient + _rows(dz, spec)
    dx = gradient
    if spec.dropout_p > 0.0:
        dx = torch.where(_keep(spec, seed), gradient * random.scale(spec.dropout_p), 0.0)
    dx = dx.to(spec.x_dtype).reshape(z.shape)
    if not spec.add or (spec.dropout_p == 0.0 and spec.x_dtype == spec.dtype):
        return dx, None, dweight, dbias
    return dx, gradient.to(spec.dtype).reshape(z.shape), dweight, dbias
