"""LayerNorm and RMSNorm, plain and with dropout + residual add in front. Formulas: docs/kernels.md.

Ba et al., "Layer Normalization", 2016; Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from llmkern import checks, dispatch, numerics, random
from llmkern.errors import ArgumentError, ShapeError
from llmkern.ops.library import define, plain_eager, wants_grad
from llmkern.specs import NormSpec


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int] | int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    unit_offset: bool = False,
    backend: str | None = None,
) -> Tensor:
    """y = (x - mean) / sqrt(var + eps) * weight + bias over the trailing `normalized_shape` dims.

    Args:
        input: [*, *normalized_shape]; float32, bfloat16, float16 or float64, any strides.
        weight, bias: [*normalized_shape]; the dtype of input, or float32 with a 16-bit input.
        unit_offset: scale by (weight + 1).
        backend: name of the backend that must serve, else the best one does.

    Returns:
        A tensor of input's shape and dtype. Statistics are kept in float32 (float64 for float64).

    Raises:
        ShapeError, DtypeError, DeviceError, ArgumentError: before anything is allocated.
    """
    return _norm("layer_norm", input, None, normalized_shape, weight, bias, eps, False,
                 unit_offset, 0.0, False, backend)  # fmt: skip


def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int] | int,
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    unit_offset: bool = False,
    backend: str | None = None,
) -> Tensor:
    """y = x / sqrt(mean(x^2) + eps) * weight over the trailing `normalized_shape` dims.

    eps None is the machine epsilon of the dtype the statistics are computed in, as in torch. Everything
    else is as in `layer_norm`.
    """
    return _norm("rms_norm", input, None, normalized_shape, weight, None, eps, True,
                 unit_offset, 0.0, False, backend)  # fmt: skip


def add_layer_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int] | int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    dropout_p: float = 0.0,
    training: bool = True,
    prenorm: bool = False,
    unit_offset: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """y = layer_norm(dropout(input) + residual).

    Args:
        input, residual: the same shape [*, *normalized_shape]; a 16-bit input may meet a float32 residual,
            and the sum is then float32.
        dropout_p: probability of an element of input to be dropped, in [0, 1]; ignored unless training.
        prenorm: also return the new residual stream, dropout(input) + residual.

    Returns:
        y, or (y, new_residual) with prenorm.
    """
    p = dropout_p if training else 0.0
    return _norm("add_layer_norm", input, residual, normalized_shape, weight, bias, eps, False,
                 unit_offset, p, prenorm, backend)  # fmt: skip


def add_rms_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int] | int,
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    dropout_p: float = 0.0,
    training: bool = True,
    prenorm: bool = False,
    unit_offset: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """y = rms_norm(dropout(input) + residual); arguments as in `add_layer_norm`, eps as in `rms_norm`."""
    p = dropout_p if training else 0.0
    return _norm("add_rms_norm", input, residual, normalized_shape, weight, None, eps, True,
                 unit_offset, p, prenorm, backend)  # fmt: skip


def _norm(
    op: str,
    x: Tensor,
    residual: Tensor | None,
    normalized_shape: Sequence[int] | int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float | None,
    rms: bool,
    unit_offset: bool,
    dropout_p: float,
    prenorm: bool,
    backend: str | None,
) -> Tensor | tuple[Tensor, Tensor]:
    cols = _check(op, x, residual, normalized_shape, weight, bias, eps, dropout_p)
    if residual is not None and residual.dtype != x.dtype:
        dtype = torch.promote_types(x.dtype, residual.dtype)
        x, residual = x.to(dtype), residual.to(dtype)
    if eps is None:
        eps = torch.finfo(numerics.compute_dtype(x.dtype)).eps
    seed = random.draw_seed(x.device) if dropout_p > 0.0 else None
    grad = wants_grad(x, residual, weight, bias)
    keep_z = prenorm or (residual is not None and grad)
    args = (x, residual, weight, bias, seed, cols, eps, rms, unit_offset, dropout_p, keep_z, backend)
    if not plain_eager(x, residual, weight, bias):
        y, z, _, _ = torch.ops.llmkern.norm(*args)
    elif grad:
        y, z = _NormFunction.apply(*args)
    else:
        y, z, _, _ = _forward(*args)
    return (y, z) if prenorm else y


def _check(op, x, residual, normalized_shape, weight, bias, eps, dropout_p) -> int:
    """Raise on bad arguments; return the number of normalised elements of a row."""
    checks.tensor(op, "input", x)
    checks.floating(op, "input", x)
    if isinstance(normalized_shape, int):
        normalized_shape = (normalized_shape,)
    dims = len(normalized_shape)
    if dims == 0 or x.dim() < dims or tuple(x.shape[-dims:]) != tuple(normalized_shape):
        raise ShapeError(
            f"{op}: input must end in normalized_shape {list(normalized_shape)}, got {list(x.shape)}"
        )
    if eps is not None and not eps >= 0.0:
        raise ArgumentError(f"{op}: eps must be >= 0, got {eps}")
    checks.probability(op, "dropout_p", dropout_p)
    for name, value in (("weight", weight), ("bias", bias)):
        if value is None:
            continue
        checks.tensor(op, name, value)
        if tuple(value.shape) != tuple(normalized_shape):
            checks.shape(op, name, value, normalized_shape, "normalized_shape of input")
        checks.same_device(op, name, value, x)
        if value.dtype != x.dtype:
            half = x.dtype in (torch.bfloat16, torch.float16)
            allowed = (x.dtype, torch.float32) if half else (x.dtype,)
            checks.dtype_in(op, name, value, allowed, "input's, or float32 for a 16-bit input")
    if weight is not None and bias is not None and weight.dtype != bias.dtype:
        checks.dtype_in(op, "bias", bias, (weight.dtype,), "as weight")
    if residual is not None:
        checks.tensor(op, "residual", residual)
        checks.floating(op, "residual", residual)
        checks.shape(op, "residual", residual, x.shape, "the shape of input")
        checks.same_device(op, "residual", residual, x)
    cols = 1
    for size in normalized_shape:
        cols *= size
    return cols


def _spec(x, residual, weight, bias, cols, eps, rms, unit_offset, dropout_p, keep_z) -> NormSpec:
    affine = weight if weight is not None else bias
    rows = x.numel() // cols if cols else x.shape[:1].numel()
    return NormSpec(x.dtype, None if affine is None else affine.dtype, x.device.type, rows, cols, eps,
                    rms, unit_offset, residual is not None, dropout_p, keep_z)  # fmt: skip


def _forward(
    x, residual, weight, bias, seed, cols, eps, rms, unit_offset, dropout_p, keep_z, backend
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, z, mean, rstd); z is empty unless keep_z, mean is empty for RMSNorm."""
    spec = _spec(x, residual, weight, bias, cols, eps, rms, unit_offset, dropout_p, keep_z)
    module = dispatch.resolve("norm", spec, backend)
    return module.forward(spec, x, residual, weight, bias, seed)


