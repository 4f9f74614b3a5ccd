"""`llmkern kernels`: what the compilers make of the GPU kernels, as a table or as JSON."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from llmkern.bench import compiled, compiled_cuda
from llmkern.bench.requirements import require
from llmkern.errors import BackendError

BACKENDS = ("triton", "cuda")
_COLUMNS = (
    "backend",
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
        help="compile the GPU kernels for an architecture and show registers, spills, SASS",
        description="Needs no GPU, but triton for its kernels and the built extension for those in "
        "CUDA C++. Occupancy is resident warps over the most there can be; instruction counts are "
        "static.",
    )
    known = [f"sm_{capability}" for capability in compiled.ARCHITECTURES]
    parser.add_argument(
        "--target", default="sm_80", metavar="SM[,SM]", help=f"all, or of {', '.join(known)}"
    )
    parser.add_argument("--backend", choices=BACKENDS, help="only that one's kernels")
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
        of_target = list(_rows(arguments.backend, capability, arguments.filter))
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


def _rows(backend: str | None, capability: int, words: str | None) -> Iterator[compiled.Compiled]:
    """The kernels of one backend, or of those that are here.

    Raises:
        BackendError: the backend is missing, or both are.
    """
    missing = []
    for name in BACKENDS if backend is None else (backend,):
        try:
            yield from (
                _of_triton(capability, words) if name == "triton" else _of_cuda(capability, words)
            )
        except BackendError as error:
            missing.append(error)
    if len(missing) == (1 if backend else len(BACKENDS)):
        raise missing[0]
    for error in missing:
        print(f"llmkern: {error}", file=sys.stderr)


def _of_triton(capability: int, words: str | None) -> Iterator[compiled.Compiled]:
    for op, form in compiled.forms(capability):
        if _selected(f"{op} {form.name}", words):
            yield compiled.inspect(op, form, capability)


def _of_cuda(capability: int, words: str | None) -> Iterator[compiled.Compiled]:
    for form in compiled_cuda.forms(capability):
        if _selected(f"{form.op} {form.name}", words):
            yield compiled_cuda.inspect(form, capability)


def _selected(name: str, words: str | None) -> bool:
    return all(word in name for word in (words or "").replace(",", " ").split())


def _print(target: str, rows: list[compiled.Compiled]) -> None:
    from rich.table import Table

    from llmkern.bench import table

    shown = Table(title=target, title_justify="left", header_style="bold")
    for number, name in enumerate(_COLUMNS):
        shown.add_column(name, justify="left" if number < 3 else "right", no_wrap=True)
    for row in rows:
        spilled = f"[red]{row.spill_bytes}[/]" if row.spill_bytes else "0"
        numbers = (row.registers, spilled, row.shared_bytes, f"{100 * row.occupancy:.0f}%",
                   row.tensor, row.async_copies, row.loads_16, row.stores_16,
                   row.instructions)  # fmt: skip
        stages = "-" if row.num_stages is None else str(row.num_stages)
        shown.add_row(row.backend, row.op, row.kernel, str(row.num_warps), stages,
                      *map(str, numbers))  # fmt: skip
    table.console().print(shown)
