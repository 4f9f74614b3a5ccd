"""`llmkern tune`: times the two GPU backends against each other on this card and writes the file
that dispatch reads (llmkern/tuned.py).

A backend takes part in a case only if its result passed the gate. The one that the static figures
prefer stays the choice unless the other is faster by more than a margin.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import sys
from collections.abc import Mapping
from pathlib import Path

import torch

import llmkern
from llmkern import choice, dispatch, tuned
from llmkern.bench import command, gate, registry, timers
from llmkern.bench.registry import Case, Step
from llmkern.bench.suites import tune as suite
from llmkern.errors import ArgumentError, TuneFileError

MARGIN = 0.03  # of the preferred backend's time; less is noise
BUDGET_S = 0.3  # for each case


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "tune",
        help="time the cuda and triton backends on this card; dispatch reads the result",
        description=f"Writes {tuned.VARIABLE}, or a file of the card's name in "
        "$XDG_CACHE_HOME/llmkern; docs/gpu.md has the format. Rows that are measured again are "
        "replaced, others of the same direction stay.",
    )
    add = parser.add_argument
    add("--device", default="cuda")
    add("--dtype", type=command.dtype_list, metavar="D[,D]",
        default=[torch.bfloat16, torch.float16, torch.float32])  # fmt: skip
    add("--filter", metavar="WORDS", help="only cases whose id contains every word")
    add("--forward", action="store_true", help="time forward alone, for inference")
    add("--budget", type=float, default=1.0, metavar="X", help="scale the time of each case")
    add("--output", type=Path, metavar="FILE", help="write here instead")
    parser.set_defaults(run=run_command)


def run_command(arguments: argparse.Namespace) -> int:
    device = registry.device_of(arguments.device)
    card = dispatch.card_name()
    if device.type != "cuda" or card is None:
        raise ArgumentError(f"tune: there is a choice of backends on cuda only, got {device}")
    file = arguments.output or tuned.path(card)
    if file is None:
        raise ArgumentError(f"tune: {tuned.VARIABLE} is empty, give --output FILE")
    cases = registry.select(suite.cases(arguments.dtype, not arguments.forward), arguments.filter)
    rows = []
    for case in cases:
        row, said = measure(case, device, timers.sampler(device), BUDGET_S * arguments.budget)
        print(f"{case.id}: {said}", flush=True)
        rows += [row] if row is not None else []
    if not rows:
        print("nothing to choose between: no case was served by both backends")
        return 1
    direction = "forward" if arguments.forward else "forward+backward"
    save(file, card, direction, rows)
    print(f"{len(rows)} rows written to {file}")
    return 0


def save(file: Path, card: str, direction: str, rows: list[choice.Measured]) -> None:
    """Write rows, beside those of the file that were not measured again."""
    new = tuned.Tuned(
        format=tuned.FORMAT,
        llmkern=llmkern.__version__,
        card=card,
        torch=torch.__version__,
        triton=_triton(),
        measured=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        direction=direction,
        rows=tuple(rows),
    )
    tuned.write(file, tuned.merged(_before(file), new))


def _before(file: Path) -> tuned.Tuned | None:
    if not file.exists():
        return None
    try:
        return tuned.read(file)
    except TuneFileError as error:  # what was measured just now is worth more
        print(f"{error}; it is replaced", file=sys.stderr)
        return None


def _triton() -> str | None:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None


def measure(
    case: Case, device: torch.device, sample: timers.Sampler, budget_s: float
) -> tuple[choice.Measured | None, str]:
    """One row of the file, None where fewer than two backends serve the case rightly; and what to
    tell of it."""
    tensors = registry.inputs_of(case, device)
    steps: dict[str, Step] = {}
    op, spec, passed_over = "", (), []
    for name in choice.BACKENDS:
        try:
            verdict = gate.check(case, tensors, backend=name)
        except gate.CASE_ERRORS as error:
            passed_over.append(f"{name}: {error}")
            continue
        if not verdict.passed:
            passed_over.append(f"{name}: {verdict.reason}")
            continue
        steps[name], (op, spec) = _step(case, tensors, name)
    if passed_over:
        return None, "; ".join(passed_over)
    timings = timers.interleave(steps, budget_s, sample=sample)
    us = {name: timing.median_us for name, timing in timings.items()}
    preferred = choice.better(choice.figures_of(op, spec))
    best = pick(us, preferred)
    row = choice.Measured(op, choice.kind_of(spec), choice.size_of(spec), us, best)
    times = ", ".join(f"{name} {time:.4g} us" for name, time in us.items())
    return row, f"{best} ({times})"


def _step(case: Case, tensors: registry.Tensors, backend: str) -> tuple[Step, tuple[str, tuple]]:
    """The case's call on one backend; the op and spec of it."""
    ours = next(variant for variant in case.variants if variant.name == registry.OURS)
    run = ours.prepare(tensors)
    with dispatch.use_backend(backend), dispatch.recording() as records:
        run()

    def step() -> object:
        with dispatch.use_backend(backend):
            return run()

    return step, records[0][:2]


def pick(us: Mapping[str, float], preferred: str, margin: float = MARGIN) -> str:
    """The fastest backend, if it beats the preferred one by more than the margin."""
    fastest = min(us, key=us.__getitem__)
    return fastest if us[fastest] < us[preferred] * (1 - margin) else preferred