def _backward(
    dy, dz, z, weight, mean, rstd, seed, cols, eps, rms, unit_offset, dropout_p, add, wants, backend
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx, dresidual, dweight, dbias); what `wants` (weight, bias) leaves out is empty. dresidual is empty
    where it equals dx."""
    spec = _spec(z, dy if add else None, weight, None, cols, eps, rms, unit_offset, dropout_p, False)
    module = dispatch.resolve("norm", spec, backend)
    return module.backward(spec, dy, dz, z, weight, mean, rstd, seed, wants)


class _NormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, bias, seed, cols, eps, rms, unit_offset, dropout_p, keep_z,
                backend):  # fmt: skip
        y, z, mean, rstd = _forward(
            x, residual, weight, bias, seed, cols, eps, rms, unit_offset, dropout_p, keep_z, backend
        )
        _save(ctx, x, residual, weight, bias, seed, z, mean, rstd)
        ctx.options = (cols, eps, rms, unit_offset, dropout_p, residual is not None)
        ctx.backend = backend
        ctx.set_materialize_grads(False)
        return y, z

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, dz):
        return _gradients(ctx, dy, dz, _backward)


def _save(ctx, x, residual, weight, bias, seed, z, mean, rstd) -> None:
    ctx.save_for_backward(x if residual is None else z, weight, mean, rstd, seed)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _gradients(ctx, dy, dz, backward):
    """Gradients in the order of the op's arguments, from ctx as `_save` left it."""
    if dy is None and dz is None:
        return (None,) * 12
    z, weight, mean, rstd, seed = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(z)
    wants = [ctx.needs_input_grad[2], ctx.needs_input_grad[3]]
    add = ctx.options[-1]
    dx, dresidual, dweight, dbias = backward(
        dy, dz if add else None, z, weight, mean, rstd, seed, *ctx.options, wants, ctx.backend
    )
    if add and dresidual.numel() == 0:
        dresidual = dx
    if wants[1] and dbias.dtype != ctx.bias_dtype:
        dbias = dbias.to(ctx.bias_dtype)
    return (dx, dresidual if add else None, dweight if wants[0] else None, dbias if wants[1] else None,
            None, None, None, None, None, None, None, None)  # fmt: skip


