"""`llmkern kernels`: what the compilers make of the Triton kernels, as a table or as JSON."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from llmkern.bench import compiled
from llmkern.bench.requirements import require

_COLUMNS = (
    "op",
    "kernel",
    "warps",
    "stages",
    "regs",
    "spill B",
    "smem B",
    "occup.",
    "tensor",
    "async",
    "ld 16 B",
    "st 16 B",
    "SASS",
)


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "kernels",
        help="compile the Triton kernels for an architecture and show registers, spills, SASS",
        description="Needs triton, no GPU. Occupancy is resident warps over the most there can be; "
        "instruction counts are static.",
    )
    known = [f"sm_{capability}" for capability in compiled.ARCHITECTURES]
    parser.add_argument(
        "--target", default="sm_80", metavar="SM[,SM]", help=f"all, or of {', '.join(known)}"
    )
    parser.add_argument("--filter", metavar="WORDS", help="only kernels whose name has every word")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows; - for stdout")
    parser.set_defaults(run=run_command)


def run_command(arguments: argparse.Namespace) -> int:
    targets = arguments.target.split(",")
    if targets == ["all"]:
        targets = [f"sm_{capability}" for capability in compiled.ARCHITECTURES]
    capabilities = [compiled.capability_of(target) for target in targets]
    to_stdout = str(arguments.json) == "-"
    if not to_stdout:
        require("rich", "the terminal report")
    rows = []
    for capability in capabilities:
        of_target = [
            compiled.inspect(op, form, capability)
            for op, form in compiled.forms(capability)
            if _selected(f"{op} {form.name}", arguments.filter)
        ]
        rows += of_target
        if not to_stdout:
            _print(f"sm_{capability}", of_target)
    if arguments.json:
        text = json.dumps([row.row() for row in rows], indent=1)
        if to_stdout:
            print(text)
        else:
            arguments.json.write_text(text + "\n")
    return 0


def _selected(name: str, words: str | None) -> bool:
    return all(word in name for word in (words or "").replace(",", " ").split())


def _print(target: str, rows: list[compiled.Compiled]) -> None:
    from rich.table import Table

    from llmkern.bench import table

    shown = Table(title=target, title_justify="left", header_style="bold")
    for number, name in enumerate(_COLUMNS):
        shown.add_column(name, justify="left" if number < 2 else "right", no_wrap=True)
    for row in rows:
        spilled = f"[red]{row.spill_bytes}[/]" if row.spill_bytes else "0"
        numbers = (row.registers, spilled, row.shared_bytes, f"{100 * row.occupancy:.0f}%",
                   row.tensor, row.async_copies, row.loads_16, row.stores_16,
                   row.instructions)  # fmt: skip
        shown.add_row(row.op, row.kernel, str(row.num_warps), str(row.num_stages),
                      *map(str, numbers))  # fmt: skip
    table.console().print(shown)
