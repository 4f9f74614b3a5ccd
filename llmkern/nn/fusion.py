"""When a layer may compute its submodules together instead of calling them, and how.

A submodule is bypassed only if calling it would do nothing but its class's own forward: the exact
type, no hook on it or on all modules, no forward set on the instance. Anything else (a user's
class, an adapter, a quantised or parametrised layer) is called as the module it is.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Module

from llmkern import dispatch, functional, torch_private
from llmkern.nn.activation import GELU, ReLU, SiLU
from llmkern.nn.dropout import Dropout
from llmkern.nn.linear import Linear
from llmkern.nn.modes import outside_modes
from llmkern.nn.norm import LayerNorm, RMSNorm, promotes

LINEARS = (torch.nn.Linear, Linear)
DROPOUTS = (torch.nn.Dropout, Dropout)
LAYER_NORMS = (torch.nn.LayerNorm, LayerNorm)
RMS_NORMS = (torch.nn.RMSNorm, RMSNorm)
_NONE: dict[str, Callable] = {}


def bypassable(module: Module, types: tuple[type[Module], ...]) -> bool:
    """True where not calling `module` but doing what its class does shows no difference."""
    return (
        type(module) in types
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and not module._backward_hooks
        and not module._backward_pre_hooks
        and not torch_private.global_forward_hooks
        and not torch_private.global_forward_pre_hooks
        and not torch_private.global_backward_hooks
        and not torch_private.global_backward_pre_hooks
        and "forward" not in module.__dict__
    )


def ours(layer: Module, kind: type[Module], methods: dict[str, Callable] = _NONE) -> bool:
    """Whether `kind`'s own forward may run for layer.

    False after undo, where somebody has kept the forward and still calls it, and where one of
    torch's `methods`, which that forward does not call, is not what calling it would run: a
    subclass, the instance or a patch of torch's class has its own.
    """
    if not isinstance(layer, kind):
        return False
    cls, own = type(layer), layer.__dict__
    for name, method in methods.items():
        if getattr(cls, name) is not method or name in own:
            return False
    return True


def activation_name(activation: Callable[[Tensor], Tensor]) -> str | None:
    """The name by which `functional.linear` knows an activation; None if it has to be called."""
    if isinstance(activation, Module):
        if bypassable(activation, (torch.nn.ReLU, ReLU)):
            return "relu"
        if bypassable(activation, (torch.nn.SiLU, SiLU)):
            return "silu"
        if bypassable(activation, (torch.nn.GELU, GELU)):
            return "gelu_tanh" if activation.approximate == "tanh" else "gelu"
        return None
    if activation is F.relu or activation is torch.relu:
        return "relu"
    if activation is F.gelu:
        return "gelu"
    if activation is F.silu:
        return "silu"
    if isinstance(activation, functools.partial) and activation.func is F.gelu:
        if not activation.args and activation.keywords == {"approximate": "tanh"}:
            return "gelu_tanh"
    return None


def dropout_probability(dropout: Module) -> float | None:
    """What fraction the module drops now; None if it has to be called."""
    if bypassable(dropout, DROPOUTS):
        return dropout.p if dropout.training else 0.0
    return None


def add_norm(
    y: Tensor, residual: Tensor, dropout: Module, norm: Module, *, prenorm: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """norm(z) with z = residual + dropout(y), in one pass where it may be fused; with prenorm
    (norm(z), z)."""
    p = dropout_probability(dropout)
    if p is None:
        y, p = dropout(y), 0.0
    options = {"dropout_p": p, "prenorm": prenorm}
    if bypassable(norm, LAYER_NORMS) and not dispatch.unserved(y, residual, norm.weight, norm.bias):
        return outside_modes(
            functional.add_layer_norm,
            y,
            residual,
            norm.normalized_shape,
            norm.weight,
            norm.bias,
            norm.eps,
            **options,
        )
    if (
        bypassable(norm, RMS_NORMS)
        and not dispatch.unserved(y, residual, norm.weight)
        and not promotes(residual, norm.weight)
    ):
        return outside_modes(
            functional.add_rms_norm,
            y,
            residual,
            norm.normalized_shape,
            norm.weight,
            norm.eps,
            **options,
        )
    z = residual + (functional.dropout(y, p) if p > 0.0 else y)
    return (norm(z), z) if prenorm else norm(z)


def feed_forward(layer: Module, x: Tensor) -> Tensor:
    """layer.dropout(layer.activation(layer.linear1(x))), in one GEMM where it may be fused."""
    linear = layer.linear1
    name = activation_name(layer.activation)
    if name is None or not _fusable(linear, x):
        return layer.dropout(layer.activation(linear(x)))
    p = dropout_probability(layer.dropout)
    h = outside_modes(
        functional.linear, x, linear.weight, linear.bias, activation=name, dropout_p=p or 0.0
    )
    return layer.dropout(h) if p is None else h


def add_linear(linear: Module, x: Tensor, dropout: Module, residual: Tensor) -> Tensor:
    """residual + dropout(linear(x)), in one GEMM where it may be fused."""
    p = dropout_probability(dropout)
    if p is None or not _fusable(linear, x):
        return residual + dropout(linear(x))
    return outside_modes(
        functional.linear, x, linear.weight, linear.bias, dropout_p=p, residual=residual
    )


def _fusable(linear: Module, x: Tensor) -> bool:
    return (
        bypassable(linear, LINEARS)
        and getattr(linear, "fused_activation", None) is None
        and not dispatch.unserved(x, linear.weight, linear.bias)
    )