def _setup_context(ctx, inputs, output):
    x, residual, weight, bias, seed, *options = inputs
    _, z, mean, rstd = output
    _save(ctx, x, residual, weight, bias, seed, z, mean, rstd)
    cols, eps, rms, unit_offset, dropout_p, _, ctx.backend = options
    ctx.options = (cols, eps, rms, unit_offset, dropout_p, residual is not None)
    ctx.set_materialize_grads(False)


def _autograd(ctx, dy, dz, _dmean, _drstd):
    return _gradients(ctx, dy, dz, torch.ops.llmkern.norm_backward)


def _statistics(x: Tensor, cols: int, rms: bool) -> tuple[Tensor, Tensor]:
    rows = x.numel() // cols if cols else x.shape[:1].numel()
    dtype = numerics.compute_dtype(x.dtype)
    return x.new_empty(0 if rms else rows, dtype=dtype), x.new_empty(rows, dtype=dtype)


def _fake(x, residual, weight, bias, seed, cols, eps, rms, unit_offset, dropout_p, keep_z, backend):
    mean, rstd = _statistics(x, cols, rms)
    y = x.new_empty(x.shape)
    return y, x.new_empty(x.shape if keep_z else (0,)), mean, rstd


def _fake_backward(
    dy, dz, z, weight, mean, rstd, seed, cols, eps, rms, unit_offset, dropout_p, add, wants, backend
):
    dtype = z.dtype if weight is None else weight.dtype
    shape = z.shape[-1:] if weight is None else weight.shape
    dweight = z.new_empty(shape if wants[0] else (0,), dtype=dtype)
    dbias = z.new_empty(shape if wants[1] else (0,), dtype=dtype)
    dresidual = z.new_empty(z.shape if add and dropout_p > 0.0 else (0,))
    return z.new_empty(z.shape), dresidual, dweight, dbias


_OPTIONS = "int cols, float eps, bool rms, bool unit_offset, float dropout_p, "
define(
    "norm",
    "(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? seed, "
    + _OPTIONS
    + "bool keep_z, str? backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _fake,
    _autograd,
    _setup_context,
)
define(
    "norm_backward",
    "(Tensor dy, Tensor? dz, Tensor z, Tensor? weight, Tensor mean, Tensor rstd, Tensor? seed, "
    + _OPTIONS
    + "bool add, bool[] wants, str? backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)
