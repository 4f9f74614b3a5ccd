"""How much of the machine a measured call used.

The roofline (Williams, Waterman and Patterson, 2009): a call of F FLOPs and Q bytes cannot end
before max(F / peak, Q / bandwidth). The larger term is what bounds it, and the share is that time
over the measured one. The bandwidth is that of a copy as large as the case, so a tensor that lives
in cache is held against the cache and not against DRAM.

For GPUs that are not here, `card_bounds` gives the same by their data sheets.
"""

from __future__ import annotations

from dataclasses import dataclass

from llmkern import cards
from llmkern import cost as costs
from llmkern.bench.peak import Peaks
from llmkern.bench.registry import OURS, Cost
from llmkern.bench.store import Row


@dataclass(frozen=True)
class Bound:
    """The least time the machine could take, and what sets it: "compute" or "memory"."""

    time_us: float
    kind: str
    flops_per_s: float
    bytes_per_s: float


def bound(cost: Cost, dtype: str, threads: int, peaks: Peaks) -> Bound | None:
    """None where the machine's peaks were not measured."""
    flops_per_s = peaks.flops_per_s(dtype, threads)
    bytes_per_s = peaks.bytes_per_s(cost.nbytes, threads)
    if flops_per_s is None or bytes_per_s is None:
        return None
    compute_us = cost.flops / flops_per_s * 1e6
    memory_us = cost.nbytes / bytes_per_s * 1e6
    kind = "compute" if compute_us >= memory_us else "memory"
    return Bound(max(compute_us, memory_us), kind, flops_per_s, bytes_per_s)


def hold(row: Row, peaks: Peaks) -> None:
    """Fill in what bounds a measured row and its share of that bound."""
    median = row.median_us(OURS)
    if median is None or not (row.flops or row.nbytes) or row.device != "cpu":
        return  # the peaks are the CPU's
    limit = bound(Cost(row.flops, row.nbytes), row.dtype, row.threads, peaks)
    if limit is not None:
        row.bound, row.peak_share = limit.kind, limit.time_us / median


def card_bounds(op: str, spec: tuple, backward: bool = False) -> tuple[cards.Bound, ...]:
    """The least time of a call, or of its gradients, on each card of llmkern/cards.py.

    op, spec: as dispatch names and describes the call. A bound, not a measurement.
    """
    work = costs.backward(op, spec) if backward else costs.of(op, spec)
    return costs.bounds(op, spec, work)
