"""Which GPU backend is asked first for a CUDA tensor: a pure function of the call, of counts made
in the emulator, and of what `llmkern tune` measured on the user's card, if it did.

A measured row speaks for calls of its op and kind (dtype and options) whose sizes lie within a
factor of REACH of its own; the nearest one speaks. Elsewhere FIGURES decide.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from llmkern.specs import UNBOUNDED, AttentionSpec, LinearSpec, NormSpec

BACKENDS = ("cuda", "triton")  # those there is a choice between
OPS = ("norm", "attention", "linear")  # those that both of them have
REACH = 4.0
CLOSE = 1.1
FEW_ROWS = 16  # a product or attention of so few rows is bound by reading the other operand


class Measured(NamedTuple):
    """One row of a tune file: median microseconds on the card, and the backend it speaks for."""

    op: str
    kind: dict[str, str | bool]
    size: tuple[int, ...]
    us: dict[str, float]
    choice: str


class Counts(NamedTuple):
    """What one backend does for a case: exact counts of the emulator on PTX of sm_80."""

    warp_instructions: int
    wavefronts: int  # passes over shared memory
    global_bytes: int  # in whole sectors
    mma: int  # 16-bit m16n8k16, or as much work


class Figures(NamedTuple):
    case: str  # as `llmkern profile` names it
    cuda: Counts
    triton: Counts


class Preference(NamedTuple):
    """Backends in the order to ask them, and why so; no reason where there is no choice."""

    order: tuple[str, ...]
    reason: str


def kind_of(spec: tuple) -> dict[str, str | bool]:
    """What must be equal for two calls to be timed alike, apart from their sizes."""
    dtype = str(spec.dtype).removeprefix("torch.")
    kind: dict[str, str | bool] = {"dtype": dtype, "dropout": spec.dropout_p > 0.0}
    if isinstance(spec, NormSpec):
        kind |= {"rms": spec.rms, "add": spec.add}
    elif isinstance(spec, AttentionSpec):
        banded = min(spec.left, spec.right) < UNBOUNDED
        kind |= {"banded": banded, "key_mask": spec.key_mask}
    elif isinstance(spec, LinearSpec):
        kind |= {"activation": spec.activation or "none", "gated": spec.gated, "tf32": spec.tf32}
    return kind


def size_of(spec: tuple) -> tuple[int, ...]:
    """norm: rows, cols; attention: batch * heads, queries, keys, larger head dim; linear: rows,
    out_features, in_features."""
    if isinstance(spec, NormSpec):
        return spec.rows, spec.cols
    if isinstance(spec, AttentionSpec):
        heads = spec.batch * spec.heads
        return heads, spec.q_len, spec.kv_len, max(spec.head_dim, spec.value_dim)
    return spec.rows, spec.out_features, spec.in_features


def nearest(op: str, spec: tuple, rows: Sequence[Measured]) -> Measured | None:
    """The row that speaks for a call, or None."""
    kind, size = kind_of(spec), size_of(spec)
    alike = [row for row in rows if row.op == op and row.kind == kind]
    found = min(alike, key=lambda row: _distance(row.size, size), default=None)
    if found is None or _distance(found.size, size) > math.log(REACH):
        return None
    return found


def _distance(a: tuple[int, ...], b: tuple[int, ...]) -> float:
    return max(abs(math.log(max(1, x) / max(1, y))) for x, y in zip(a, b, strict=True))


def cycles(counts: Counts) -> float:
    """What the busiest unit of one multiprocessor takes for it, nothing else in the way.

    Rates of sm_80 (NVIDIA A100 white paper): four warp instructions, 128 bytes of shared memory
    (a wavefront), 64 bytes of global memory from the first-level cache a cycle, and an m16n8k16
    product in two. Says nothing of latency, of other caches or of what ptxas makes of the PTX.
    """
    return max(
        counts.warp_instructions / 4, counts.wavefronts, counts.global_bytes / 64, counts.mma * 2
    )


def better(figures: Figures, tf32: bool = False) -> str:
    """The backend whose busiest unit is done first; where both are within CLOSE of each other,
    the one with fewer warp instructions, and in TF32 cuda: it rounds operands to nearest, as
    torch's products do, where Triton's cut bits off."""
    times = {name: cycles(getattr(figures, name)) for name in BACKENDS}
    if max(times.values()) <= min(times.values()) * CLOSE:
        if tf32:
            return "cuda"
        return min(BACKENDS, key=lambda name: getattr(figures, name).warp_instructions)
    return min(times, key=times.__getitem__)


def is_tf32(spec: tuple) -> bool:
    """Of products that have kernels for TF32 in both backends."""
    return isinstance(spec, LinearSpec) and spec.tf32


def figures_of(op: str, spec: tuple) -> Figures:
    """The counts that stand for a call where nothing was measured."""
    if spec.dtype == torch.float32 and (op, "float32") in FIGURES:
        return FIGURES[op, "tf32" if is_tf32(spec) else "float32"]
    rows = {"attention": "q_len", "linear": "rows"}.get(op)
    if rows is not None and getattr(spec, rows) <= FEW_ROWS:
        return FIGURES[op, "few rows"]
    return FIGURES[op, "16-bit"]


def prefer(
    op: str,
    spec: tuple,
    backends: tuple[str, ...],
    measured: Sequence[Measured] = (),
    source: str = "",
) -> Preference:
    """The order in which `backends` are asked for a call.

    Args:
        backends: those of the device; the ones without a choice keep their places.
        measured: the rows of a tune file for the card at hand.
        source: what the reason calls the file.
    """
    if op not in OPS or not set(BACKENDS) <= set(backends):
        return Preference(backends, "")
    row = nearest(op, spec, measured)
    if row is not None:
        first = row.choice
        times = ", ".join(f"{name} {time:.4g} us" for name, time in sorted(row.us.items()))
        size = "x".join(map(str, row.size))
        reason = f"tuned at {size}: {times} ({source})"
    else:
        figures = figures_of(op, spec)
        first = better(figures, tf32=is_tf32(spec))
        reason = f"by counts of {figures.case} in the emulator: {_told(figures)}"
    places = iter(sorted(BACKENDS, key=lambda name: name != first))
    order = tuple(next(places) if name in BACKENDS else name for name in backends)
    return Preference(order, f"{' before '.join(n for n in order if n in BACKENDS)}, {reason}")


def _told(figures: Figures) -> str:
    told = []
    for name in BACKENDS:
        counts = getattr(figures, name)
        told.append(
            f"{name} {counts.warp_instructions} warp instructions, {counts.wavefronts} wavefronts, "
            f"{counts.global_bytes} bytes"
        )
    return "; ".join(told)


# Written by tools/choice_figures.py, which also checks them.
FIGURES: dict[tuple[str, str], Figures] = {
    # figures: begin
    ("norm", "16-bit"): Figures(
        "kernels/layer_norm/rows512xcols1024/bf16/fwd+bwd",
        Counts(623251, 30320, 6113280, 0),
        Counts(856384, 104640, 7016448, 0),
    ),
    ("norm", "float32"): Figures(
        "kernels/layer_norm/rows512xcols1024/fp32/fwd+bwd",
        Counts(561141, 52000, 11915264, 0),
        Counts(827328, 139584, 14753792, 0),
    ),
    ("attention", "16-bit"): Figures(
        "kernels/attention/causal/B1xH2xS512xD64/bf16/fwd+bwd",
        Counts(370355, 157000, 3840800, 61952),
        Counts(449036, 213592, 3972352, 69632),
    ),
    ("attention", "few rows"): Figures(
        "kernels/attention/B1xH8xS1xT1024xD64/bf16/fwd",
        Counts(188808, 83464, 2099456, 32768),
        Counts(139368, 77576, 2120736, 8192),
    ),
    ("linear", "16-bit"): Figures(
        "kernels/linear/M512xK512xN512/bf16/fwd+bwd",
        Counts(837520, 616688, 27558912, 196608),
        Counts(984688, 679984, 27460608, 196608),
    ),
    ("linear", "few rows"): Figures(
        "kernels/linear/M1xK768xN3072/bf16/fwd",
        Counts(284808, 221184, 5394432, 73728),
        Counts(233712, 156672, 4853760, 18432),
    ),
    ("linear", "float32"): Figures(
        "kernels/linear/M256xK256xN256/fp32/fwd+bwd",
        Counts(3453112, 847992, 7439360, 0),
        Counts(2814088, 3244072, 13730816, 0),
    ),
    ("linear", "tf32"): Figures(
        "kernels/linear/M512xK512xN512/fp32/fwd+bwd tf32",
        Counts(1745904, 1192176, 54822912, 393216),
        Counts(1861392, 1294416, 54724608, 393216),
    ),
    # figures: end
}
