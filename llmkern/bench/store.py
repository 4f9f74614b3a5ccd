"""The JSON file of a run, and the comparison of two of them.

`compare` joins rows on case, dtype and threads and looks at the ratio of ours to torch eager in
the same run, because a ratio of two things measured in turns moves with the code and hardly with
the machine. `metric="time"` compares our own medians instead, which is meaningful on one quiet
machine only. A change counts when it exceeds the threshold and the two interquartile ranges are
apart. A row that passed the gate before and fails it now is always a regression.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from llmkern.bench.registry import EAGER, OURS, is_torch
from llmkern.bench.timers import Timing

SCHEMA = 1

Metric = Literal["ratio", "time"]


@dataclass
class VariantResult:
    """One variant of a case: its timing, or why there is none, and its peak memory."""

    name: str
    timing: Timing | None = None
    peak_bytes: int | None = None
    note: str = ""
    reason: str = ""


@dataclass
class Row:
    """One case as measured. `status` is "ok", "failed" (the gate refused the result), "error" (it
    raised) or, in older files, "skipped" (no time was left); `reason` says more."""

    id: str
    suite: str
    op: str
    label: str
    shape: dict[str, int]
    dtype: str
    direction: str
    threads: int
    device: str
    backend: str
    isa: str
    status: str
    reason: str = ""
    flops: float = 0.0
    nbytes: float = 0.0
    error_ours: float | None = None
    error_torch: float | None = None
    error_ratio: float | None = None
    bound: str = ""
    peak_share: float | None = None
    variants: list[VariantResult] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)

    def variant(self, name: str) -> VariantResult | None:
        return next((v for v in self.variants if v.name == name), None)

    def median_us(self, name: str) -> float | None:
        variant = self.variant(name)
        return variant.timing.median_us if variant and variant.timing else None

    @property
    def speedup(self) -> float | None:
        """Times as fast as torch eager; None for a case that failed, whatever it holds."""
        if self.status != "ok":
            return None
        ours, eager = self.median_us(OURS), self.median_us(EAGER)
        return eager / ours if ours and eager else None

    @property
    def best_torch(self) -> tuple[str, float] | None:
        """(name, times as fast as it) for the fastest variant that is torch's."""
        ours = self.median_us(OURS)
        timed = [
            (v.timing.median_us, v.name) for v in self.variants if v.timing and is_torch(v.name)
        ]
        if not ours or not timed:
            return None
        median, name = min(timed)
        return name, median / ours

    @property
    def rate(self) -> tuple[float, str] | None:
        """(GFLOP/s, unit), or (GB/s, unit) for a case that counts no FLOPs."""
        ours = self.median_us(OURS)
        if not ours or not (self.flops or self.nbytes):
            return None
        if self.flops:
            return self.flops / ours * 1e-3, "GFLOP/s"
        return self.nbytes / ours * 1e-3, "GB/s"


@dataclass
class Run:
    """Everything one invocation measured; what the table, the JSON file and the HTML show."""

    machine: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    memory: list[dict[str, Any]] = field(default_factory=list)
    training: list[dict[str, Any]] = field(default_factory=list)
    schema: int = SCHEMA


def save(run: Run, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(run), indent=1, allow_nan=False) + "\n", encoding="utf-8")


def load(path: Path) -> Run:
    """Read a run; raises ValueError with the path when the file is not one of ours."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["schema"] != SCHEMA:
            raise ValueError(f"schema {data['schema']}, this version reads {SCHEMA}")
        rows = []
        for row in data.pop("rows"):
            variants = []
            for variant in row.pop("variants"):
                timing = variant.pop("timing")
                variants.append(VariantResult(timing=timing and Timing(**timing), **variant))
            rows.append(Row(variants=variants, **row))
        return Run(rows=rows, **data)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path}: not a result file of llmkern bench: {error}") from error


@dataclass(frozen=True)
class Change:
    """A row of two runs: `before` and `after` in the metric, `change` > 0 when it got slower."""

    id: str
    threads: int
    before: float | None
    after: float | None
    change: float | None
    verdict: str  # "ok", "slower", "faster", "within spread", "now failing", "missing", "new"

    @property
    def regressed(self) -> bool:
        return self.verdict in ("slower", "now failing")


def _interval(row: Row, metric: Metric) -> tuple[float, ...] | None:
    """(low, median, high) of our time, or of our time over torch's, for a timed row."""
    mine = row.variant(OURS)
    if row.status != "ok" or mine is None or mine.timing is None:
        return None
    t = mine.timing
    if metric == "time":
        return t.p25_us, t.median_us, t.p75_us
    base = row.median_us(EAGER)
    return None if not base else (t.p25_us / base, t.median_us / base, t.p75_us / base)


def compare(
    before: Run,
    after: Run,
    *,
    threshold: float = 0.1,
    metric: Metric = "ratio",
) -> list[Change]:
    """Changes of `after` against `before`, one per row of either."""
    old = {(row.id, row.threads): row for row in before.rows}
    new = {(row.id, row.threads): row for row in after.rows}
    changes = []
    for key in dict.fromkeys([*old, *new]):
        a = _interval(old[key], metric) if key in old else None
        b = _interval(new[key], metric) if key in new else None
        change = b[1] / a[1] - 1 if a and b else None
        if key not in new:
            verdict = "missing"
        elif key not in old:
            verdict = "new"
        elif a is not None and b is None:
            verdict = "now failing"
        elif a is None or b is None or abs(b[1] / a[1] - 1) <= threshold:
            verdict = "ok"
        elif a[0] <= b[2] and b[0] <= a[2]:
            verdict = "within spread"
        else:
            verdict = "slower" if b[1] > a[1] else "faster"
        changes.append(Change(*key, a and a[1], b and b[1], change, verdict))
    return changes
