"""The report as one HTML file: styles and figures are in it, nothing is fetched."""

from __future__ import annotations

import math
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from llmkern.bench import text
from llmkern.bench.plots import figures
from llmkern.bench.registry import EAGER, OURS
from llmkern.bench.store import Row, Run

_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; color: #0b0b0b;
  background: #fcfcfb; margin: 0 auto; padding: 2rem 1.5rem 4rem; max-width: 1400px; }
h1 { font-size: 1.6rem; margin: 0 0 .25rem; } h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem; }
p, li { max-width: 75ch; } .muted { color: #6b6a65; }
.tiles { display: flex; flex-wrap: wrap; gap: .75rem; margin: 1.25rem 0; }
.tile { background: #fff; border: 1px solid #e1e0d9; border-radius: 8px; padding: .6rem 1rem; }
.tile b { display: block; font-size: 1.5rem; font-weight: 600; }
.tile span { color: #6b6a65; font-size: .85rem; }
figure { margin: 1rem 0; background: #fff; border: 1px solid #e1e0d9; border-radius: 8px;
  padding: .75rem; } figure svg { width: 100%; height: auto; display: block; }
.pair { display: flex; flex-wrap: wrap; gap: 1rem; } .pair figure { flex: 1 1 460px; }
.scroll { overflow-x: auto; margin: .75rem 0; }
table { border-collapse: collapse; font-size: .82rem; font-variant-numeric: tabular-nums; }
th { text-align: left; color: #6b6a65; font-weight: 600; border-bottom: 1px solid #c9c8c0;
  cursor: default; vertical-align: bottom; }
th, td { padding: .28rem .45rem; white-space: nowrap; } td.wrap { white-space: normal; }
td { border-bottom: 1px solid #efeee8; } td.n, th.n { text-align: right; }
.win { color: #0a6b3d; font-weight: 600; } .loss { color: #b3261e; font-weight: 600; }
.failed td { background: #fdecea; } .status { font-weight: 600; color: #b3261e; }
"""

_PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>llmkern benchmark, $date</title><style>$style</style></head><body>
<h1>llmkern against torch</h1>
<p class="muted">$subtitle</p>
<div class="tiles">$tiles</div>
$sections
<h2>How this was measured</h2>
$methods
</body></html>
""")

_METHODS = """<ul>
<li>Every case first passes a correctness gate: the error of each output and gradient against
float64 is at most twice torch's own in the same dtype, plus a floor. A case that fails is listed
as failed and not timed.</li>
<li>The variants of a case take turns, call by call, in one process. Times are medians; ± is half
the interquartile range.</li>
<li>"eager" is the torch code as shipped. "best torch" is the fastest of all torch variants of the
case, including those that do less work (dropout left out); the name says which.</li>
<li>"of peak" is the roofline time over the measured time, with this machine's measured multiply-add
rate and the bandwidth of a copy as large as the case.</li>
<li>Peak memory is resident memory at the worst moment of a call over the moment before it, outputs
included, read from the kernel (VmHWM, reset before the call, free heap pages given back).</li>
<li>A dash is something that was not measured.</li>
</ul>"""


def render(run: Run) -> str:
    drawn = figures(run)
    sections = []
    bars = [svg for name, svg in drawn.items() if name.startswith("speedup-")]
    if bars:
        sections.append(_section("Speed against torch eager", "".join(map(_figure, bars))))
    if "length" in drawn:
        body = _figure(drawn["length"]) + _memory_table(run.memory)
        sections.append(_section("Attention against sequence length", body))
    if "roofline" in drawn:
        sections.append(_section("Roofline", _figure(drawn["roofline"])))
    if run.training:
        sections.append(_section("Training run", _training(run.training, drawn)))
    for suite in dict.fromkeys(row.suite for row in run.rows):
        rows = [row for row in run.rows if row.suite == suite]
        body = _rows_table(rows) + _variants(rows)
        sections.append(_section(f"All {suite} cases", body))
    problems = _problems(run.rows)
    if problems:
        sections.append(_section("Not measured, and why", problems))
    sections.append(_section("Machine", _machine(run.machine)))
    return _PAGE.substitute(
        date=escape(str(run.machine.get("date", ""))),
        style=_STYLE,
        subtitle=escape(_subtitle(run.machine)),
        tiles=_tiles(run),
        sections="\n".join(sections),
        methods=_METHODS,
    )


def save(run: Run, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render(run), encoding="utf-8")


def _section(title: str, body: str) -> str:
    return f"<h2>{escape(title)}</h2>\n{body}"


def _figure(svg: str) -> str:
    return f"<figure>{svg}</figure>"


def _subtitle(machine: dict[str, Any]) -> str:
    isas = ", ".join(machine.get("isas", [])) or "no compiled extension"
    return (
        f"{text.hardware(machine)} ({isas}); torch "
        f"{machine.get('torch')}, llmkern {machine.get('llmkern')}, Python "
        f"{machine.get('python')}; {machine.get('date')}"
    )


def _tiles(run: Run) -> str:
    """Counts, and the geometric mean of the speed-ups suite by suite."""
    timed = [row for row in run.rows if row.speedup is not None and "sweep" not in row.tags]
    tiles = []
    for suite in dict.fromkeys(row.suite for row in timed):
        logs = [math.log(row.speedup) for row in timed if row.suite == suite and row.speedup]
        mean = math.exp(sum(logs) / len(logs))
        tiles.append((text.ratio(mean), f"{suite}: geometric mean of {len(logs)} against eager"))
    wins = sum((row.speedup or 0) >= 1 for row in timed)
    tiles.append((f"{wins} / {len(timed)}", "cases at least as fast as eager"))
    failed = sum(row.status == "failed" for row in run.rows)
    tiles.append((str(failed), "failed the correctness gate"))
    return "".join(f'<div class="tile"><b>{b}</b><span>{escape(s)}</span></div>' for b, s in tiles)


def _table(head: list[str], body: list[tuple[str, list[str]]]) -> str:
    """Rows are (class, cells); a cell is HTML, right-aligned where the head begins with '>'."""
    right = [name.startswith(">") for name in head]
    align = ['class="n"' if r else "" for r in right]
    heads = "".join(
        f"<th {a}>{escape(name.lstrip('>'))}</th>" for a, name in zip(align, head, strict=True)
    )
    lines = []
    for css, cells in body:
        tds = "".join(f"<td {a}>{cell}</td>" for a, cell in zip(align, cells, strict=True))
        lines.append(f'<tr class="{css}">{tds}</tr>')
    return f'<div class="scroll"><table><tr>{heads}</tr>{"".join(lines)}</table></div>'


def _colored(value: float | None) -> str:
    if value is None:
        return text.NOT_MEASURED
    css = "win" if value >= 1.05 else "loss" if value < 0.95 else ""
    return f'<span class="{css}">{text.ratio(value)}</span>'


def _rows_table(rows: list[Row]) -> str:
    head = ["case", "shape", "dtype", "pass", ">thr", ">llmkern", ">±", ">torch eager", ">±",
            ">× eager", ">× best torch", "best torch", ">rate", ">of peak", "bound", ">peak mem",
            ">torch mem", ">error / torch's", "ran on"]  # fmt: skip
    body = []
    for row in rows:
        start = [escape(text.title(row)), escape(text.shape(row)), row.dtype, row.direction]
        start.append(str(row.threads))
        if row.status != "ok":
            status = f'<span class="status">{escape(row.status)}</span>'
            body.append(("failed", [*start, status, *[""] * 12, escape(text.engine(row))]))
            continue
        ours, eager, best = row.variant(OURS), row.variant(EAGER), row.best_torch
        cells = [
            text.duration(row.median_us(OURS)),
            text.spread(row, OURS),
            text.duration(row.median_us(EAGER)),
            text.spread(row, EAGER),
            _colored(row.speedup),
            _colored(best[1]) if best else text.NOT_MEASURED,
            escape(best[0]) if best else "",
            text.rate(row),
            text.share(row.peak_share),
            row.bound,
            text.size(ours and ours.peak_bytes),
            text.size(eager and eager.peak_bytes),
            text.ratio(row.error_ratio),
            escape(text.engine(row)),
        ]
        body.append(("", [*start, *cells]))
    return _table(head, body)


def _variants(rows: list[Row]) -> str:
    """Each variant of each case with its time, and where its work differs from the case's."""
    body = [
        ("", [escape(text.title(row)), escape(text.shape(row)), row.dtype, row.direction,
              str(row.threads), escape(variant.name), text.duration(row.median_us(variant.name)),
              text.spread(row, variant.name), text.size(variant.peak_bytes), escape(variant.note)])
        for row in rows
        for variant in row.variants
        if variant.timing is not None
    ]  # fmt: skip
    if not body:
        return ""
    head = ["case", "shape", "dtype", "pass", ">thr", "variant", ">time", ">±", ">peak mem",
            "what it does otherwise"]  # fmt: skip
    return f"<details><summary>Every variant</summary>{_table(head, body)}</details>"


def _memory_table(entries: list[dict[str, Any]]) -> str:
    if not entries:
        return ""
    lengths = sorted({e["S"] for e in entries})
    body = []
    for name, direction in dict.fromkeys((e["variant"], e["direction"]) for e in entries):
        cells = [escape(name), direction]
        for length in lengths:
            found = [
                e for e in entries
                if (e["variant"], e["direction"], e["S"]) == (name, direction, length)
            ]  # fmt: skip
            peak = found[0]["peak_bytes"] if found else None
            cells.append(text.size(peak) if peak is not None else escape(found[0]["reason"]))
        body.append(("", cells))
    sizes = f"B=1 H={entries[0]['H']} D={entries[0]['D']}, fp32, causal, fresh process each"
    return f'<p class="muted">Peak memory over the inputs, {sizes}.</p>' + _table(
        ["variant", "pass", *(f">S={length}" for length in lengths)], body
    )


def _training(results: list[dict[str, Any]], drawn: dict[str, str]) -> str:
    plots = "".join(_figure(drawn[f"loss-{i}"]) for i in range(len(results)))
    body = []
    for result in results:
        for arm in result["arms"]:
            body.append(
                (
                    "",
                    [
                        escape(result["name"]),
                        escape(arm["name"]),
                        str(len(arm["losses"])),
                        f"{arm['tokens_per_s']:.0f}",
                        f"±{100 * arm['spread']:.0f}%",
                        _colored(arm["speedup"]) if arm["name"] == OURS else "",
                        text.size(arm["peak_bytes"]),
                        f"{arm['losses'][-1]:.4f}",
                    ],
                )
            )
    table = _table(
        ["run", "model", ">steps", ">tokens/s", ">±", ">× eager", ">peak mem of a step",
         ">last loss"], body
    )  # fmt: skip
    verdicts = "".join(
        f"<li>{escape(r['name'])}: loss curves "
        f"{'agree' if r['agreement']['agrees'] else '<b>do not agree</b>'}; "
        f"{escape(r['agreement']['statement'])}.</li>"
        for r in results
    )
    first = results[0]
    about = (
        f"A decoder-only byte-level language model of torch.nn layers "
        f"({first['parameters'] / 1e6:.1f} M parameters, context {first['model']['context']}, "
        f"batch {first['batch']}) on the sources of Python's standard library, AdamW. The models "
        "start from the same weights, see the same batches and take turns step by step."
    )
    return f'<p>{about}</p><div class="pair">{plots}</div>{table}<ul>{verdicts}</ul>'


def _problems(rows: list[Row]) -> str:
    lines = [f"{row.id}: {row.status}: {row.reason}" for row in rows if row.status != "ok"]
    lines += [
        f"{row.id}: {variant.name}: {variant.reason}"
        for row in rows
        for variant in row.variants
        if variant.reason
    ]
    return f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>" if lines else ""


def _machine(machine: dict[str, Any]) -> str:
    facts = [
        ("caches", ", ".join(f"{k} {v}" for k, v in machine.get("caches", {}).items())),
        ("system", machine.get("system", "")),
        ("load average before / after", f"{_load(machine, 'before')} / {_load(machine, 'after')}"),
        ("duration", f"{machine.get('seconds', 0):.0f} s"),
        ("allocator", machine.get("allocator", "")),
    ]
    plain = _table(["", ""], [("", [escape(k), escape(str(v))]) for k, v in facts if v])
    peaks = machine.get("peaks", {})
    return plain + _peak_tables(peaks.get("flops", {}), peaks.get("bandwidth", {}))


def _peak_tables(flops: dict[str, float], bandwidth: dict[str, float]) -> str:
    """Measured peaks: multiply-adds by instruction set, bandwidth by size of the working set."""
    if not flops or not bandwidth:
        return ""
    threads = sorted({int(key.rsplit(" ", 1)[1]) for key in flops})
    units = dict.fromkeys(key.rsplit(" ", 1)[0] for key in flops)
    compute = _table(
        ["peak GFLOP/s", *(f">{count} thr" for count in threads)],
        [("", [unit.replace("bf16", "bf16 dot"), *(_peak(flops, unit, n) for n in threads)])
         for unit in units if any(flops.get(f"{unit} {n}") for n in threads)],
    )  # fmt: skip
    columns = sorted({(key.rsplit(" ", 2)[0], int(key.rsplit(" ", 1)[1])) for key in bandwidth})
    sizes = sorted({int(key.rsplit(" ", 2)[1]) for key in bandwidth})
    moved = _table(
        ["GB/s at a working set of", *(f">{move}, {n} thr" for move, n in columns)],
        [("", [_binary(size), *(_peak(bandwidth, f"{move} {size}", n) for move, n in columns)])
         for size in sizes],
    )  # fmt: skip
    return compute + moved


def _peak(peaks: dict[str, float], name: str, threads: int) -> str:
    value = peaks.get(f"{name} {threads}")
    return text.NOT_MEASURED if value is None else f"{value / 1e9:.0f}"


def _binary(nbytes: int) -> str:
    return f"{nbytes >> 20} MiB" if nbytes >= 2**20 else f"{nbytes >> 10} KiB"


def _load(machine: dict[str, Any], when: str) -> str:
    value = machine.get(f"load_{when}")
    return text.NOT_MEASURED if value is None else f"{value:.2f}"
