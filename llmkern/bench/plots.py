"""The report's figures as inline SVG, drawn with matplotlib.

Two hues carry identity everywhere: ours is blue, torch is orange. Text is drawn as outlines, so a
report looks the same wherever it is opened, and no figure refers to anything outside the page.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from llmkern.bench import text
from llmkern.bench.registry import EAGER, OURS
from llmkern.bench.store import Row, Run

BLUE, ORANGE, AQUA, VIOLET = "#2a78d6", "#eb6834", "#1baf7a", "#4a3aa7"
INK, MUTED, GRID = "#0b0b0b", "#6b6a65", "#e1e0d9"
STYLE = {
    "svg.fonttype": "path",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "lines.linewidth": 2,
    "lines.markersize": 6,
    "legend.frameon": False,
}


def to_svg(figure: Figure, name: str) -> str:
    """The figure as an <svg> element for an HTML page; `name` keeps ids of several ones apart."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "path"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # An HTML parser knows both namespaces, and a page without addresses is plainly self-contained.
    svg = re.sub(r'\s+xmlns(:xlink)?="[^"]*"', "", svg)
    svg = re.sub(r'(?<=<svg )([^>]*?)width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg [^>]*?)height="[^"]*"', r"\1", svg, count=1)
    return _unique_ids(svg, name)


def _unique_ids(svg: str, name: str) -> str:
    """Prefix every id and every reference to one."""
    prefix = re.sub(r"[^a-z0-9]+", "-", name.lower())
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    return re.sub(r'(href="#|url\(#)', rf"\g<1>{prefix}-", svg)


def _figure(width: float, height: float, columns: int = 1) -> tuple[Figure, Sequence[Axes]]:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = [figure.add_subplot(1, columns, i + 1) for i in range(columns)]
    return figure, axes


def speedup_bars(rows: Sequence[Row]) -> Figure | None:
    """Times as fast as torch eager, a dot where the best torch baseline stands."""
    timed = [row for row in rows if row.speedup is not None]
    if not timed:
        return None
    timed.sort(key=lambda row: row.speedup or 0.0)
    with matplotlib.rc_context(STYLE):
        figure, (axes,) = _figure(11, 0.27 * len(timed) + 1.0)
        values = [row.speedup or 0.0 for row in timed]
        places = range(len(timed))
        colors = [BLUE if value >= 1 else ORANGE for value in values]
        axes.barh(places, [v - 1 for v in values], left=1, height=0.62, color=colors)
        low, high = min([0.9, *values]), max([1.1, *values])
        for place, row in zip(places, timed, strict=True):
            value, best = row.speedup or 0.0, row.best_torch
            wins, end = value >= 1, value
            if best is not None and best[0] != EAGER:
                axes.plot([best[1]], [place], "o", color=INK, markersize=4)
                low, end = min(low, best[1]), value if wins else min(value, best[1])
            axes.annotate(
                text.ratio(value),
                (end, place),
                (5 if wins else -5, 0),
                textcoords="offset points",
                va="center",
                ha="left" if wins else "right",
                fontsize=8.5,
            )
        axes.axvline(1, color=INK, linewidth=1)
        if any(row.best_torch and row.best_torch[0] != EAGER for row in timed):
            axes.plot([], [], "o", color=INK, markersize=4, label="against torch's best")
            axes.legend(loc="lower right", fontsize=9)
        axes.set_xscale("log", base=2)
        axes.set_xlim(low / 1.5, high * 1.35)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}×")
        labels = [
            f"{text.title(row)}  {text.compact_shape(row)}  {row.dtype} {row.direction}"
            for row in timed
        ]
        axes.set_yticks(list(places), labels, fontsize=8.5)
        axes.set_ylim(-0.6, len(timed) - 0.4)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("times as fast as torch eager (log scale)", fontsize=9)
    return figure


def roofline(rows: Sequence[Row], peaks: dict[str, Any]) -> Figure | None:
    """GFLOP/s against FLOPs per byte, under the measured roofs of the rows' thread count."""
    points = [row for row in rows if row.flops and row.nbytes and row.speedup is not None]
    threads = max((row.threads for row in points), default=0)
    points = [row for row in points if row.threads == threads]
    roofs = _roofs(peaks, threads)
    if not points or roofs is None:
        return None
    compute, bandwidths = roofs
    with matplotlib.rc_context(STYLE):
        figure, (axes,) = _figure(11, 5)
        intensity = [row.flops / row.nbytes for row in points]
        low, high = min(0.5, *intensity) / 2, max(*intensity, 64) * 3
        for label, bandwidth, style in bandwidths:
            ridge = compute / bandwidth
            axes.plot([low, ridge, high], [low * bandwidth / 1e9, compute / 1e9, compute / 1e9],
                      style, color=MUTED, linewidth=1.2)  # fmt: skip
            x = low * 1.4
            note = f"{label} {bandwidth / 1e9:.0f} GB/s"
            axes.annotate(note, (x, x * bandwidth / 1e9), (8, -9), textcoords="offset points",
                          fontsize=8.5, color=MUTED)  # fmt: skip
        note = f"fp32 FMA {compute / 1e9:.0f} GFLOP/s"
        axes.annotate(note, (high, compute / 1e9), (0, 5), textcoords="offset points", ha="right",
                      fontsize=8.5, color=MUTED)  # fmt: skip
        for name, color, marker in ((EAGER, ORANGE, "s"), (OURS, BLUE, "o")):
            rates = [row.flops / (row.median_us(name) or float("nan")) * 1e-3 for row in points]
            axes.plot(intensity, rates, marker, color=color, label=name,
                      markeredgecolor="white", markeredgewidth=0.8)  # fmt: skip
        axes.set(xscale="log", yscale="log", xlim=(low, high))
        axes.set_xlabel("FLOPs per byte that must move")
        axes.set_ylabel("GFLOP/s")
        axes.set_title(f"{threads} threads, all dtypes")
        axes.legend(loc="lower right")
    return figure


