"""The torch.library namespace `torch.ops.llmkern` and the choice between its two ways in.

Under torch.compile, fake tensors, dispatch modes, torch.func and tensor subclasses a call goes
through the dispatcher (torch.ops.llmkern.*), which those systems understand. In plain eager mode
that costs about 10 us with gradients, so there the same functions run under torch.autograd.Function
directly (4 us).
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch._C import _len_torch_dispatch_stack
from torch._C._functorch import peek_interpreter_stack
from torch.nn import Parameter

LIBRARY = torch.library.Library("llmkern", "DEF")


def plain_eager(*tensors: Tensor | None) -> bool:
    """True where nothing but ordinary eager mode looks at this call."""
    if torch.compiler.is_compiling():
        return False
    if _len_torch_dispatch_stack() or peek_interpreter_stack() is not None:
        return False
    for tensor in tensors:
        if tensor is not None and type(tensor) is not Tensor and type(tensor) is not Parameter:
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
    LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"llmkern::{name}", fake, lib=LIBRARY)
    if backward is not None:
        torch.library.register_autograd(
            f"llmkern::{name}", backward, setup_context=setup_context, lib=LIBRARY
        )
