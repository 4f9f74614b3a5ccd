"""`llmkern profile`: what a GPU backend's kernels do for one case, counted in the emulator.

Warp instructions, sectors of global memory, wavefronts of shared memory and tensor-core
instructions are exact counts of the PTX; they are no times. Bytes are held against the op's
minimum (every input read once, every output written once; llmkern/cost.py).
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from llmkern import cost, dispatch, emulator
from llmkern.bench import against_peers, command, peers, registry
from llmkern.bench.suites import kernels

BACKENDS = ("triton", "cuda")


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "profile",
        help="count what a GPU backend's kernels do for a benchmark case, in the emulator",
        description="Needs no GPU. Counts are of the PTX, of an emulated card; they are not times.",
    )
    parser.add_argument(
        "filter", nargs="?", metavar="WORDS", help="e.g. attention/causal, layer_norm"
    )
    parser.add_argument(
        "--against-peers",
        action="store_true",
        help="our Triton kernels beside those of other projects, on sm_80",
    )
    parser.add_argument("--backend", choices=BACKENDS, default="triton")
    parser.add_argument("--target", default="sm_80", metavar="SM", help="emulated architecture")
    parser.add_argument("--dtype", type=command.dtype_list, metavar="D[,D]",
                        default=[torch.bfloat16])  # fmt: skip
    parser.add_argument("--lines", type=int, default=10, help="hottest source lines per kernel")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the counts; - for stdout")
    parser.set_defaults(run=run_command)


def run_command(arguments: argparse.Namespace) -> int:
    if arguments.against_peers:
        return _against_peers(arguments.filter, arguments.json)
    if arguments.filter is None:
        raise ValueError("profile: name a case, as `llmkern explain` does, or --against-peers")
    cases = registry.select(kernels.default(arguments.dtype), arguments.filter)
    if not cases:
        raise ValueError(f"no case matches {arguments.filter!r}")
    to_stdout = str(arguments.json) == "-"
    results = []
    for case in cases:
        result, report = profile(case, arguments.backend, arguments.target, arguments.lines)
        results.append(result)
        if not to_stdout:
            print(f"{case.id} on {arguments.backend}, emulated {arguments.target}")
            print(
                f"bytes {result['global_bytes']:,} of {result['minimum_bytes']:,} at the least "
                f"({result['bytes_ratio']:.2f}x), {result['mma']:,} mma, "
                f"{result['warp_instructions']:,} warp instructions\n"
            )
            print(f"{report}\n")
    _write(results, arguments.json)
    return 0


def _write(results: list[dict[str, Any]], file: Path | None) -> None:
    if file is not None:
        text = json.dumps(results, indent=1)
        print(text) if str(file) == "-" else file.write_text(text + "\n")


def _against_peers(words: str | None, file: Path | None) -> int:
    """Exit code 1 where a peer needs less of something."""
    rows = list(against_peers.measure(words))
    if not rows:
        raise ValueError(f"no row matches {words!r}")
    if str(file) != "-":
        print(against_peers.table(rows))
        print(f"\nours / best peer ({peers.DATE}: {', '.join(peers.SOURCES)})")
    _write([row.row() for row in rows], file)
    return 1 if any(row.excess for row in rows) else 0


def profile(
    case: registry.Case, backend: str, target: str, lines: int = 10
) -> tuple[dict[str, Any], str]:
    """(counts of one call of the case, the emulator's report of it).

    Raises:
        BackendError: the backend does not serve the case.
        EmulatorError: a check of the emulator stopped a kernel.
    """
    tensors = registry.inputs_of(case, torch.device("cpu"))
    ours = next(variant for variant in case.variants if variant.name == registry.OURS)
    with emulator.device(target) as dev, dispatch.use_backend(backend):
        step = ours.prepare(tensors)
        with dispatch.recording() as records:
            step()
        counters, kernels_run = dev.counters(), dev.kernels()
        report = dev.report(lines)
        by_kernel = {name: _counts(dev.counters(name)) for name in kernels_run}
    minimum = sum(cost.of(op, spec).bytes for op, spec, _ in records)
    if case.backward:
        minimum += sum(cost.backward(op, spec).bytes for op, spec, _ in records)
    found = {
        "case": case.id,
        "backend": backend,
        "target": target,
        "minimum_bytes": minimum,
        "bytes_ratio": counters.global_bytes / minimum if minimum else 0.0,
        **_counts(counters),
        "kernels": by_kernel,
    }
    return found, report


def _counts(counters: emulator.Counters) -> dict[str, Any]:
    return {
        "launches": counters.launches,
        "warp_instructions": counters.warp_instructions,
        "mma": counters.mma,
        "global_bytes": counters.global_bytes,
        "coalescing": counters.total.coalescing,
        "conflicts": counters.total.conflicts,
        "active": counters.total.active,
        "by_class": {name: asdict(sums) for name, sums in counters.by_class.items()},
    }
