"""LayerNorm and RMSNorm, plain and with dropout + residual add in front. Formulas: docs/kernels.md.

Ba et al., "Layer Normalization", 2016; Zhang and Sennrich, "Root Mean Square Layer Normalization",
2019.

The pattern of every op whose calls must cost little. A plain eager call looks its plan up by
signature (ops/library.py); only a new signature is checked and described. Backends give None, not
an empty tensor, for what is not wanted; all statistics are one tensor. Whatever is not plain eager
goes through torch.ops.llmkern.norm, which needs tensors everywhere: _dense makes empty ones.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, is_grad_enabled
from torch.nn import Parameter

from llmkern import dispatch, numerics, random
from llmkern.backends.reference import norm as reference
from llmkern.ops.library import (
    Plans,
    define,
    direct,
    direct_apply,
    in_transform,
    no_second_derivative,
    signature,
    untraced,
)
from llmkern.ops.norm_checks import check
from llmkern.specs import NormSpec
from llmkern.torch_private import (
    forward_levels,
    is_tracing,
    len_dispatch_stack,
    len_function_stack,
    peek_interpreter_stack,
)


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

    eps None is the machine epsilon of the dtype the statistics are computed in, as in torch.
    Everything else is as in `layer_norm`.
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
        input, residual: the same shape [*, *normalized_shape]; one may be 16-bit beside a float32
            one, and the sum and y are then float32.
        dropout_p: probability of an element of input to be dropped, in [0, 1]; ignored unless
            training.
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
    """y = rms_norm(dropout(input) + residual); arguments as in `add_layer_norm`.

    eps is as in `rms_norm`.
    """
    p = dropout_p if training else 0.0
    return _norm("add_rms_norm", input, residual, normalized_shape, weight, None, eps, True,
                 unit_offset, p, prenorm, backend)  # fmt: skip


class _Plan(NamedTuple):
    """What a call needs beyond its tensors."""

    spec: NormSpec
    choice: dispatch.Choice
    grad: bool  # autograd records the call
    prenorm: bool
    dims: tuple[int, ...]  # of weight and bias
    float_residual: bool  # residual is 16-bit and input is not: the sum is computed in float32
    apply: Callable | None = None  # (x, weight, bias) -> y under autograd; None with a residual


_plans = Plans()


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
    if type(normalized_shape) is list:
        normalized_shape = tuple(normalized_shape)
    options = (normalized_shape, eps, rms, unit_offset, dropout_p, prenorm, backend)
    tensors = signature(x, residual, weight, bias)
    plan = None
    if tensors is not None:
        key = (op, tensors, options)
        plan = _plans.get(key)
    if plan is None:
        plan = _plan(op, x, residual, weight, bias, *options)
        if tensors is not None:
            if residual is None:
                plan = plan._replace(apply=_recorded(plan.spec, plan.choice, plan.dims))
            _plans.remember(key, plan)
    spec = plan.spec
    # Outside the CPU, autocast runs norms in float32, as torch's do.
    if spec.device != "cpu" and torch.is_autocast_enabled(spec.device):
        return _in_float32(op, x, residual, weight, bias, *options)
    if plan.float_residual:
        residual = residual.to(x.dtype)
    seed = random.draw_seed(x.device) if spec.dropout_p > 0.0 else None
    if tensors is None and in_transform():
        y, z, _ = reference.forward(spec, x, residual, weight, bias, seed)
        return (y, z) if prenorm else y
    if tensors is None:
        keep_z = residual is not None
        y, z, _ = torch.ops.llmkern.norm(x, residual, weight, bias, seed, spec.cols, spec.eps, rms,
                                         unit_offset, dropout_p, keep_z, backend)  # fmt: skip
        return (y, z) if prenorm else y
    if not plan.grad:
        y, z, _ = plan.choice.forward()(x, residual, weight, bias, seed)
        return (y, z) if prenorm else y
    if plan.apply is not None:
        return plan.apply(x, weight, bias)
    y, z = _apply_add(x, residual, weight, bias, seed, plan)
    return (y, z) if prenorm else y


_KINDS, _strided = frozenset((Tensor, Parameter)), torch.strided
_repeats = Plans()  # as _plans, under keys that take less time to make


def repeat(
    op: str,
    x: Tensor,
    normalized_shape: tuple[int, ...],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float | None,
) -> Tensor | None:
    """A plain norm on the CPU that was called with such arguments before, past every question that
    the earlier call has answered; None where there was none, or someone may be looking on.

    The way in for modules, which ask it before anything else; not while something is compiled.
    """
    if len_function_stack() or len_dispatch_stack() or is_tracing():
        return None
    if peek_interpreter_stack() is not None or forward_levels._current_level >= 0:
        return None
    w, b = x if weight is None else weight, x if bias is None else bias
    # ops.library.signature, written out and for the CPU.
    if type(x) not in _KINDS or type(w) not in _KINDS or type(b) not in _KINDS:
        return None
    if not (x.is_cpu and w.is_cpu and b.is_cpu) or x.is_neg() or w.is_neg() or b.is_neg():
        return None
    if x.layout is not _strided or w.layout is not _strided or b.layout is not _strided:
        return None
    try:
        key = (op, normalized_shape, eps, weight is None, bias is None,
               x.shape, x.dtype, w.shape, w.dtype, b.shape, b.dtype)  # fmt: skip
        plan = _repeats.get(key)
    except (RuntimeError, TypeError):  # a nested tensor has no shape; a list no hash
        return None
    if plan is None:
        options = (normalized_shape, eps, op == "rms_norm", False, 0.0, False, None)
        plan = _plans.get((op, signature(x, None, weight, bias), options))
        if plan is None or not dispatch.has_fused("cpu"):
            return None
        _repeats.remember(key, plan)
    if is_grad_enabled() and (x.requires_grad or w.requires_grad or b.requires_grad):
        return plan.apply(x, weight, bias)
    return plan.choice.forward()(x, None, weight, bias, None)[0]


def _in_float32(op, x, residual, weight, bias, *options) -> Tensor | tuple[Tensor, Tensor]:
    tensors = (None if t is None else t.float() for t in (x, residual, weight, bias))
    shape, eps, rms, unit_offset, dropout_p, prenorm, backend = options
    x, residual, weight, bias = tensors
    with torch.autocast(x.device.type, enabled=False):
        return _norm(op, x, residual, shape, weight, bias, eps, rms, unit_offset, dropout_p,
                     prenorm, backend)  # fmt: skip


def _plan(
    op, x, residual, weight, bias, normalized_shape, eps, rms, unit_offset, dropout_p, prenorm,
    backend
) -> _Plan:  # fmt: skip
    """Check every argument, then describe the call."""
    cols = check(op, x, residual, normalized_shape, weight, bias, eps, dropout_p)
    tensors = [t for t in (x, residual, weight, bias) if t is not None]
    grad = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    dims = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
    float_residual = residual is not None and x.dtype.itemsize > residual.dtype.itemsize
    if eps is None:
        eps = torch.finfo(numerics.compute_dtype(x.dtype)).eps
    keep_z = prenorm or (residual is not None and grad)
    spec = _spec(x, None if float_residual else residual, weight, bias, cols, eps, rms, unit_offset,
                 dropout_p, keep_z)  # fmt: skip
    spec = spec._replace(add=residual is not None, keep_statistics=False)
    choice = dispatch.Choice("norm", spec, backend)
    return _Plan(spec, choice, grad, prenorm, dims, float_residual)


def _spec(x, residual, weight, bias, cols, eps, rms, unit_offset, dropout_p, keep_z) -> NormSpec:
    affine = weight if weight is not None else bias
    rows = x.numel() // cols if cols else x.shape[:1].numel()
    dtype = x.dtype if residual is None else residual.dtype
    return NormSpec(dtype, None if affine is None else affine.dtype, x.device.type, rows, cols, eps,
                    rms, unit_offset, residual is not None, dropout_p, keep_z, x.dtype)  # fmt: skip


def _recorded(spec: NormSpec, choice: dispatch.Choice, dims: tuple[int, ...]) -> Callable:
    """(x, weight, bias) -> y under autograd: a Function of the plan's own, since each argument of
    apply and each attribute of ctx costs a call of microseconds a tenth of one."""

    class NormFunction(torch.autograd.Function):
        @staticmethod
        @untraced
        def forward(ctx, x, weight, bias):
            y, _, statistics = choice.forward()(x, None, weight, bias, None)
            ctx.save_for_backward(x, weight, statistics)
            return y

        @staticmethod
        @untraced
        def backward(ctx, dy):
            x, weight, statistics = ctx.saved_tensors
            dx, _, dweight, dbias = _gradients(
                spec, choice, dims, dy, None, x, weight, statistics, None, ctx.needs_input_grad
            )
            return dx, dweight, dbias

    return direct_apply(NormFunction)


class _AddNormFunction(torch.autograd.Function):
    """(y, z). z is an output even where the caller does not see it: saved, it keeps its place in
    the graph, which the second derivative needs."""

    @staticmethod
    @untraced
    def forward(ctx, x, residual, weight, bias, seed, plan):
        y, z, statistics = plan.choice.forward()(x, residual, weight, bias, seed)
        ctx.plan = plan
        ctx.save_for_backward(z, weight, statistics, seed)
        ctx.set_materialize_grads(False)
        return y, z

    @staticmethod
    @untraced
    def backward(ctx, dy, dz):
        z, weight, statistics, seed = ctx.saved_tensors
        if dy is None:
            if dz is None:
                return (None,) * 6
            dy = torch.zeros_like(z)
        need = ctx.needs_input_grad
        wants = [need[0] or need[1], need[2], need[3]]
        spec, choice, dims = ctx.plan.spec, ctx.plan.choice, ctx.plan.dims
        gradients = _gradients(spec, choice, dims, dy, dz, z, weight, statistics, seed, wants)
        return (*gradients, None, None)


def _gradients(spec, choice, dims, dy, dz, z, weight, statistics, seed, wants):
    """(dx, dresidual, dweight, dbias) of either Function."""
    if torch.is_grad_enabled():
        gradients = _differentiable(spec, dy, dz, z, weight, seed, wants)
    elif direct(dy, dz):
        module = choice.module()
        gradients = module.backward(spec, dy, dz, z, weight, statistics, seed, wants)
    else:
        options = (spec.cols, spec.eps, spec.rms, spec.unit_offset, spec.dropout_p, spec.add,
                   spec.x_dtype, spec.weight_dtype)  # fmt: skip
        gradients = _traced_backward(
            options, choice.backend, dy, dz, z, weight, statistics, seed, wants
        )
    return _as_inputs(gradients, spec.add, dims)


def _traced_backward(options, backend, dy, dz, z, weight, statistics, seed, wants):
    """A backend's backward through the dispatcher; None for what it leaves out."""
    dx, dresidual, dweight, dbias = torch.ops.llmkern.norm_backward(
        dy, dz, z, weight, statistics, seed, *options, wants, backend
    )
    own = dresidual if dresidual.numel() else None
    found = zip((dx, dweight, dbias), wants, strict=True)
    dx, dweight, dbias = (t if wanted else None for t, wanted in found)
    return dx, own, dweight, dbias


