"""What a run of `llmkern bench` consists of: suites in order, within the time limit."""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import llmkern
from llmkern.backends.cpu import _ext
from llmkern.bench import machine, memory_sweep, registry, roofline, runner, store
from llmkern.bench.peak import Peaks
from llmkern.bench.requirements import require
from llmkern.bench.suites import kernels, modules, train
from llmkern.errors import ArgumentError

SUITES = ("kernels", "modules", "memory", "train")
CPU_SUITES = ("memory", "train")  # about the CPU, whatever device is asked for
# What the default run is meant to take. A slower machine takes fewer samples of each case and
# never leaves one out; the fewest samples of all take less than five minutes on two slow cores.
TIME_LIMIT_S = 180.0
TRAIN_SHARE = 0.2  # of the time limit, for all training runs together
# Of the time limit, after which the further cases of a suite are sampled as few times as gives a
# median. The memory sweep and the training runs, which follow, have their share kept free.
CASES_SHARE = {"kernels": 0.4, "modules": 0.7}
DEFAULT_BUDGET = 0.3  # of a case's time budget, where the run has a time limit
PACKAGES = {"kernels": kernels, "modules": modules}  # in the order in which they run
TUNED = "tuned allocator"


def cases_of(suite: str, options: argparse.Namespace) -> list[registry.Case]:
    """The cases of "kernels" or "modules" that the options select."""
    package = PACKAGES[suite]
    dtypes = options.dtype
    if suite == "modules" and dtypes:
        dtypes = [dtype for dtype in dtypes if dtype in modules.DTYPES]
    if options.full:
        cases = package.full(dtypes if dtypes is not None else [torch.float32, torch.bfloat16])
    elif dtypes is not None:
        cases = package.default(dtypes)
    else:
        cases = [*package.default([torch.float32]), *package.default_bf16()]
    return registry.select(cases, options.filter)


def execute(options: argparse.Namespace, console: Any) -> store.Run:
    """Measure what the options ask for."""
    began = time.monotonic()
    device = registry.device_of(options.device)
    suites = _suites(options, device)
    loaded = _ext.load()
    run = store.Run(machine.describe(loaded.module.isa_names() if loaded.module else []))
    run.machine["allocator"] = "C library default"
    if options.tune_allocator:
        run.machine["allocator"] = llmkern.tune_allocator().detail
    run.machine["accelerator"] = machine.accelerator_name(device)
    threads = options.threads or [torch.get_num_threads()]
    limit = options.time_limit
    if limit is None:
        limit = float("inf") if options.full else TIME_LIMIT_S
    run_options = runner.Options(
        device=device,
        budget=options.budget * (1.0 if options.full else DEFAULT_BUDGET),
        compile=not options.no_compile,
        deadline=began + limit,
    )
    peaks = Peaks(loaded.module)
    if device.type == "cpu":
        peaks.survey(sorted({1, *threads}))
    torch.set_num_threads(max(threads))
    chosen = [suite for suite in PACKAGES if suite in suites]
    for suite in chosen:
        share = CASES_SHARE[suite] if set(suites) == set(SUITES) else 1.0
        until = dataclasses.replace(run_options, deadline=began + share * limit)
        for count in threads:
            torch.set_num_threads(count)
            run.rows += _run_cases(suite, cases_of(suite, options), until, console)
    if "memory" in suites and _in_filter(options, "memory attention"):
        run.memory = _run_memory(console, options.full)
    if "train" in suites and _in_filter(options, "train"):
        run.training = _run_training(options, TRAIN_SHARE * limit, console)
    if not options.tune_allocator and device.type == "cpu":
        cases = [
            tuned(c)
            for s in suites
            if s in PACKAGES
            for c in cases_of(s, options)
            if "allocator" in c.tags
        ]
        if cases and llmkern.tune_allocator().applied:  # last: it cannot be wholly undone
            run.rows += _run_cases("tuned", cases, run_options, console)
    peaks.again()
    for row in run.rows:
        roofline.hold(row, peaks)
    run.machine["peaks"] = {"flops": peaks.flops, "bandwidth": peaks.bandwidth}
    run.machine["load_after"] = machine.load_average()
    run.machine["seconds"] = time.monotonic() - began
    return run


