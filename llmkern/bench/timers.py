"""Timing of several variants of one computation against each other.

The variants take turns, call by call (or in groups of calls when one call is shorter than the
clock can resolve), so that a noisy neighbour, a frequency change or a cold cache hits all of them
alike. What is reported is the median of the samples and their quartiles.

On a CPU the wall clock is read before and after the calls. On a GPU, where a call returns before
its work is done, the device's own clock is: two events in the stream, one before and one after.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

Step = Callable[[], object]

# One sample lasts at least this long: a hundred times what reading the clock twice costs.
MIN_SAMPLE_NS = 200_000
CALIBRATION_CALLS = 5


@dataclass(frozen=True)
class Timing:
    """Microseconds per call: median and quartiles over `samples` groups of `calls` calls."""

    median_us: float
    p25_us: float
    p75_us: float
    min_us: float
    samples: int
    calls: int

    @property
    def spread(self) -> float:
        """Half the interquartile range as a share of the median."""
        return 0.5 * (self.p75_us - self.p25_us) / self.median_us if self.median_us else 0.0


Sampler = Callable[[Step, int], float]  # nanoseconds that so many calls of a step take


def sampler(device: torch.device) -> Sampler:
    """The way to time calls on `device`."""
    return wall_clock(time.perf_counter_ns) if device.type == "cpu" else events(device)


def wall_clock(clock_ns: Callable[[], int]) -> Sampler:
    def sample(step: Step, calls: int) -> float:
        start = clock_ns()
        for _ in range(calls):
            step()
        return clock_ns() - start

    return sample


def events(device: torch.device) -> Sampler:
    """Time between two events in the current stream of `device`. Where the calls are shorter than
    what it takes to launch them, that is the time of the launches."""

    def sample(step: Step, calls: int) -> float:
        start, end = (torch.Event(device, enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            step()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e6  # milliseconds

    return sample


def interleave(
    steps: Mapping[str, Step],
    budget_s: float,
    *,
    min_rounds: int = 5,
    max_rounds: int = 200,
    sample: Sampler | None = None,
    clock_ns: Callable[[], int] = time.perf_counter_ns,
) -> dict[str, Timing]:
    """Time `steps` in turns for about `budget_s` seconds and at least `min_rounds` rounds.

    A round takes one sample of every step; the order is reversed every other round, so that no
    step always runs in the cache that the same neighbour left behind. `clock_ns` keeps the budget,
    and times the calls where no `sample` does.
    """
    sample = sample or wall_clock(clock_ns)
    samples: dict[str, list[float]] = {name: [] for name in steps}
    collecting = gc.isenabled()
    gc.disable()
    try:
        calls = {}
        for name, step in steps.items():
            calls[name] = _calls_per_sample(lambda step=step: sample(step, 1))
        start = clock_ns()
        rounds = 0
        while rounds < max_rounds:
            order = list(steps) if rounds % 2 == 0 else list(reversed(steps))
            for name in order:
                samples[name].append(sample(steps[name], calls[name]) / calls[name])
            rounds += 1
            if rounds >= min_rounds and clock_ns() - start >= budget_s * 1e9:
                break
    finally:
        if collecting:
            gc.enable()
    return {name: summarize(ns, calls[name]) for name, ns in samples.items()}


def _calls_per_sample(time_once_ns: Callable[[], float]) -> int:
    """How many calls make a sample long enough; the first ones also warm up."""
    once = time_once_ns()
    for _ in range(CALIBRATION_CALLS):
        if once >= 100 * MIN_SAMPLE_NS:
            break  # one call is plenty, and a slow one need not be repeated to know it
        once = min(once, time_once_ns())
    return max(1, math.ceil(MIN_SAMPLE_NS / max(1, once)))


def summarize(samples_ns: list[float], calls: int) -> Timing:
    """Median and quartiles of samples given in nanoseconds per call."""
    us = sorted(ns * 1e-3 for ns in samples_ns)
    p25, median, p75 = us[0], us[0], us[0]
    if len(us) > 1:
        p25, median, p75 = statistics.quantiles(us, n=4, method="inclusive")
    return Timing(median, p25, p75, us[0], len(us), calls)
