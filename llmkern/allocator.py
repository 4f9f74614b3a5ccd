"""Opt-in tuning of the host allocator.

glibc hands every block above its mmap threshold (32 MiB at most by itself) back to the kernel when
it is freed, so each new large tensor pays page faults for all its pages: for memory-bound ops that
can be most of the time (docs/facts.md). `tune_allocator` keeps such blocks in the process instead.
"""

import ctypes
import sys
from typing import NamedTuple

from llmkern.errors import ArgumentError

# malloc.h
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_DEFAULT_THRESHOLD = 128 * 1024
_LARGEST = 2**31 - 1  # mallopt takes an int


class AllocatorTuning(NamedTuple):
    """Whether glibc took the setting, or why not."""

    applied: bool
    detail: str


def tune_allocator(keep_bytes: int = 1 << 30) -> AllocatorTuning:
    """Keep freed blocks of up to `keep_bytes` in the process instead of returning them to the
    system.

    Affects the whole process: tensors of torch and of llmkern alike. The price is that memory, once
    used, stays with the process. `untune_allocator` sets glibc's static defaults; blocks already
    kept are returned, and glibc's own dynamic adjustment of the threshold stays off until the
    process ends.

    Args:
        keep_bytes: largest block to keep, in bytes, from 128 KiB to 2 GiB - 1.
    """
    if not _DEFAULT_THRESHOLD <= keep_bytes <= _LARGEST:
        raise ArgumentError(
            f"tune_allocator: keep_bytes must be in [{_DEFAULT_THRESHOLD}, {_LARGEST}], "
            f"got {keep_bytes}"
        )
    return _set_thresholds(keep_bytes, _LARGEST)


def untune_allocator() -> AllocatorTuning:
    """Back to glibc's static thresholds of 128 KiB; returns what can be returned to the system."""
    tuning = _set_thresholds(_DEFAULT_THRESHOLD, _DEFAULT_THRESHOLD)
    if tuning.applied:
        ctypes.CDLL(None).malloc_trim(0)
    return tuning


def _set_thresholds(mmap_bytes: int, trim_bytes: int) -> AllocatorTuning:
    if not sys.platform.startswith("linux"):
        return AllocatorTuning(False, f"glibc only; this is {sys.platform}")
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return AllocatorTuning(False, "the C library has no mallopt")
    applied = mallopt(_M_MMAP_THRESHOLD, mmap_bytes) == 1
    applied = mallopt(_M_TRIM_THRESHOLD, trim_bytes) == 1 and applied
    detail = f"blocks of up to {mmap_bytes} bytes stay in the process"
    return AllocatorTuning(applied, detail if applied else "mallopt refused the thresholds")
