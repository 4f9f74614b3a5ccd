"""Runs a case: gate, then interleaved timing, then memory. One Row comes of it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch

from llmkern.backends.cpu import _ext
from llmkern.bench import gate, memory, timers
from llmkern.bench.registry import (
    DTYPE_NAMES,
    Case,
    Step,
    Tensors,
    Variant,
    inputs_of,
    seed_of,
)
from llmkern.bench.store import Row, VariantResult

FEWEST_ROUNDS = 3  # of a case that is measured after the deadline


@dataclass
class Options:
    """`budget` scales every case's time budget; `deadline` is a time.monotonic() after which the
    remaining cases are repeated as few times as gives a median. None is left out."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    budget: float = 1.0
    compile: bool = True
    measure_memory: bool = True
    deadline: float = float("inf")


def isa_in_use() -> str:
    module = _ext.load().module
    return module.isa() if module is not None else ""


def run_case(case: Case, options: Options) -> Row:
    row = Row(
        id=case.id,
        suite=case.suite,
        op=case.op,
        label=case.label,
        shape=dict(case.shape),
        dtype=DTYPE_NAMES[case.dtype],
        direction=case.direction,
        threads=torch.get_num_threads(),
        device=str(options.device),
        backend="",
        isa="",
        status="ok",
        flops=case.cost.flops,
        nbytes=case.cost.nbytes,
        tags=sorted(case.tags),
    )
    tensors = inputs_of(case, options.device)
    try:
        verdict = gate.check(case, tensors)
    except gate.CASE_ERRORS as error:
        row.status, row.reason = "error", f"{type(error).__name__}: {error}"
        return row
    row.backend = "+".join(verdict.backends)
    row.isa = isa_in_use() if "cpu" in verdict.backends else ""
    row.error_ours, row.error_torch = verdict.error_ours, verdict.error_torch
    row.error_ratio = verdict.error_ratio
    if not verdict.passed:
        row.status, row.reason = "failed", verdict.reason
        # An infinite error has no place in JSON; the reason says it in words.
        row.error_ours = row.error_ours if row.error_ours != float("inf") else None
        return row
    _measure(case, tensors, options, row)
    return row


def _measure(case: Case, tensors: Tensors, options: Options, row: Row) -> None:
    """Fill in row.variants: timings taken in turns, then the peak memory of each."""
    steps: dict[str, Step] = {}
    for variant in case.variants:
        result = VariantResult(variant.name, note=variant.note)
        row.variants.append(result)
        step = _prepare(variant, case, tensors, options, result)
        if step is not None:
            steps[variant.name] = step
    late = time.monotonic() > options.deadline
    timings = timers.interleave(
        steps,
        0.0 if late else case.budget_s * options.budget * len(steps) / 2,
        min_rounds=FEWEST_ROUNDS if late else case.min_rounds,
        sample=timers.sampler(options.device),
    )
    for result in row.variants:
        result.timing = timings.get(result.name)
        if result.name in steps and options.measure_memory:
            result.peak_bytes = memory.peak_on(options.device, steps[result.name])


def _prepare(
    variant: Variant, case: Case, tensors: Tensors, options: Options, result: VariantResult
) -> Step | None:
    """The variant's call, run once so that one which cannot serve is left out with its reason."""
    if variant.slow_to_prepare and not options.compile:
        result.reason = "left out on request"
        return None
    try:
        step = variant.prepare(tensors)
        torch.manual_seed(seed_of(case))
        step()
    except gate.CASE_ERRORS as error:
        result.reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        return None
    return step
