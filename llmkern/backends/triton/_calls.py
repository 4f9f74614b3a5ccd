"""A kernel launch as data: what would be launched can be run, or compiled without a card."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from llmkern.backends.triton import _launch

_POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
}


class Call(NamedTuple):
    """One launch."""

    kernel: Callable  # () -> the JITFunction
    grid: tuple[int, ...]
    arguments: dict[str, object]  # tensors, numbers, None for what is absent
    constexprs: dict[str, object]
    num_warps: int
    num_stages: int


def run(calls: list[Call], device: torch.device) -> None:
    """Launch them in order on `device`."""
    with _launch.guard(device):
        for call in calls:
            call.kernel()[call.grid](
                **call.arguments,
                **call.constexprs,
                num_warps=call.num_warps,
                num_stages=call.num_stages,
            )


def compilation(name: str, call: Call, unspecialized: tuple[str, ...] = ()) -> _launch.Compilation:
    """What Triton would compile for the call: 1 and None become constants, multiples of 16 are
    noted, but for the arguments that the kernel asks not to specialise."""
    signature, constexprs, divisible = {}, dict(call.constexprs), []
    for argument, value in call.arguments.items():
        free = argument in unspecialized
        if isinstance(value, Tensor):
            signature[argument] = _POINTERS[value.dtype]
            divisible.append(argument)  # torch allocates at multiples of 512 bytes or so
        elif value is None or (value == 1 and isinstance(value, int) and not free):
            constexprs[argument] = value
        elif isinstance(value, float):
            signature[argument] = "fp32"
        else:
            signature[argument] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and not free:
                divisible.append(argument)
    signature |= dict.fromkeys(constexprs, "constexpr")
    return _launch.Compilation(
        name, call.kernel, signature, constexprs, call.num_warps, call.num_stages, tuple(divisible)
    )
