"""Loads llmkern._C_cpu, or says why not.

The extension leaves its OpenMP symbols undefined. They are resolved from the OpenMP runtime that
torch has mapped (libgomp under any file name, or libiomp5, which has the same entry points), so
there is one thread pool and torch.set_num_threads rules.
"""

import ctypes
import functools
import importlib
import os
import re
import sys
from types import ModuleType
from typing import NamedTuple

import torch

from llmkern.errors import BackendError

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
ISA_VARIABLE = "LLMKERN_CPU_ISA"


class Loaded(NamedTuple):
    """The extension, or None and the reason."""

    module: ModuleType | None
    reason: str | None


def _openmp_runtimes() -> list[str]:
    """Files of the OpenMP runtimes mapped into this process, torch's own first."""
    with open("/proc/self/maps") as maps:
        paths = {line.split(maxsplit=5)[-1].strip() for line in maps if "/" in line}
    found = [p for p in paths if re.match(r"lib(gomp|iomp5|omp)\b", os.path.basename(p))]
    return sorted(found, key=lambda p: ("torch" not in p, p))


def _share_openmp() -> None:
    mapped = _openmp_runtimes() if sys.platform == "linux" else []
    ctypes.CDLL(mapped[0] if mapped else "libgomp.so.1", mode=ctypes.RTLD_GLOBAL)


@functools.cache
def load() -> Loaded:
    """Load once. A broken or missing extension is a reason; a bad LLMKERN_CPU_ISA is an error.

    Raises:
        BackendError: LLMKERN_CPU_ISA names nothing that this build has and this CPU runs.
    """
    try:
        _share_openmp()
        module = importlib.import_module("llmkern._C_cpu")
    except (ImportError, OSError) as error:
        return Loaded(None, f"llmkern._C_cpu does not load: {error}")
    isa = os.environ.get(ISA_VARIABLE)
    if isa is not None:
        if isa not in module.isa_names():
            usable = ", ".join(module.isa_names())
            raise BackendError(f"{ISA_VARIABLE} must be one of {usable} on this CPU, got {isa!r}")
        module.select_isa(isa)
    return Loaded(module, None)


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
