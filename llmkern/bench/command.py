"""`llmkern bench`: its arguments, and what it prints and writes."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from llmkern.bench import execution, registry, store
from llmkern.bench.execution import SUITES, TIME_LIMIT_S
from llmkern.bench.requirements import require

TIME_LIMIT_HELP = (
    f"seconds after which cases are repeated as few times as gives a median "
    f"(default {TIME_LIMIT_S:.0f}, --full: none)"
)
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
    add("--time-limit", type=float, metavar="S", help=TIME_LIMIT_HELP)
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


def run_command(arguments: argparse.Namespace) -> int:
    options = argparse.Namespace(**(DEFAULTS | vars(arguments)))
    require("rich", "the terminal report")
    if options.html:
        require("matplotlib", "the HTML report")
    from llmkern.bench import table

    console = table.console()
    run = execution.execute(options, console)
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
