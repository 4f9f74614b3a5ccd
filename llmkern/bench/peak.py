"""What this machine can do at most, measured here and now.

Multiply-adds from registers per instruction set and dtype, and bytes moved by reading and copying
a working set of a given size, with the kernels of csrc/cpu/probe.cpp. A peak is the best of several
tries, because interference only ever lowers it. Nothing is taken from a data sheet; where the
compiled extension is missing there are no peaks.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import contextmanager
from types import ModuleType

import torch

_DTYPE_CODES = {"fp32": 0, "bf16": 1, "fp64": 3}  # llmkern::DType
_MOVES = {"read": (0, 1), "copy": (1, 2), "copy stream": (2, 2)}  # ProbeMove, times a byte moves
# Many short tries: one that fits between two time slices of the scheduler is undisturbed.
_TRIES = 40
_TRY_S = 0.002
_SMALLEST_BYTES = 2**15
_LARGEST_BYTES = 2**28
_ALIGNMENT = 64


class Peaks:
    """Measures on first use and remembers, for one extension module or for none."""

    def __init__(self, extension: ModuleType | None) -> None:
        self._extension = extension
        self.flops: dict[str, float] = {}  # "isa dtype threads" -> FLOP/s
        self.bandwidth: dict[str, float] = {}  # "move bytes threads" -> bytes/s

    def flops_per_s(self, dtype: str, threads: int) -> float | None:
        """Peak of the best instruction set. 16-bit types without a dot instruction of their own
        are computed in fp32, and so is their peak."""
        if self._extension is None:
            return None
        isa = self._extension.isa_names()[0]
        if dtype in _DTYPE_CODES:
            found = self.flops_of(isa, dtype, threads)
            if found:
                return found
        return self.flops_of(isa, "fp32", threads)

    def flops_of(self, isa: str, dtype: str, threads: int) -> float:
        """FLOP/s of one instruction set; 0 where it has no such instruction."""
        key = f"{isa} {dtype} {threads}"
        if key not in self.flops:
            self.flops[key] = self._measure_flops(isa, dtype, threads)
        return self.flops[key]

    def bytes_per_s(self, nbytes: float, threads: int) -> float | None:
        """Bandwidth of the faster kind of copy with a working set of the next power of two."""
        if self._extension is None:
            return None
        size = _SMALLEST_BYTES
        while size < min(nbytes, _LARGEST_BYTES):
            size *= 2
        return max(self.bandwidth_of(move, size, threads) for move in ("copy", "copy stream"))

    def bandwidth_of(self, move: str, nbytes: int, threads: int) -> float:
        """bytes/s of "read", "copy" or "copy stream"; a copied byte counts twice."""
        key = f"{move} {nbytes} {threads}"
        if key not in self.bandwidth:
            self.bandwidth[key] = self._measure_bandwidth(move, nbytes, threads)
        return self.bandwidth[key]

    def survey(self, threads: list[int]) -> None:
        """Measure what the report's machine section shows."""
        if self._extension is None:
            return
        for count in threads:
            for isa in self._extension.isa_names():
                for dtype in _DTYPE_CODES:
                    self.flops_of(isa, dtype, count)
            for move in _MOVES:
                for size in (2**18, 2**22, _LARGEST_BYTES):
                    self.bandwidth_of(move, size, count)

    def again(self) -> None:
        """Measure everything once more and keep the better of the two."""
        flops, bandwidth = self.flops, self.bandwidth
        self.flops, self.bandwidth = {}, {}
        for key, before in flops.items():
            isa, dtype, threads = key.split()
            flops[key] = max(before, self.flops_of(isa, dtype, int(threads)))
        for key, before in bandwidth.items():
            move, nbytes, threads = key.rsplit(" ", 2)
            bandwidth[key] = max(before, self.bandwidth_of(move, int(nbytes), int(threads)))
        self.flops, self.bandwidth = flops, bandwidth

    def _measure_flops(self, isa: str, dtype: str, threads: int) -> float:
        assert self._extension is not None
        probe, code = self._extension, _DTYPE_CODES[dtype]
        values = torch.rand(threads * probe.PROBE_VALUES_PER_THREAD, dtype=torch.float64)
        with _selected(probe, isa), _threads(threads):
            return _best_rate(lambda n: probe.probe_fma(code, n, values), start=10_000)

    def _measure_bandwidth(self, move: str, nbytes: int, threads: int) -> float:
        assert self._extension is not None
        probe = self._extension
        code, moves = _MOVES[move]
        lane = _ALIGNMENT // 4
        n = nbytes // 4 // moves // lane * lane
        source, target = _aligned(n), _aligned(max(n, lane * threads))

        def repeat(times: int) -> float:
            probe.probe_move(code, source, target, n, times)
            return float(n * 4 * moves * times)

        with _selected(probe, probe.isa_names()[0]), _threads(threads):
            return _best_rate(repeat, start=1)


def _best_rate(work: Callable[[int], float], start: int) -> float:
    """Highest work(n) / seconds over several tries, with n large enough for the clock."""
    n = start
    while True:
        began = time.perf_counter()
        done = work(n)
        if not done:
            return 0.0
        seconds = time.perf_counter() - began
        if seconds >= _TRY_S:
            break
        n *= 2
    best = done / seconds
    for _ in range(_TRIES):
        began = time.perf_counter()
        done = work(n)
        best = max(best, done / (time.perf_counter() - began))
    return best


def _aligned(n: int) -> torch.Tensor:
    """n initialised floats at a 64-byte boundary."""
    base = torch.ones(n + _ALIGNMENT // 4)
    offset = -base.data_ptr() % _ALIGNMENT // 4
    return base[offset : offset + n]


@contextmanager
def _selected(probe: ModuleType, isa: str):
    before = probe.isa()
    probe.select_isa(isa)
    try:
        yield
    finally:
        probe.select_isa(before)


@contextmanager
def _threads(count: int):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