def _suites(options: argparse.Namespace, device: torch.device) -> list[str]:
    """What to run on `device`.

    Raises:
        ArgumentError: a suite was named that runs on the CPU alone.
    """
    if device.type == "cpu":
        return options.suites or list(SUITES)
    named = [suite for suite in options.suites or () if suite in CPU_SUITES]
    if named:
        raise ArgumentError(f"bench: {' and '.join(named)} run on the CPU only, got {device}")
    return options.suites or [suite for suite in SUITES if suite not in CPU_SUITES]


def tuned(case: registry.Case) -> registry.Case:
    """The same case under a name that says it ran under llmkern.tune_allocator()."""
    return dataclasses.replace(case, label=f"{case.label} {TUNED}".strip())


def _in_filter(options: argparse.Namespace, name: str) -> bool:
    return all(word in name for word in (options.filter or "").replace(",", " ").split())


def _progress(console: Any, total: int, unit: str) -> Any:
    progress = require("rich.progress", "the progress bar")
    return progress.Progress(
        progress.TextColumn("{task.fields[suite]:>8}"),
        progress.BarColumn(24),
        progress.TextColumn(f"{{task.completed}}/{total} {unit}"),
        progress.TimeElapsedColumn(),
        progress.TextColumn("{task.description}"),
        console=console,
        transient=True,
    )


def _announce(console: Any, line: str) -> None:
    """A line for a log; a terminal has the progress bar."""
    if not console.is_terminal:
        console.print(line, markup=False, highlight=False)


def _run_cases(
    suite: str,
    cases: list[registry.Case],
    run_options: runner.Options,
    console: Any,
) -> list[store.Row]:
    with _progress(console, len(cases), "cases") as bar:
        task = bar.add_task("", total=len(cases), suite=suite)

        rows = []
        for case in cases:
            bar.update(task, description=case.id)
            _announce(console, f"[{len(rows) + 1}/{len(cases)}] {case.id}")
            rows.append(runner.run_case(case, run_options))
            bar.advance(task)
    return rows


def _run_memory(console: Any, full: bool) -> list[dict[str, Any]]:
    lengths = memory_sweep.FULL_LENGTHS if full else memory_sweep.LENGTHS
    directions = (False, True) if full else (True,)
    total = len(memory_sweep.VARIANTS) * len(lengths) * len(directions)
    entries = []
    _announce(console, f"peak memory of attention: {total} runs in processes of their own")
    with _progress(console, total, "runs") as bar:
        task = bar.add_task("", total=total, suite="memory")
        for entry in memory_sweep.measure(lengths, directions):
            entries.append(entry)
            bar.update(task, advance=1, description=f"{entry['variant']} S={entry['S']}")
    return entries


def _run_training(
    options: argparse.Namespace, limit_s: float, console: Any
) -> list[dict[str, Any]]:
    from llmkern.bench.workloads import training

    if options.dtype is None:
        dtypes = [torch.float32]
    else:
        dtypes = [dtype for dtype in options.dtype if dtype in training.STEP_TOLERANCE]
    configs = (train.full if options.full else train.default)(dtypes, options.steps)
    results = []
    for config in configs:
        _announce(console, f"training: {config.name}, up to {config.steps} steps")
        deadline = time.monotonic() + limit_s / len(configs)
        with _progress(console, config.steps, "steps") as bar:
            task = bar.add_task(config.name, total=config.steps, suite="train")
            log = _tensorboard(options.logdir, config)

            def on_step(
                step: int, arms: list, bar: Any = bar, task: Any = task, log: Callable = log,
                config: Any = config,
            ) -> None:  # fmt: skip
                losses = ", ".join(f"{arm.name} {arm.losses[-1]:.3f}" for arm in arms)
                bar.update(task, advance=1, description=f"{config.name}: {losses}")
                log(step, arms)

            results.append(training.compare(config, on_step=on_step, deadline=deadline))
            log(config.steps, [])
    return results


def _tensorboard(logdir: Path, config: Any) -> Callable[[int, list], None]:
    """Logs losses and tokens/s, one TensorBoard run an arm; an empty list of arms closes it."""
    tensorboard = require("torch.utils.tensorboard", "the training log")
    writers: dict[str, Any] = {}

    def log(step: int, arms: list) -> None:
        for arm in arms:
            if arm.name not in writers:
                folder = f"{config.name}/{arm.name}".replace(" ", "_").replace(",", "")
                writers[arm.name] = tensorboard.SummaryWriter(logdir / folder)
            writers[arm.name].add_scalar("loss", arm.losses[-1], step)
            writers[arm.name].add_scalar("tokens per second", config.tokens / arm.seconds[-1], step)
        if not arms:
            for writer in writers.values():
                writer.close()

    return log
