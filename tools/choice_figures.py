"""The counts in llmkern/choice.py: what the cuda and triton kernels do for one case of each kind.

    python tools/choice_figures.py            # count anew and write them
    python tools/choice_figures.py --check    # exit code 1 where one moved by over 5 %

Needs triton and the CUDA kernels' emulated build; takes a few minutes. No GPU: nothing is timed.
"""

import argparse
import re
import sys
from pathlib import Path

import torch

from llmkern import choice, dispatch, emulator
from llmkern.bench import profile
from llmkern.bench.cases.attention import attention
from llmkern.bench.cases.linear import linear
from llmkern.bench.cases.norm import layer_norm
from llmkern.bench.registry import Case

TARGET = Path(__file__).resolve().parent.parent / "llmkern" / "choice.py"
MARKS = re.compile(r"(    # figures: begin\n).*(    # figures: end\n)", re.DOTALL)
HALF, SINGLE = torch.bfloat16, torch.float32
CASES = {
    ("norm", "16-bit"): layer_norm(512, 1024, HALF),
    ("norm", "float32"): layer_norm(512, 1024, SINGLE),
    ("attention", "16-bit"): attention(1, 2, 512, 64, HALF, causal=True),
    ("attention", "few rows"): attention(1, 8, 1, 64, HALF, t=1024, backward=False),
    ("linear", "16-bit"): linear(512, 512, 512, HALF, backward=True),
    ("linear", "few rows"): linear(1, 768, 3072, HALF),
    ("linear", "float32"): linear(256, 256, 256, SINGLE, backward=True),
    ("linear", "tf32"): linear(512, 512, 512, SINGLE, backward=True),
}
TOLERANCE = 0.05


def missing() -> str | None:
    with emulator.device("sm_80"):
        statuses = [dispatch.status(name) for name in choice.BACKENDS]
    return next((f"{s.name}: {s.detail}" for s in statuses if not s.available), None)


def count(case: Case, tf32: bool) -> choice.Figures:
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    counts = {}
    for backend in choice.BACKENDS:
        found, _ = profile.profile(case, backend, "sm_80")
        wavefronts = sum(sums["wavefronts"] for sums in found["by_class"].values())
        counts[backend] = choice.Counts(
            found["warp_instructions"], wavefronts, found["global_bytes"], found["mma"]
        )
    return choice.Figures(f"{case.id}{' tf32' if tf32 else ''}", **counts)


def moved(old: choice.Figures | None, new: choice.Figures) -> bool:
    if old is None or old.case != new.case:
        return True
    pairs = ((old.cuda, new.cuda), (old.triton, new.triton))
    return any(
        abs(a - b) > TOLERANCE * max(a, b)
        for before, after in pairs
        for a, b in zip(before, after, strict=True)
    )


def lines(figures: dict[tuple[str, str], choice.Figures]) -> str:
    text = ""
    for key, (case, cuda, triton) in figures.items():
        counts = "".join(
            f"        Counts({', '.join(map(str, counts))}),\n" for counts in (cuda, triton)
        )
        text += f'    ("{key[0]}", "{key[1]}"): Figures(\n        "{case}",\n{counts}    ),\n'
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    reason = missing()
    if reason is not None:
        print(f"the counts need both backends, but {reason}", file=sys.stderr)
        return 2
    found, changed = {}, 0
    for key, case in CASES.items():
        found[key] = count(case, tf32=key[1] == "tf32")
        old = choice.FIGURES.get(key)
        changed += moved(old, found[key])
        state = "moved" if moved(old, found[key]) else "same"
        first = choice.better(found[key], tf32=key[1] == "tf32")
        print(f"{' '.join(key)}: {first} first, {state}", flush=True)
    if arguments.check:
        return 1 if changed else 0
    text = TARGET.read_text()
    TARGET.write_text(MARKS.sub(lambda m: m[1] + lines(found) + m[2], text))
    return 0


if __name__ == "__main__":
    sys.exit(main())
