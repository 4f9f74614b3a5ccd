"""Runs the tests of CPU kernels and modules under each instruction set that this machine has.

Ours (LLMKERN_CPU_ISA) against torch's (ATEN_CPU_CAPABILITY), with 1, 2 and 3 threads: all three for
what this machine takes by itself, then every instruction set of ours with torch's best and with its
lowest, then what other machines are: one with AVX2 alone, in which oneDNN and MKL are held down as
well, and one without AMX. One log a run, a table at the end; exit 1 if a test failed in any run.

    python tools/isa_matrix.py [--list] [--only TEXT] [--logs FOLDER] [arguments of pytest]

--only leaves out the runs in whose name ("avx2 avx512 all 3") TEXT does not occur.
"""

import argparse
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
SELECTION = "not slow and not off_cpu"
LEVELS = ("default", "avx2", "avx512")  # ATEN_CPU_CAPABILITY on x86, lowest first
TIMEOUT_S = 1800
# What holds oneDNN and MKL down to a machine of that kind; each is without effect elsewhere.
LIBRARIES = {
    "all": {},
    "no amx": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_FP16"},
    "avx2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "sse4": {"ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
}
VARIABLES = ("LLMKERN_CPU_ISA", "ATEN_CPU_CAPABILITY", "DNNL_MAX_CPU_ISA", *LIBRARIES["avx2"])

# torch asks the CPU, not oneDNN, whether 16-bit products exist: held down to AVX2, oneDNN has none.
PYTEST = """
import sys, pytest, torch
if sys.argv.pop(1) in ("avx2", "sse4"):
    torch.backends.mkldnn.set_flags(False)
sys.exit(pytest.main(sys.argv[1:]))
"""
MACHINE = """
import torch
from llmkern.backends.cpu import _ext
loaded = _ext.load()
print(*(loaded.module.isa_names() if loaded.module else ["none:", loaded.reason]))
print(torch.backends.cpu.get_cpu_capability().lower())
"""


class Run(NamedTuple):
    isa: str
    torch: str
    libraries: str
    threads: int

    def __str__(self) -> str:
        return " ".join(map(str, self))


class Outcome(NamedTuple):
    run: Run
    code: int
    seconds: float
    counts: dict[str, int]


def runs(isas: list[str], levels: list[str], amx: bool) -> list[Run]:
    """isas: ours, best first; levels: torch's, lowest first."""
    best, lowest = levels[-1], levels[0]
    chosen = [Run(isas[0], best, "all", threads) for threads in (1, 2, 3)]
    chosen += [Run(isa, best, "all", 1 + i % 3) for i, isa in enumerate(isas[1:], 1)]
    if lowest != best:
        # The first with torch's kernels alone held down, as a user of the variable has it.
        chosen += [
            Run(isa, lowest, "sse4" if i else "all", 1 + (i + 1) % 3) for i, isa in enumerate(isas)
        ]
    if best == "avx512":
        chosen.append(Run(isas[0], "avx2", "all", 3))
        chosen += [Run(isa, "avx2", "avx2", 2) for isa in isas if isa == "avx2"]
    if amx:
        chosen.append(Run(isas[0], best, "no amx", 2))
    return chosen


def machine() -> tuple[list[str], list[str], bool]:
    environment = {k: v for k, v in os.environ.items() if k not in VARIABLES}
    out = subprocess.run(
        [sys.executable, "-c", MACHINE],
        cwd=ROOT, env=environment, check=True, capture_output=True, text=True,
    ).stdout.splitlines()  # fmt: skip
    isas, level = out[0].split(), out[1]
    if isas[0] == "none:":
        sys.exit(f"the cpu extension must be built for the tests: {out[0]}")
    levels = LEVELS[: LEVELS.index(level) + 1] if level in LEVELS else ("default",)
    flags = Path("/proc/cpuinfo")
    return isas, list(levels), flags.exists() and " amx_tile " in flags.read_text()


def run_tests(run: Run, log: Path, arguments: list[str]) -> Outcome:
    environment = {k: v for k, v in os.environ.items() if k not in VARIABLES} | {
        "LLMKERN_CPU_ISA": run.isa,
        "ATEN_CPU_CAPABILITY": run.torch,
        "OMP_NUM_THREADS": str(run.threads),
        "MKL_NUM_THREADS": str(run.threads),
        "OMP_WAIT_POLICY": "passive",  # more threads than cores must not wait for each other busily
    }
    command = [sys.executable, "-c", PYTEST, run.libraries]
    command += ["-m", SELECTION, "-p", "no:cacheprovider", *arguments]
    start = time.monotonic()
    with log.open("w") as file:
        try:
            code = subprocess.run(
                command, cwd=ROOT, env=environment | LIBRARIES[run.libraries],
                stdout=file, stderr=subprocess.STDOUT, timeout=TIMEOUT_S,
            ).returncode  # fmt: skip
        except subprocess.TimeoutExpired:
            code = 124
    lines = log.read_text(errors="replace").splitlines()
    counts = {kind: int(n) for n, kind in re.findall(r"(\d+) (\w+)", lines[-1] if lines else "")}
    for line in lines:
        if line.startswith(("FAILED", "ERROR")):
            print(f"    {line}", flush=True)
    return Outcome(run, code, time.monotonic() - start, counts)


def table(outcomes: list[Outcome]) -> str:
    kinds = ("passed", "failed", "skipped")
    rows = [("llmkern", "torch", "libraries", "threads", *kinds, "seconds", "exit")]
    for run, code, seconds, counts in outcomes:
        counts = counts | {"failed": sum(counts.get(k, 0) for k in ("failed", "error", "errors"))}
        numbers = [str(counts.get(kind, 0)) for kind in kinds]
        rows.append((*map(str, run), *numbers, f"{seconds:.0f}", str(code)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(map(str.ljust, row, widths)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--list", action="store_true", help="name the runs and end")
    parser.add_argument("--only", default="", help="runs in whose name this text occurs")
    parser.add_argument("--logs", type=Path, default=ROOT / "reports" / "isa")
    options, arguments = parser.parse_known_args()
    chosen = [run for run in runs(*machine()) if options.only in str(run)]
    if options.list or not chosen:
        print("\n".join(map(str, chosen)) or f"no run has {options.only!r} in its name")
        return 0 if chosen else 2
    options.logs.mkdir(parents=True, exist_ok=True)
    outcomes = []
    for run in chosen:
        print(f"{run} ...", flush=True)
        log = options.logs / (str(run).replace(" ", "-") + ".log")
        outcomes.append(run_tests(run, log, arguments))
    print(f"\n{table(outcomes)}\n\nlogs: {options.logs}")
    return int(any(outcome.code != 0 for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
