"""The rows of a run as a Markdown table, losses beside wins, for a README."""

from __future__ import annotations

from llmkern.bench import text
from llmkern.bench.registry import EAGER, OURS
from llmkern.bench.store import Row, Run

_HEAD = "| case | shape | dtype | llmkern | torch eager | × eager | × best torch | memory |"


def render(run: Run) -> str:
    machine = run.machine
    lines = [
        f"{text.hardware(machine)} ({', '.join(machine['isas'])}), torch "
        f"{machine['torch']}, {machine['date']}.",
        "",
        _HEAD,
        "|" + "---|" * (_HEAD.count("|") - 1),
        *(_line(row) for row in run.rows if "sweep" not in row.tags),
    ]
    return "\n".join(lines)


def _line(row: Row) -> str:
    name = f"{text.title(row)} {row.direction}"
    if row.status != "ok":
        return f"| {name} | {text.shape(row)} | {row.dtype} | {row.status} | | | | |"
    best = row.best_torch
    ours, eager = row.variant(OURS), row.variant(EAGER)
    memory = (
        f"{text.size(ours and ours.peak_bytes)} against {text.size(eager and eager.peak_bytes)}"
    )
    cells = [
        name,
        text.shape(row),
        row.dtype,
        text.duration(row.median_us(OURS)),
        text.duration(row.median_us(EAGER)),
        text.ratio(row.speedup),
        f"{text.ratio(best[1])} ({best[0]})" if best else text.NOT_MEASURED,
        memory,
    ]
    return f"| {' | '.join(cells)} |"
