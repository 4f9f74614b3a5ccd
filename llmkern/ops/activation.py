"""GELU (exact and tanh), ReLU and SiLU. Formulas: csrc/include/llmkern/activation.h.

They hold at the ends, where torch's give NaN: gelu and silu are 0 at -inf, derivatives are 0 and 1.
Call pattern: ops/norm.py.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from llmkern import checks, dispatch
from llmkern.backends.reference import activation as reference
from llmkern.errors import ArgumentError, ShapeError
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
from llmkern.specs import ActivationSpec


def gelu(input: Tensor, approximate: str = "none", *, backend: str | None = None) -> Tensor:
    """x * Phi(x), or with approximate="tanh" its tanh form.

    Args:
        input: float32, bfloat16, float16 or float64, any shape and strides.
        backend: name of the backend that must serve, else the best one does.

    Returns:
        A tensor of input's shape and dtype, rounded once.

    Raises:
        ArgumentError, DtypeError: before anything is allocated.
    """
    checks.one_of("gelu", "approximate", approximate, ("none", "tanh"))
    return _activation(input, "gelu" if approximate == "none" else "gelu_tanh", False, backend)


def relu(input: Tensor, inplace: bool = False, *, backend: str | None = None) -> Tensor:
    """max(x, 0); NaN stays NaN. Backward keeps the output, not the input."""
    return _activation(input, "relu", inplace, backend)


def silu(input: Tensor, inplace: bool = False, *, backend: str | None = None) -> Tensor:
    """x / (1 + e^-x)."""
    return _activation(input, "silu", inplace, backend)


class _Plan(NamedTuple):
    spec: ActivationSpec
    backend: str | None
    grad: bool  # autograd records the call
    inplace: bool


_plans = Plans()


def _activation(x: Tensor, name: str, inplace: bool, backend: str | None) -> Tensor:
    key = signature(x)
    plan = None
    if key is not None:
        key = (key, name, inplace, backend)
        plan = _plans.get(key)
    if plan is None:
        plan = _plan(x, name, inplace, backend)
        if key is not None:
            _plans.remember(key, plan)
    if inplace:
        _check_writable(name, x)
    if key is None:
        if in_transform():
            return reference.forward(plan.spec, x, inplace)
        y = torch.ops.llmkern.activation(x, name, backend)
        return x.copy_(y) if inplace else y
    if plan.grad:
        return _apply(x, plan)
    module = dispatch.resolve("activation", plan.spec, plan.backend)
    return module.forward(plan.spec, x, inplace)


def _plan(x, name, inplace, backend) -> _Plan:
    op = "gelu" if name == "gelu_tanh" else name
    checks.tensor(op, "input", x)
    checks.floating(op, "input", x)
    grad = torch.is_grad_enabled() and x.requires_grad
    return _Plan(_spec(x, name), backend, grad, inplace)


def _spec(x: Tensor, name: str) -> ActivationSpec:
    return ActivationSpec(x.dtype, x.device.type, x.numel(), name)


def _check_writable(op: str, x: Tensor) -> None:
    if x.requires_grad and x.is_leaf and torch.is_grad_enabled():
        raise ArgumentError(f"{op}: input must not be a leaf that requires grad with inplace")
    if any(stride == 0 and size > 1 for size, stride in zip(x.shape, x.stride(), strict=True)):
        raise ShapeError(
            f"{op}: input must not be expanded with inplace, got strides {list(x.stride())}"
        )


class _ActivationFunction(torch.autograd.Function):
    @staticmethod
    @untraced
    def forward(ctx, x, plan):
        spec = plan.spec
        module = dispatch.resolve("activation", spec, plan.backend)
        ctx.plan = plan
        if plan.inplace:
            ctx.mark_dirty(x)
        if spec.activation == "relu":
            y = module.forward(spec, x, plan.inplace)
            ctx.save_for_backward(y)
            return y
        ctx.save_for_backward(x.clone() if plan.inplace else x)
        return module.forward(spec, x, plan.inplace)

    @staticmethod
    @untraced
    def backward(ctx, dy):
        spec = ctx.plan.spec
        (x,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _differentiable(spec.activation, dy, x), None
        backend = ctx.plan.backend
        if not direct(dy):
            return torch.ops.llmkern.activation_backward(dy, x, spec.activation, backend), None
        return dispatch.resolve("activation", spec, backend).backward(spec, dy, x), None


_apply = direct_apply(_ActivationFunction)


def _differentiable(activation: str, dy: Tensor, x: Tensor) -> Tensor:
    """dy * f'(x) in torch's ops, which have derivatives themselves."""
    if activation == "relu":
        return torch.ops.aten.threshold_backward(dy, x, 0.0)
    if activation == "silu":
        sigmoid = torch.sigmoid(x)
        return dy * (sigmoid * (1 + x * (1 - sigmoid)))
    approximate = "tanh" if activation == "gelu_tanh" else "none"
    return torch.ops.aten.gelu_backward(dy, x, approximate=approximate)


def _forward(x: Tensor, activation: str, backend: str | None) -> Tensor:
    spec = _spec(x, activation)
    return dispatch.resolve("activation", spec, backend).forward(spec, x, False)


def _backward(dy: Tensor, x: Tensor, activation: str, backend: str | None) -> Tensor:
    spec = _spec(x, activation)
    return dispatch.resolve("activation", spec, backend).backward(spec, dy, x)


def _setup_context(ctx, inputs, output) -> None:
    x, ctx.activation, ctx.backend = inputs
    ctx.save_for_backward(output if ctx.activation == "relu" else x)


def _autograd(ctx, dy):
    (x,) = ctx.saved_tensors
    return torch.ops.llmkern.activation_backward(dy, x, ctx.activation, ctx.backend), None, None


def _fake(x, activation, backend):
    dispatch.foresee("activation", lambda: _spec(x, activation), backend)
    y = torch.empty_like(x)
    return y if y.stride() == x.stride() else x.new_empty(x.shape)


def _fake_backward(dy, x, activation, backend):
    dx = torch.empty_like(x)
    return dx if dx.stride() == x.stride() == dy.stride() else x.new_empty(x.shape)


define(
    "activation",
    "(Tensor x, str activation, str? backend) -> Tensor",
    _forward,
    _fake,
    _autograd,
    _setup_context,
)
define(
    "activation_backward",
    "(Tensor dy, Tensor x, str activation, str? backend) -> Tensor",
    _backward,
    _fake_backward,
    no_second_derivative("activation"),
)
