"""`llmkern bench`: its arguments, what a run consists of, and what it writes."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import llmkern
from llmkern.backends.cpu import _ext
from llmkern.bench import machine, memory_sweep, registry, runner, store
from llmkern.bench.peak import Peaks
from llmkern.bench.requirements import require
from llmkern.bench.suites import kernels, modules, train

SUITES = ("kernels", "modules", "memory", "train")
# The default run ends well within ten minutes on two cores, a first build included.
TIME_LIMIT_S = 390.0
COMPILE_SHARE = 0.6  # of the time limit, after which torch.compile is no longer started
DEFAULTS: dict[str, Any] = {
    "suites": [],
    "full": False,
    "json": None,
    "html": None,
    "threads": None,
    "dtype": None,
    "filter": None,
    "device": "cpu",
    "budget": 1.0,
    "time_limit": None,
    "no_compile": False,
    "tune_allocator": False,
    "steps": None,
    "logdir": Path("reports/tensorboard"),
}


def add_parser(commands: argparse._SubParsersAction) -> None:
    shared = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    _add_options(shared)
    parser = commands.add_parser(
        "bench",
        parents=[shared],
        help="measure llmkern against torch on this machine",
        description="Without a suite: all of them, in their short form.",
    )
    actions = parser.add_subparsers(dest="action", metavar="SUITE | compare | show")
    for suite in SUITES:
        one = actions.add_parser(suite, parents=[shared], help=f"only the {suite} suite")
        one.set_defaults(suites=[suite])
    _add_compare(actions)
    _add_show(actions)
    parser.set_defaults(run=run_command)


def _add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--full", action="store_true", help="more cases, more dtypes, longer training; no limit")
    add("--json", type=Path, metavar="FILE", help="write the result file")
    add("--html", type=Path, metavar="FILE", help="write the report")
    add("--threads", type=_positive_list, metavar="N[,N]", help="default: what torch uses")
    add("--dtype", type=dtype_list, metavar="D[,D]", help=f"of {', '.join(registry.DTYPES)}")
    add("--filter", metavar="WORDS", help="only cases whose id contains every word")
    add("--device", help="device of the tensors (default cpu)")
    add("--budget", type=float, metavar="X", help="scale the time given to each case")
    add("--time-limit", type=float, metavar="S", help=f"default {TIME_LIMIT_S:.0f}, --full: none")
    add("--no-compile", action="store_true", help="leave torch.compile variants out")
    add("--tune-allocator", action="store_true", help="run all under llmkern.tune_allocator()")
    add("--steps", type=int, help="steps of each training run")
    add("--logdir", type=Path, metavar="DIR", help=f"TensorBoard log ({DEFAULTS['logdir']})")


def _add_compare(actions: argparse._SubParsersAction) -> None:
    parser = actions.add_parser(
        "compare",
        help="compare two result files; exit code 1 on a regression",
        description="A row regressed when ours got slower by more than the threshold with the two "
        "interquartile ranges apart, or when it failed the correctness gate.",
    )
    parser.add_argument("before", type=Path, metavar="A.json")
    parser.add_argument("after", type=Path, metavar="B.json")
    parser.add_argument("--threshold", type=float, default=0.1, help="share (default 0.1)")
    parser.add_argument(
        "--metric",
        choices=("ratio", "time"),
        default="ratio",
        help="our time over torch eager's in the same run (default), or our time",
    )
    parser.set_defaults(run=compare_command)


def _add_show(actions: argparse._SubParsersAction) -> None:
    parser = actions.add_parser("show", help="print a result file, or render it again")
    parser.add_argument("file", type=Path, metavar="RUN.json")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the report")
    parser.add_argument("--markdown", action="store_true", help="print as a Markdown table")
    parser.set_defaults(run=show_command)


def _positive_list(value: str) -> list[int]:
    numbers = [int(word) for word in value.split(",")]
    if not numbers or min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"needs positive numbers, got {value!r}")
    return numbers


def dtype_list(value: str) -> list[torch.dtype]:
    unknown = [word for word in value.split(",") if word not in registry.DTYPES]
    if unknown:
        known = ", ".join(registry.DTYPES)
        raise argparse.ArgumentTypeError(f"unknown dtype {unknown[0]!r}; known: {known}")
    return [registry.DTYPES[word] for word in value.split(",")]


def cases_of(suite: str, options: argparse.Namespace) -> list[registry.Case]:
    """The cases of "kernels" or "modules" that the options select."""
    package = {"kernels": kernels, "modules": modules}[suite]
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


def run_command(arguments: argparse.Namespace) -> int:
    options = argparse.Namespace(**(DEFAULTS | vars(arguments)))
    require("rich", "the terminal report")
    if options.html:
        require("matplotlib", "the HTML report")
    from llmkern.bench import table

    console = table.console()
    run = execute(options, console)
    table.print_run(run, console)
    if options.json:
        store.save(run, options.json)
        console.print(f"wrote {options.json}", highlight=False)
    if options.html:
        from llmkern.bench import html

        html.save(run, options.html)
        console.print(f"wrote {options.html}", highlight=False)
    disagree = any(not result["agreement"]["agrees"] for result in run.training)
    return 1 if disagree or any(row.status in ("failed", "error") for row in run.rows) else 0


def execute(options: argparse.Namespace, console: Any) -> store.Run:
    """Measure what the options ask for."""
    began = time.monotonic()
    loaded = _ext.load()
    run = store.Run(machine.describe(loaded.module.isa_names() if loaded.module else []))
    run.machine["allocator"] = "C library default"
    if options.tune_allocator:
        run.machine["allocator"] = llmkern.tune_allocator().detail
    suites = options.suites or list(SUITES)
    threads = options.threads or [torch.get_num_threads()]
    limit = options.time_limit
    if limit is None:
        limit = float("inf") if options.full else TIME_LIMIT_S
    run_options = runner.Options(
        device=torch.device(options.device),
        budget=options.budget,
        compile=not options.no_compile,
        deadline=began + limit,
        compile_deadline=began + COMPILE_SHARE * limit,
    )
    peaks = Peaks(loaded.module)
    peaks.survey(sorted({1, *threads}))
    for count in threads:
        torch.set_num_threads(count)
        for suite in ("modules", "kernels"):
            if suite in suites:
                run.rows += _run_suite(suite, options, run_options, peaks, console)
    torch.set_num_threads(max(threads))
    if "memory" in suites and _in_filter(options, "memory attention"):
        run.memory = _run_memory(console)
    if "train" in suites and _in_filter(options, "train"):
        run.training = _run_training(options, console)
    run.machine["peaks"] = {"flops": peaks.flops, "bandwidth": peaks.bandwidth}
    run.machine["load_after"] = machine.load_average()
    run.machine["seconds"] = time.monotonic() - began
    return run


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


def _run_suite(
    suite: str,
    options: argparse.Namespace,
    run_options: runner.Options,
    peaks: Peaks,
    console: Any,
) -> list[store.Row]:
    cases = cases_of(suite, options)
    with _progress(console, len(cases), "cases") as bar:
        task = bar.add_task("", total=len(cases), suite=suite)

        def show(case: registry.Case) -> None:
            bar.update(task, description=case.id)
            if not console.is_terminal:
                console.print(f"[{cases.index(case) + 1}/{len(cases)}] {case.id}", markup=False)

        rows = []
        for case in cases:
            show(case)
            rows.append(runner.run_case(case, run_options, peaks))
            bar.advance(task)
    return rows


def _run_memory(console: Any) -> list[dict[str, Any]]:
    total = len(memory_sweep.VARIANTS) * len(memory_sweep.LENGTHS) * 2
    entries = []
    with _progress(console, total, "runs") as bar:
        task = bar.add_task("", total=total, suite="memory")
        for entry in memory_sweep.measure():
            entries.append(entry)
            bar.update(task, advance=1, description=f"{entry['variant']} S={entry['S']}")
    return entries


def _run_training(options: argparse.Namespace, console: Any) -> list[dict[str, Any]]:
    from llmkern.bench.workloads import training

    if options.dtype is None:
        dtypes = [torch.float32]
    else:
        dtypes = [dtype for dtype in options.dtype if dtype in training.STEP_TOLERANCE]
    configs = (train.full if options.full else train.default)(dtypes, options.steps)
    results = []
    for config in configs:
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

            results.append(training.compare(config, on_step=on_step))
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


def compare_command(arguments: argparse.Namespace) -> int:
    require("rich", "the terminal report")
    from llmkern.bench import table

    before, after = store.load(arguments.before), store.load(arguments.after)
    changes = store.compare(before, after, threshold=arguments.threshold, metric=arguments.metric)
    console = table.console()
    console.print(table.changes_table(changes, arguments.metric))
    regressed = [change for change in changes if change.regressed]
    console.print(
        f"{len(changes)} rows, {len(regressed)} regressed "
        f"(threshold {100 * arguments.threshold:g}%, spreads apart)",
        highlight=False,
    )
    return 1 if regressed else 0


def show_command(arguments: argparse.Namespace) -> int:
    run = store.load(arguments.file)
    if arguments.html:
        require("matplotlib", "the HTML report")
        from llmkern.bench import html

        html.save(run, arguments.html)
    if arguments.markdown:
        from llmkern.bench import markdown

        print(markdown.render(run))
    elif not arguments.html:
        require("rich", "the terminal report")
        from llmkern.bench import table

        table.print_run(run, table.console())
    return 0
