"""Where Triton kernels can run, and for which architecture.

CUDA tensors run on their card. CPU tensors run only where something executes the kernels without
one: Triton's interpreter (TRITON_INTERPRET=1 when the kernels are first imported) or
llmkern.emulator.device.
"""

import contextlib
import functools
import importlib.metadata
import os
from collections.abc import Callable
from typing import NamedTuple

import torch

from llmkern import target

OLDEST = 80  # compute capability * 10: bf16 mma and cp.async
INTERPRETED = 80  # tiles under the interpreter are those of sm_80


class Compilation(NamedTuple):
    """One way a kernel is compiled, for looking at its code without a card.

    Each <op>.py has `compilations(capability) -> Iterator[Compilation]`: every kernel of the op, in
    the forms that an ordinary model uses.
    """

    name: str  # the kernel and what sets this form apart: "norm_fwd 4096 bf16"
    kernel: Callable  # () -> the JITFunction, so that naming it imports no kernel
    signature: dict[str, str]  # each argument's Triton type, "constexpr" for those in constexprs
    constexprs: dict[str, object]
    num_warps: int
    num_stages: int
    divisible: tuple[str, ...] = ()  # arguments that are multiples of 16
    fuse: bool = True  # whether a product and a sum may become one fma


def compilation(
    name: str,
    kernel: Callable,
    types: dict[str, str | None],
    flags: dict[str, object],
    num_warps: int,
    divisible: tuple[str, ...] = (),
) -> Compilation:
    """`types` names the kernel's arguments in their order, None for one that is not passed;
    `flags` the constexprs, which come last. Pointers are taken to be multiples of 16."""
    signature = {name: kind or "constexpr" for name, kind in types.items()}
    signature |= dict.fromkeys(flags, "constexpr")
    absent = {name: None for name, kind in types.items() if kind is None}
    pointers = tuple(name for name, kind in signature.items() if kind.startswith("*"))
    return Compilation(
        name, kernel, signature, absent | flags, num_warps, 1, pointers + tuple(divisible)
    )


@functools.cache
def version() -> str | None:
    """Triton's version, or None where it is not installed."""
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def interpreted() -> bool:
    """True where Triton's interpreter runs the kernels; fixed at the first launch."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def unavailable(device: str) -> str | None:
    """Why the backend cannot serve tensors on `device` at all; None if it can."""
    if version() is None:
        return "triton is not installed"
    if device == "cuda" or (device == "cpu" and (target.emulated() or interpreted())):
        return None
    return f"it serves cuda tensors, and {device} ones only under llmkern.emulator.device"


def unsupported(dtype: torch.dtype) -> str | None:
    """Why no kernel takes the dtype; None if it does."""
    return "its kernels compute in float32, not in float64" if dtype == torch.float64 else None


def capability(device: torch.device) -> int:
    """Compute capability (major * 10 + minor) that a launch on `device` compiles for."""
    if device.type == "cuda":
        return _of_card(device.index)
    return target.emulated() or INTERPRETED


@functools.cache
def _of_card(index: int | None) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return major * 10 + minor


def guard(device: torch.device) -> contextlib.AbstractContextManager:
    """Makes `device` the current one for a launch: Triton launches on the current device."""
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        return torch.cuda.device(device)
    return contextlib.nullcontext()
