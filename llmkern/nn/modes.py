"""Modules under a TorchFunctionMode (override, torch.set_default_device, ...).

There every read of a tensor's shape, dtype or device is a call of the mode, about 2 us each, and a
kernel call reads dozens.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch._C import DisableTorchFunction, _len_torch_function_stack


def outside_modes(function: Callable, *args: Any, **kwargs: Any) -> Any:
    """function(*args, **kwargs) without the modes that are on. Only for what calls no user's code.

    Not a decorator: its one wrapper would be the frame that torch.compile starts from in every
    module, and torch counts recompilations by frame.
    """
    if torch.compiler.is_compiling() or not _len_torch_function_stack():
        return function(*args, **kwargs)
    with DisableTorchFunction():
        return function(*args, **kwargs)