def _roofs(
    peaks: dict[str, Any], threads: int
) -> tuple[float, list[tuple[str, float, str]]] | None:
    """(fp32 FLOP/s of the best instruction set, [(label, bytes/s, line style)])."""
    compute = [v for k, v in peaks.get("flops", {}).items() if k.endswith(f" fp32 {threads}")]
    copies: dict[int, float] = {}
    for key, value in peaks.get("bandwidth", {}).items():
        move, size, count = key.rsplit(" ", 2)
        if move.startswith("copy") and int(count) == threads:
            copies[int(size)] = max(value, copies.get(int(size), 0.0))
    if not compute or not copies:
        return None
    small, large = 2**18, max(copies)
    lines = [("copy from memory", copies[large], "-")]
    if small in copies:
        lines.append(("copy in cache", copies[small], "--"))
    return max(compute), lines


def against_length(rows: Sequence[Row], memory: Sequence[dict[str, Any]]) -> Figure | None:
    """Time of the attention sweep, and peak memory forward + backward, against S."""
    sweep = sorted(
        (r for r in rows if "sweep" in r.tags and r.speedup is not None),
        key=lambda row: row.shape["S"],
    )
    threads = max((row.threads for row in sweep), default=0)
    sweep = [row for row in sweep if row.threads == threads and row.dtype == sweep[0].dtype]
    if not sweep and not memory:
        return None
    with matplotlib.rc_context(STYLE):
        figure, (left, right) = _figure(11, 4.4, columns=2)
        for name, color, marker in ((OURS, BLUE, "o"), (EAGER, ORANGE, "s")):
            timed = [(row.shape["S"], (row.median_us(name) or 0) / 1e3) for row in sweep]
            if timed:
                left.plot(*zip(*timed, strict=True), marker=marker, color=color, label=name)
        left.set_title("time, causal, forward + backward")
        left.set_ylabel("ms")
        _memory_lines(right, memory)
        for axes in (left, right):
            if not axes.lines:  # a logarithmic axis needs something to show
                axes.set_visible(False)
                continue
            axes.set(xscale="log", yscale="log")
            axes.set_xscale("log", base=2)
            axes.set_xlabel("sequence length S")
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.legend(fontsize=9)
    return figure


def _memory_lines(axes: Axes, memory: Sequence[dict[str, Any]]) -> None:
    both = [e for e in memory if e["direction"] == "fwd+bwd" and e["peak_bytes"] is not None]
    looks = [(BLUE, "o"), (ORANGE, "s"), (AQUA, "^"), (VIOLET, "D")]
    for name, (color, marker) in zip(
        dict.fromkeys(e["variant"] for e in both), looks, strict=False
    ):
        mine = [e for e in both if e["variant"] == name]
        line = [(e["S"], e["peak_bytes"] / 2**20) for e in mine if e["peak_bytes"] > 0]
        if line:
            axes.plot(*zip(*line, strict=True), marker=marker, color=color, label=name)
    axes.set_title("peak memory over inputs, causal, forward + backward")
    axes.set_ylabel("MiB")


def loss_curves(result: dict[str, Any]) -> Figure:
    with matplotlib.rc_context(STYLE):
        figure, (axes,) = _figure(5.4, 3.6)
        looks = {EAGER: (ORANGE, "-"), OURS: (BLUE, "--")}
        for arm in result["arms"]:
            color, style = looks.get(arm["name"], (MUTED, ":"))
            steps = range(1, len(arm["losses"]) + 1)
            axes.plot(steps, arm["losses"], style, color=color, label=arm["name"])
        axes.set_title(result["name"])
        axes.set_xlabel("step")
        axes.set_ylabel("loss, nats per byte")
        axes.legend(fontsize=9)
    return figure


def figures(run: Run) -> dict[str, str]:
    """Name -> inline SVG of every figure that this run has data for."""
    shown = [row for row in run.rows if "sweep" not in row.tags]
    suites = dict.fromkeys(row.suite for row in shown)
    drawn = {
        f"speedup-{suite}": speedup_bars([row for row in shown if row.suite == suite])
        for suite in suites
    }
    drawn |= {
        "roofline": roofline(run.rows, run.machine.get("peaks", {})),
        "length": against_length(run.rows, run.memory),
    }
    drawn |= {f"loss-{i}": loss_curves(result) for i, result in enumerate(run.training)}
    return {name: to_svg(figure, name) for name, figure in drawn.items() if figure is not None}
