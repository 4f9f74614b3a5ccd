"""How figures are written, in the terminal and in the HTML report alike."""

from __future__ import annotations

from typing import Any

from llmkern.bench.store import Row

NOT_MEASURED = "–"


def duration(us: float | None) -> str:
    if us is None:
        return NOT_MEASURED
    if us < 1e3:
        return f"{us:.1f} µs"
    return f"{us / 1e3:.2f} ms" if us < 1e6 else f"{us / 1e6:.2f} s"


def spread(row: Row, variant: str) -> str:
    """± half the interquartile range, in percent of the median."""
    result = row.variant(variant)
    if result is None or result.timing is None:
        return NOT_MEASURED
    return f"±{100 * result.timing.spread:.0f}%"


def size(nbytes: float | None) -> str:
    """Peak memory; what is below the operating system's own granularity is not spelled out."""
    if nbytes is None:
        return NOT_MEASURED
    if nbytes < 2**20:
        return "<1 MiB"
    return f"{nbytes / 2**20:.0f} MiB" if nbytes < 10 * 2**30 else f"{nbytes / 2**30:.1f} GiB"


def ratio(value: float | None) -> str:
    return NOT_MEASURED if value is None else f"{value:.2f}×"


def share(value: float | None) -> str:
    return NOT_MEASURED if value is None else f"{100 * value:.0f}%"


def rate(row: Row) -> str:
    measured = row.rate
    return NOT_MEASURED if measured is None else f"{measured[0]:.1f} {measured[1]}"


def shape(row: Row) -> str:
    return " ".join(f"{axis}={length}" for axis, length in row.shape.items())


def compact_shape(row: Row) -> str:
    """For a figure's labels: 2048×768, or axes without their equals signs."""
    if set(row.shape) == {"rows", "cols"}:
        return f"{row.shape['rows']}×{row.shape['cols']}"
    return " ".join(f"{axis}{length}" for axis, length in row.shape.items())


def title(row: Row) -> str:
    return f"{row.op} {row.label}".strip()


def engine(row: Row) -> str:
    return f"{row.backend}/{row.isa}" if row.isa else row.backend


def hardware(machine: dict[str, Any]) -> str:
    """The card, if there was one, the CPU and its cores."""
    card = machine.get("accelerator")
    return f"{f'{card}, ' if card else ''}{machine.get('cpu')}, {machine.get('cores')} cores"


def notes(rows: list[Row]) -> list[str]:
    """Variants whose work differs from their case's, each once: "name: how"."""
    found = {(v.name, v.note) for row in rows for v in row.variants if v.note and v.timing}
    return [f"{name}: {note}" for name, note in sorted(found)]