_apply_add = direct_apply(_AddNormFunction)


def _as_inputs(gradients, add, dims):
    """(dx, dresidual, dweight, dbias) as the inputs are: with the residual's gradient where it is
    x's, and dims of weight and bias that the backend sees as one."""
    dx, dresidual, dweight, dbias = gradients
    if not add:
        dresidual = None
    elif dresidual is None:
        dresidual = dx
    if len(dims) > 1:
        dweight = None if dweight is None else dweight.reshape(dims)
        dbias = None if dbias is None else dbias.reshape(dims)
    return dx, dresidual, dweight, dbias


def _differentiable(spec, dy, dz, z, weight, seed, wants):
    """The gradients as a graph (create_graph=True): the reference formula, differentiated by torch.

    Views stand for z and weight, so that a weight computed from z is not followed back to z here.
    """
    plain = spec._replace(add=False, dropout_p=0.0, keep_z=False, x_dtype=spec.dtype)
    z, weight = z.view_as(z), None if weight is None else weight.view_as(weight)
    y, _, _ = reference.forward(plain, z, None, weight, None, None)
    inputs = [t for t in (z, weight) if t is not None and t.requires_grad]
    found = iter(torch.autograd.grad(y, inputs, dy, create_graph=True) if inputs else ())
    gradient = next(found) if z.requires_grad else torch.zeros_like(z)
    dweight = dbias = None
    if weight is not None and weight.requires_grad:
        dweight = next(found)
    if wants[2]:
        total = dy.reshape(spec.rows, spec.cols).to(numerics.compute_dtype(dy.dtype)).sum(0)
        dbias = total.to(spec.weight_dtype)
    if dz is not None:
        gradient = gradient + dz
    if spec.dropout_p == 0.0:
        return gradient.to(spec.x_dtype), gradient, dweight, dbias
    keep = random.flat_keep_mask(seed, (spec.rows, spec.cols), spec.dropout_p).reshape(z.shape)
    dx = torch.where(keep, gradient * random.scale(spec.dropout_p), 0.0)
    return dx.to(spec.x_dtype), gradient, dweight, dbias


