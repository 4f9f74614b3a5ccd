"""What a module's forward costs before the kernel: reads of parameters, and TorchFunctionModes
(override, torch.set_default_device, ...).

Under a mode every read of a tensor's shape, dtype or device is a call of the mode, about 2 us each,
and a kernel call reads dozens.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from llmkern.torch_private import DisableTorchFunction, len_function_stack


def parameter(module: Module, name: str) -> Tensor | None:
    """module.<name>, past nn.Module.__getattr__, which takes 0.5 us a read.

    A parametrized or pruned weight is an attribute or a property, not a registered parameter; a
    forward reads it once, because a parametrization computes it anew each time.
    """
    if torch.compiler.is_compiling():
        return getattr(module, name)
    registered = module._parameters
    return registered[name] if name in registered else getattr(module, name)


def outside_modes(function: Callable, *args: Any, **kwargs: Any) -> Any:
    """function(*args, **kwargs) without the modes that are on. Only for what calls no user's code.

    Not a decorator: its one wrapper would be the frame that torch.compile starts from in every
    module, and torch counts recompilations by frame.
    """
    if torch.compiler.is_compiling() or not len_function_stack():
        return function(*args, **kwargs)
    with DisableTorchFunction():
        return function(*args, **kwargs)
