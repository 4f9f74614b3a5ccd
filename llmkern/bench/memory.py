"""Peak memory of one call, read from the operating system and not from an allocator's bookkeeping.

How: free heap pages are given back (malloc_trim), the kernel's high-water mark of resident memory
is reset (writing 5 to /proc/self/clear_refs), the call runs, and VmHWM minus the resident memory
before the call is what the call needed on top of its inputs. Outputs are included. The kernel
counts in batches, so differences below a megabyte are noise.

`peak_of` measures in this process and is for calls that ran before (code pages and library caches
are then already resident). `peak_in_child` does the same in a fresh process forked from a server
that has only imported the libraries, so a call that the kernel kills for want of memory is
reported as such and the run goes on.

Linux only: elsewhere both return None, and nothing is printed for it. On a GPU the device's
allocator keeps the high-water mark, and `peak_on` reads that.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection

import torch

_STATUS = "/proc/self/status"
_CLEAR_REFS = "/proc/self/clear_refs"
_RESET_HIGH_WATER_MARK = "5"  # proc(5), clear_refs


@dataclass(frozen=True)
class ChildPeak:
    """`peak_bytes` of a call run in a child, or the reason why there is none."""

    peak_bytes: int | None
    seconds: float | None = None
    reason: str = ""


def _status_bytes(field: str) -> int:
    with open(_STATUS, encoding="ascii") as status:
        match = re.search(rf"^{field}:\s+(\d+) kB", status.read(), re.MULTILINE)
    assert match is not None, f"{_STATUS} has no {field}"
    return int(match.group(1)) * 1024


def available_bytes() -> int | None:
    """Memory that can still be had without swapping, or None where the system does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as meminfo:
            match = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo.read(), re.MULTILINE)
    except OSError:
        return None
    return int(match.group(1)) * 1024 if match else None


def can_measure() -> bool:
    """Whether the high-water mark can be reset here."""
    return os.access(_CLEAR_REFS, os.W_OK) and os.access(_STATUS, os.R_OK)


def _give_back_free_pages() -> None:
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc; musl has none
    if trim is not None:
        trim(0)


def peak_of(step: Callable[[], object]) -> int | None:
    """Bytes of resident memory that `step()` needed at its worst moment, over the moment before."""
    if not can_measure():
        return None
    _give_back_free_pages()
    with open(_CLEAR_REFS, "w", encoding="ascii") as clear_refs:
        clear_refs.write(_RESET_HIGH_WATER_MARK)
    before = _status_bytes("VmRSS")
    result = step()
    peak = _status_bytes("VmHWM")
    del result
    return max(0, peak - before)


def peak_on(device: torch.device, step: Callable[[], object]) -> int | None:
    """`peak_of` on a CPU; elsewhere the bytes that torch's allocator for `device` gave out at the
    worst moment, over those before, or None where it does not count them."""
    if device.type == "cpu":
        return peak_of(step)
    allocator = torch.get_device_module(device)
    if not hasattr(allocator, "max_memory_allocated"):
        return None
    allocator.reset_peak_memory_stats(device)
    before = allocator.memory_allocated(device)
    result = step()
    peak = allocator.max_memory_allocated(device)
    del result
    return peak - before


def _child(
    connection: Connection,
    prepare: Callable[..., Callable[[], object]],
    warm: tuple,
    args: tuple,
    threads: int,
) -> None:
    import time

    torch.set_num_threads(threads)
    prepare(*warm)()  # small: code pages, thread pool and library caches become resident
    step = prepare(*args)
    seconds = 0.0

    def timed() -> object:
        nonlocal seconds
        start = time.perf_counter()
        result = step()
        seconds = time.perf_counter() - start
        return result

    peak = peak_of(timed)
    connection.send((peak, seconds))
    connection.close()


def peak_in_child(
    prepare: Callable[..., Callable[[], object]],
    warm: tuple,
    args: tuple,
    *,
    threads: int,
    expected_bytes: int = 0,
) -> ChildPeak:
    """Peak of `prepare(*args)()` in a fresh process, after a run of the small `prepare(*warm)()`.

    `prepare` must be importable by name and its arguments picklable. A call expected to need more
    than 80 % of the available memory is not started.
    """
    if not can_measure():
        return ChildPeak(None, reason="this system does not report a resettable high-water mark")
    available = available_bytes()
    if available is not None and expected_bytes > 0.8 * available:
        return ChildPeak(
            None,
            reason=f"not run: would need about {expected_bytes / 2**30:.1f} GiB, "
            f"{available / 2**30:.1f} GiB are available",
        )
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "llmkern", __name__, prepare.__module__])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sender, prepare, warm, args, threads))
    process.start()
    sender.close()
    try:
        peak, seconds = receiver.recv()
    except EOFError:
        process.join()
        return ChildPeak(None, reason=f"the process ended with exit code {process.exitcode}")
    process.join()
    return ChildPeak(peak, seconds)
