"""Loads llmkern._C_cpu, or says why not, and gives it torch's threads (_threads.py)."""

import functools
import importlib
import os
from types import ModuleType
from typing import NamedTuple

import torch

from llmkern.backends.cpu import _threads
from llmkern.errors import BackendError

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
ISA_VARIABLE = "LLMKERN_CPU_ISA"


class Loaded(NamedTuple):
    """The extension, or None and the reason; why kernels run on one thread, if they must."""

    module: ModuleType | None
    reason: str | None
    serial: str | None = None


@functools.cache
def load() -> Loaded:
    """Load once. A broken or missing extension is a reason; a bad LLMKERN_CPU_ISA is an error.

    Raises:
        BackendError: LLMKERN_CPU_ISA names nothing that this build has and this CPU runs.
    """
    try:
        module = importlib.import_module("llmkern._C_cpu")
    except ImportError as error:
        return Loaded(None, f"llmkern._C_cpu does not load: {error}")
    threads = _threads.find()
    module.use_threads(threads.entries, torch.get_num_threads)
    isa = os.environ.get(ISA_VARIABLE)
    if isa is not None:
        if isa not in module.isa_names():
            usable = ", ".join(module.isa_names())
            raise BackendError(f"{ISA_VARIABLE} must be one of {usable} on this CPU, got {isa!r}")
        module.select_isa(isa)
    return Loaded(module, None, threads.reason)


def unavailable(device: str) -> str | None:
    """Why the backend cannot serve tensors on `device` at all; None if it can."""
    if device != "cpu":
        return f"it serves CPU tensors, not {device}"
    return load().reason


def rows_of(t: torch.Tensor, rows: int, cols: int) -> tuple[torch.Tensor, int]:
    """`t` as [rows, cols] with column stride 1, and its row stride; a copy only if no view can."""
    if t.is_contiguous():
        return t, cols
    flat = t.reshape(rows, cols)
    if flat.stride(1) != 1 and cols > 1:
        flat = flat.contiguous()
    return flat, flat.stride(0)


def plane_of(t: torch.Tensor) -> tuple[torch.Tensor, int, int, int]:
    """`t` as rows with column stride 1: (tensor, rows, cols, row stride).

    A contiguous tensor is one row. A copy where no view can, or where rows would be short.
    """
    if not t.is_contiguous() and t.dim() and t.shape[-1] >= 64 and t.stride(-1) == 1:
        flat = t.reshape(-1, t.shape[-1])
        if not flat.is_contiguous():
            return flat, flat.shape[0], flat.shape[1], flat.stride(0)
    return t.contiguous(), 1, t.numel(), t.numel()
