"""The torch.library namespace `torch.ops.llmkern` and the choice between its two ways in.

Under torch.compile, fake tensors, dispatch modes, tensor subclasses and views that negate lazily a
call goes through the dispatcher (torch.ops.llmkern.*), which those systems understand. In plain
eager mode that costs about 10 us with gradients, so there the same functions run under
torch.autograd.Function directly (4 us).

What a call of an op must find out (are the arguments right, which spec, does autograd record) is
the same for every call with the same signature. ops/norm.py shows the pattern: signature() of the
tensors, a table of plans by signature and options, checks and spec only where the table has none.
"""

from collections.abc import Callable

import torch
from torch import Tensor, is_grad_enabled
from torch.nn import Parameter

from llmkern.errors import BackendError
from llmkern.ops import flops
from llmkern.torch_private import (
    derivative_in_graph,
    forward_levels,
    has_storage,
    len_dispatch_stack,
    peek_interpreter_stack,
)
from llmkern.torch_private import direct_apply as direct_apply  # for the ops
from llmkern.torch_private import untraced as untraced

LIBRARY = torch.library.Library("llmkern", "DEF")


def plain_eager(*tensors: Tensor | None) -> bool:
    """True where nothing but ordinary eager mode looks at this call."""
    if torch.compiler.is_compiling():
        return False
    if len_dispatch_stack():
        flops.tell_counter()
        return False
    if in_transform():
        return False
    for tensor in tensors:
        if tensor is not None and type(tensor) is not Tensor and type(tensor) is not Parameter:
            return False
        if tensor is not None and tensor.is_neg():
            return False
    return True


def in_transform() -> bool:
    """True inside torch.func (grad, vmap, jvp ...) and forward-mode AD, which cannot differentiate
    torch.library ops: there the reference backend's plain torch runs, which all of it understands.
    """
    if torch.compiler.is_compiling():
        return derivative_in_graph()
    return peek_interpreter_stack() is not None or forward_levels._current_level >= 0


def direct(*gradients: Tensor | None) -> bool:
    """True where a backward may hand these gradients to a backend itself: nothing is being compiled
    (dynamo traces the backward of an eager graph too), no dispatch mode is on, and the gradients
    are plain tensors with memory of their own. A batched one (is_grads_batched, vmap) has none.

    Else a backward calls torch.ops.llmkern.*, which tracers, modes, vmap and subclasses understand.
    """
    if torch.compiler.is_compiling() or len_dispatch_stack():
        return False
    for t in gradients:
        if t is not None and (type(t) is not Tensor or not has_storage(t) or t.is_neg()):
            return False
    return True


def wants_grad(*tensors: Tensor | None) -> bool:
    """True where autograd will record a call on these tensors."""
    if not torch.is_grad_enabled():
        return False
    for tensor in tensors:
        if tensor is not None and tensor.requires_grad:
            return True
    return False


def signature(*tensors: Tensor | None) -> tuple | None:
    """What a plan may depend on: the grad mode, and shape, dtype, device, layout and requires_grad
    of each tensor. None where the call is not plain eager, or an argument is no plain tensor or one
    to be negated (z.conj().imag), which the dispatcher materialises."""
    if torch.compiler.is_compiling():
        return None
    if len_dispatch_stack():
        flops.tell_counter()
        return None
    if peek_interpreter_stack() is not None or forward_levels._current_level >= 0:  # in_transform()
        return None
    key: tuple = (is_grad_enabled(),)
    for t in tensors:
        if t is None:
            key += (None,)
            continue
        kind = type(t)
        if (kind is not Tensor and kind is not Parameter) or t.is_neg():
            return None
        try:  # tuples that grow: a list that becomes one at the end takes longer
            key += (t.shape, t.dtype, t.device, t.layout, t.requires_grad)
        except RuntimeError:  # a nested tensor has no shape
            return None
    return key


class Plans(dict):
    """Plans by key; emptied when full, so a stream of new shapes does not grow it for ever."""

    def remember(self, key: tuple, plan: tuple) -> None:
        if len(self) >= 4096:
            self.clear()
        self[key] = plan


def no_second_derivative(op: str) -> Callable:
    """The autograd formula of a backward op: none."""

    def refuse(ctx, *gradients):
        raise BackendError(
            f"{op}: second derivatives need plain eager mode, not torch.compile or dispatch modes"
        )

    return refuse


def define(
    name: str,
    schema: str,
    implementation: Callable,
    fake: Callable,
    backward: Callable | None = None,
    setup_context: Callable | None = None,
) -> None:
    """Define torch.ops.llmkern.<name> with its fake (shape-only) form and its autograd formula."""
    LIBRARY.define(name + schema)
    LIBRARY.impl(name, untraced(implementation), "CompositeExplicitAutograd")
    torch.library.register_fake(f"llmkern::{name}", fake, lib=LIBRARY)
    if backward is not None:
        torch.library.register_autograd(
            f"llmkern::{name}", backward, setup_context=setup_context, lib=LIBRARY
        )
