"""The terminal report: one table a suite, then memory, training, and what did not run."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.table import Table

from llmkern.bench import text
from llmkern.bench.registry import EAGER, OURS
from llmkern.bench.store import Change, Row, Run

MIN_WIDTH = 210  # of a pipe or a file, which has no width of its own


def console() -> Console:
    made = Console()
    return made if made.is_terminal else Console(width=MIN_WIDTH)


def _verdict_style(speedup: float | None) -> str:
    if speedup is None:
        return ""
    return "green" if speedup >= 1.05 else "red" if speedup < 0.95 else "yellow"


def _styled(value: float | None) -> str:
    style = _verdict_style(value)
    return f"[{style}]{text.ratio(value)}[/]" if style else text.ratio(value)


def rows_table(title: str, rows: Iterable[Row]) -> Table:
    table = Table(title=title, title_justify="left", header_style="bold", expand=False)
    for name in ("case", "shape", "dtype", "pass", "thr"):
        table.add_column(name, no_wrap=name in ("dtype", "pass"))
    for name in ("llmkern", "", "rate", "of peak", "peak mem", "torch mem", "err/torch"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("× eager", justify="right", no_wrap=True)
    table.add_column("× best torch")
    table.add_column("ran on", no_wrap=True)
    for row in rows:
        table.add_row(*_cells(row))
    return table


def _cells(row: Row) -> list[str]:
    head = [text.title(row), text.shape(row), row.dtype, row.direction, str(row.threads)]
    if row.status != "ok":
        style = "bold red" if row.status == "failed" else "yellow"
        return [*head, f"[{style}]{row.status}[/]", *[""] * 8, text.engine(row)]
    best = row.best_torch
    ours, eager = row.variant(OURS), row.variant(EAGER)
    return [
        *head,
        text.duration(row.median_us(OURS)),
        text.spread(row, OURS),
        text.rate(row),
        text.share(row.peak_share),
        text.size(ours and ours.peak_bytes),
        text.size(eager and eager.peak_bytes),
        text.ratio(row.error_ratio),
        _styled(row.speedup),
        f"{_styled(best[1])} {best[0]}" if best else text.NOT_MEASURED,
        text.engine(row),
    ]


def memory_table(entries: Iterable[dict[str, Any]]) -> Table:
    table = Table(
        title="Peak memory of attention over its inputs (fresh process each)",
        title_justify="left",
        header_style="bold",
    )
    for name in ("variant", "pass", "S", "peak", "time"):
        table.add_column(name, justify="left" if name in ("variant", "pass") else "right")
    for entry in entries:
        peak = text.size(entry["peak_bytes"]) if entry["peak_bytes"] is not None else ""
        seconds = entry["seconds"]
        time_text = text.duration(seconds * 1e6) if seconds is not None else entry["reason"]
        table.add_row(entry["variant"], entry["direction"], str(entry["S"]), peak, time_text)
    return table


def training_table(results: Iterable[dict[str, Any]]) -> Table:
    table = Table(title="Training run", title_justify="left", header_style="bold")
    for name in ("run", "model", "steps", "tokens/s", "", "ratio", "peak mem", "final loss"):
        table.add_column(name)
    table.add_column("loss curves agree")
    for result in results:
        for arm in result["arms"]:
            first = arm is result["arms"][0]
            table.add_row(
                result["name"] if first else "",
                arm["name"],
                str(len(arm["losses"])),
                f"{arm['tokens_per_s']:.0f}",
                f"±{100 * arm['spread']:.0f}%",
                text.ratio(arm["speedup"]),
                text.size(arm["peak_bytes"]),
                f"{arm['losses'][-1]:.4f}",
                _agreement(result["agreement"]) if first else "",
            )
    return table


def _agreement(agreement: dict[str, Any]) -> str:
    style = "green" if agreement["agrees"] else "bold red"
    return f"[{style}]{'yes' if agreement['agrees'] else 'NO'}[/]: {agreement['statement']}"


def print_run(run: Run, out: Console) -> None:
    for suite in dict.fromkeys(row.suite for row in run.rows):
        out.print(rows_table(suite, [row for row in run.rows if row.suite == suite]))
    if run.memory:
        out.print(memory_table(run.memory))
    if run.training:
        out.print(training_table(run.training))
    for note in text.notes(run.rows):
        out.print(note, highlight=False)
    for row in run.rows:
        if row.status != "ok":
            style = "bold red" if row.status == "failed" else "yellow"
            out.print(f"[{style}]{row.status}[/] {row.id}: {row.reason}", highlight=False)
        for variant in row.variants:
            if variant.reason:
                out.print(f"{row.id}: {variant.name}: {variant.reason}", highlight=False)
    out.print(summary(run), highlight=False)


def summary(run: Run) -> str:
    machine = run.machine
    failed = sum(row.status == "failed" for row in run.rows)
    unrun = sum(row.status in ("error", "skipped") for row in run.rows)
    load = "load average {} before, {} after".format(
        *(text.NOT_MEASURED if v is None else f"{v:.2f}"
          for v in (machine.get("load_before"), machine.get("load_after")))
    )  # fmt: skip
    return (
        f"{text.hardware(machine)}, torch {machine['torch']}, {machine['date']}; "
        f"{load}; {machine.get('seconds', 0):.0f} s\n"
        f"{len(run.rows)} cases: {len(run.rows) - failed - unrun} measured, "
        f"{failed} failed the gate, {unrun} did not run"
    )


def changes_table(changes: Iterable[Change], metric: str) -> Table:
    unit = "time over torch eager's" if metric == "ratio" else "µs"
    table = Table(title=f"Ours: {unit}", title_justify="left", header_style="bold")
    for name in ("case", "thr", "before", "after", "change", "verdict"):
        table.add_column(name, justify="left" if name in ("case", "verdict") else "right")
    styles = {"slower": "bold red", "now failing": "bold red", "faster": "green"}
    for change in changes:
        style = styles.get(change.verdict, "")
        table.add_row(
            change.id,
            str(change.threads),
            *(
                text.NOT_MEASURED if v is None else f"{v:.3g}"
                for v in (change.before, change.after)
            ),
            text.NOT_MEASURED if change.change is None else f"{100 * change.change:+.1f}%",
            f"[{style}]{change.verdict}[/]" if style else change.verdict,
        )
    return table