def _forward(
    x, residual, weight, bias, seed, cols, eps, rms, unit_offset, dropout_p, keep_z, backend
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, z or empty, statistics): [2, rows] mean and rstd, [1, rows] rstd for RMSNorm."""
    spec = _spec(x, residual, weight, bias, cols, eps, rms, unit_offset, dropout_p, keep_z)
    module = dispatch.resolve("norm", spec, backend)
    return _dense(x, *module.forward(spec, x, residual, weight, bias, seed))


def _backward(dy, dz, z, weight, statistics, seed, cols, eps, rms, unit_offset, dropout_p, add,
              x_dtype, affine_dtype, wants, backend):  # fmt: skip
    """(dx, dresidual, dweight [cols], dbias [cols]); empty where `wants` (x or residual, weight,
    bias) leaves it out, and dresidual where it is dx."""
    spec = _spec(z, None, None, None, cols, eps, rms, unit_offset, dropout_p, add)
    spec = spec._replace(add=add, x_dtype=x_dtype, weight_dtype=affine_dtype)
    module = dispatch.resolve("norm", spec, backend)
    return _dense(z, *module.backward(spec, dy, dz, z, weight, statistics, seed, wants))


def _dense(like: Tensor, *outputs: Tensor | None) -> tuple[Tensor, ...]:
    return tuple(like.new_empty(0) if t is None else t for t in outputs)


def _setup_context(ctx, inputs, output) -> None:
    x, residual, weight, bias, seed, cols, eps, rms, unit_offset, dropout_p, _, ctx.backend = inputs
    _, z, statistics = output
    affine = weight if weight is not None else bias
    ctx.save_for_backward(x if residual is None else z, weight, statistics, seed)
    ctx.options = (cols, eps, rms, unit_offset, dropout_p, residual is not None, x.dtype,
                   None if affine is None else affine.dtype)  # fmt: skip
    ctx.dims = () if affine is None else affine.shape
    ctx.set_materialize_grads(False)


def _autograd(ctx, dy, dz, _):
    if dy is None and dz is None:
        return (None,) * 12
    z, weight, statistics, seed = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(z)
    need, add = ctx.needs_input_grad, ctx.options[5]
    wants = [need[0] or need[1], need[2], need[3]]
    found = _traced_backward(ctx.options, ctx.backend, dy, dz if add else None, z, weight,
                             statistics, seed, wants)  # fmt: skip
    dx, dresidual, dweight, dbias = _as_inputs(found, add, ctx.dims)
    return (dx if need[0] else None, dresidual if need[1] else None, dweight, dbias, *(None,) * 8)


def _fake(x, residual, weight, bias, seed, cols, eps, rms, unit_offset, dropout_p, keep_z, backend):
    options = (cols, eps, rms, unit_offset, dropout_p, keep_z)
    dispatch.foresee("norm", lambda: _spec(x, residual, weight, bias, *options), backend)
    rows = x.numel() // cols if cols else x.shape[:1].numel()
    z = x if residual is None else residual
    statistics = x.new_empty((1 if rms else 2, rows), dtype=numerics.compute_dtype(z.dtype))
    return z.new_empty(x.shape), z.new_empty(x.shape if keep_z else (0,)), statistics


def _fake_backward(dy, dz, z, weight, statistics, seed, cols, eps, rms, unit_offset, dropout_p, add,
                   x_dtype, affine_dtype, wants, backend):  # fmt: skip
    own = add and wants[0] and (dropout_p > 0.0 or x_dtype != z.dtype)
    affine = z.dtype if affine_dtype is None else affine_dtype
    return (
        z.new_empty(z.shape if wants[0] else (0,), dtype=x_dtype if wants[0] else None),
        z.new_empty(z.shape if own else (0,)),
        z.new_empty((cols,) if wants[1] else (0,), dtype=affine if wants[1] else None),
        z.new_empty((cols,) if wants[2] else (0,), dtype=affine if wants[2] else None),
    )


_OPTIONS = "SymInt cols, float eps, bool rms, bool unit_offset, float dropout_p, "
define(
    "norm",
    "(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? seed, "
    f"{_OPTIONS}bool keep_z, str? backend) -> (Tensor, Tensor, Tensor)",
    _forward,
    _fake,
    _autograd,
    _setup_context,
)
define(
    "norm_backward",
    "(Tensor dy, Tensor? dz, Tensor z, Tensor? weight, Tensor? statistics, Tensor? seed, "
    f"{_OPTIONS}bool add, ScalarType x_dtype, ScalarType? affine_dtype, bool[] wants, "
    "str? backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
    no_second_derivative("norm"),
)
