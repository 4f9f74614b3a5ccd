"""The correctness gate: no case is timed before its result was compared with float64.

For every output and every gradient the rule of llmkern.numerics must hold: the error of ours
against the oracle in float64 is at most twice torch's error in the case's own dtype on the same
inputs, plus a floor. The figure reported is that of the tensor closest to its bound.

Where rounding puts a unit of a ReLU on the other side of 0, ours and torch's are each compared with
the oracle on the branch that the run in question took (kinks.py).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

import llmkern
from llmkern import dispatch, numerics
from llmkern.bench import kinks
from llmkern.bench.registry import OURS, Case, Tensors, seed_of, to_float64

# What a kernel or a baseline raises when it cannot serve a case. Anything else is a bug of the
# harness and ends the run.
CASE_ERRORS = (RuntimeError, ValueError, TypeError)


@dataclass(frozen=True)
class Verdict:
    """`error_ratio` is ours over torch's, None where torch's error is 0; `backends` served ours."""

    passed: bool
    reason: str
    error_ours: float
    error_torch: float
    error_ratio: float | None
    backends: tuple[str, ...]


def on_backend(name: str | None) -> AbstractContextManager:
    return nullcontext() if name is None else llmkern.use_backend(name)


def check(case: Case, tensors: Tensors, backend: str | None = None) -> Verdict:
    """Run ours (on `backend`, if one is named), torch in the case's dtype, and the oracle in
    float64, all with the same seed."""

    def results(
        prepare: Callable, inputs: Tensors, watch: AbstractContextManager | None = None
    ) -> tuple[Tensor, ...]:
        step = prepare(inputs)
        torch.manual_seed(seed_of(case))
        with watch or nullcontext():
            return step()

    def truth(comparer: kinks.Comparer) -> tuple[Tensor, ...]:
        """The oracle on the branches of the run that was compared with it."""
        if not comparer.moves:
            return exact
        return results(case.oracle, to_float64(tensors), kinks.Mover(comparer.moves))

    ours = next(variant for variant in case.variants if variant.name == OURS)
    with on_backend(backend), dispatch.recording() as records:
        got = results(ours.prepare, tensors)
    used = tuple(sorted({decision.backend for _, _, decision in records}))
    wide = to_float64(tensors)
    exact = results(case.oracle, wide, recorder := kinks.Recorder(wide, case.dtype))
    if not case.backward or not recorder.any_near:
        return judge(got, results(case.torch_error, tensors), exact, case.dtype, used)
    rounded = results(case.torch_error, tensors, torchs := kinks.Comparer(recorder.near))
    with on_backend(backend):  # again, as what is watched does not take the eager path
        results(ours.prepare, tensors, mine := kinks.Comparer(recorder.near))
    return judge(got, rounded, truth(mine), case.dtype, used, truth(torchs))


def judge(
    got: tuple[Tensor, ...],
    rounded: tuple[Tensor, ...],
    exact: tuple[Tensor, ...],
    dtype: torch.dtype,
    backends: tuple[str, ...],
    exact_torch: tuple[Tensor, ...] | None = None,
) -> Verdict:
    """Apply the rule to each tensor; the worst one speaks. `exact_torch` is what `rounded` is
    compared with where that differs from `exact`."""

    def fail(reason: str) -> Verdict:
        return Verdict(False, reason, float("inf"), 0.0, None, backends)

    if not len(got) == len(rounded) == len(exact):
        return fail(f"{len(got)} results, torch has {len(rounded)}")
    worst, worst_share = (0.0, 0.0), -1.0
    truths = zip(exact, exact_torch or exact, strict=True)
    for index, (mine, torchs, (truth, truth_torch)) in enumerate(
        zip(got, rounded, truths, strict=True)
    ):
        if mine.shape != truth.shape:
            return fail(f"result {index} has shape {list(mine.shape)}, not {list(truth.shape)}")
        mine_error = numerics.error(mine, truth)
        torch_error = numerics.error(torchs, truth_torch)
        bound = numerics.allowed(torch_error, dtype)
        if not mine_error <= bound:
            return Verdict(
                False,
                f"result {index}: error {mine_error:.2e} against float64, allowed {bound:.2e}",
                mine_error,
                torch_error,
                mine_error / torch_error if torch_error else None,
                backends,
            )
        if mine_error / bound > worst_share:
            worst, worst_share = (mine_error, torch_error), mine_error / bound
    ratio = worst[0] / worst[1] if worst[1] else None
    return Verdict(True, "", *worst, ratio, backends)
