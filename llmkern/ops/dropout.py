"""Dropout whose mask is a function of (seed, element index) alone (llmkern/random.py).

The mask is never stored: backward draws it again from the seed, so it costs 8 bytes, and dropout is
its own gradient. Srivastava et al., "Dropout", 2014. Call pattern: ops/norm.py.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from llmkern import checks, dispatch, random
from llmkern.backends.reference import dropout as reference
from llmkern.errors import ArgumentError, ShapeError
from llmkern.ops.library import (
    Plans,
    define,
    direct,
    direct_apply,
    in_transform,
    signature,
    untraced,
)
from llmkern.specs import DropoutSpec


def dropout(
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    backend: str | None = None,
) -> Tensor:
    """Zero elements with probability p and scale the others by 1 / (1 - p).

    Args:
        input: float32, bfloat16, float16 or float64, any shape and strides.
        p: in [0, 1]; met to within 2^-17.
        training: without it, input is returned as it is.
        inplace: write into input.
        backend: name of the backend that must serve, else the best one does.

    Returns:
        A contiguous tensor of input's shape and dtype (input itself with inplace, or where nothing
        is to drop). A dropped element is 0 even where input is Inf or NaN.

    Raises:
        ArgumentError, DtypeError, ShapeError: before anything is allocated or written.
    """
    key = signature(input)
    plan = None
    if key is not None:
        key = (key, p, training, inplace, backend)
        plan = _plans.get(key)
    if plan is None:
        plan = _plan(input, p, training, inplace, backend)
        if key is not None:
            _plans.remember(key, plan)
    if not plan.active:
        return input
    if inplace:
        _check_writable(input)
    seed = random.draw_seed(input.device)
    if key is not None:
        return _run(input, seed, plan)
    if in_transform():
        return reference.forward(plan.spec, input, seed, inplace)
    y = torch.ops.llmkern.dropout(input, seed, p, backend)
    return input.copy_(y) if inplace else y


class _Plan(NamedTuple):
    spec: DropoutSpec
    backend: str | None
    grad: bool  # autograd records the call
    inplace: bool
    active: bool  # there is something to drop


_plans = Plans()


def _plan(x, p, training, inplace, backend) -> _Plan:
    checks.tensor("dropout", "input", x)
    checks.floating("dropout", "input", x)
    checks.probability("dropout", "p", p)
    grad = torch.is_grad_enabled() and x.requires_grad
    active = training and p > 0.0 and x.numel() > 0
    return _Plan(_spec(x, p), backend, grad, inplace, active)


def _spec(x: Tensor, p: float) -> DropoutSpec:
    return DropoutSpec(x.dtype, x.device.type, x.numel(), p)


def _check_writable(x: Tensor) -> None:
    if x.requires_grad and x.is_leaf and torch.is_grad_enabled():
        raise ArgumentError("dropout: input must not be a leaf that requires grad with inplace")
    if any(stride == 0 and size > 1 for size, stride in zip(x.shape, x.stride(), strict=True)):
        raise ShapeError(
            f"dropout: input must not be expanded with inplace, got strides {list(x.stride())}"
        )


def _run(x: Tensor, seed: Tensor, plan: _Plan) -> Tensor:
    if plan.grad:
        return _apply(x, seed, plan)
    return dispatch.resolve("dropout", plan.spec, plan.backend).forward(
        plan.spec, x, seed, plan.inplace
    )


class _DropoutFunction(torch.autograd.Function):
    @staticmethod
    @untraced
    def forward(ctx, x, seed, plan):
        module = dispatch.resolve("dropout", plan.spec, plan.backend)
        if plan.inplace:
            ctx.mark_dirty(x)
        ctx.save_for_backward(seed)
        ctx.plan = plan
        return module.forward(plan.spec, x, seed, plan.inplace)

    @staticmethod
    @untraced
    def backward(ctx, dy):
        plan = ctx.plan
        (seed,) = ctx.saved_tensors
        if not direct(dy):
            return torch.ops.llmkern.dropout(dy, seed, plan.spec.p, plan.backend), None, None
        if torch.is_grad_enabled() and dy.requires_grad:
            return _apply(dy, seed, plan._replace(inplace=False)), None, None
        module = dispatch.resolve("dropout", plan.spec, plan.backend)
        return module.backward(plan.spec, dy, seed), None, None


_apply = direct_apply(_DropoutFunction)


def _forward(x: Tensor, seed: Tensor, p: float, backend: str | None) -> Tensor:
    spec = _spec(x, p)
    return dispatch.resolve("dropout", spec, backend).forward(spec, x, seed, False)


def _fake(x, seed, p, backend):
    dispatch.foresee("dropout", lambda: _spec(x, p), backend)
    return x.new_empty(x.shape)


def _setup_context(ctx, inputs, output) -> None:
    _, seed, ctx.p, ctx.backend = inputs
    ctx.save_for_backward(seed)


def _autograd(ctx, dy):
    (seed,) = ctx.saved_tensors
    return torch.ops.llmkern.dropout(dy, seed, ctx.p, ctx.backend), None, None, None


define(
    "dropout",
    "(Tensor x, Tensor seed, float p, str? backend) -> Tensor",
    _forward,
    _fake,
    _autograd,
    _setup_context,
)
