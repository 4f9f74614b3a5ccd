"""Peak memory of attention against sequence length, ours and torch's, each in a fresh process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

import llmkern.functional as LF
from llmkern.bench import memory
from llmkern.bench.registry import EAGER, OURS, Maker, functional

LENGTHS = (1024, 4096, 8192)
FULL_LENGTHS = (1024, 4096, 16384)
WARM_LENGTH = 128
HEADS, HEAD_DIM = 1, 64
DROPOUT = 0.1


@dataclass(frozen=True)
class Attention:
    """One way to compute causal attention. `scores_kept` is how many [H, S, S] fp32 tensors it is
    expected to hold at once, so that a run the machine has no memory for is not started."""

    name: str
    ours: bool
    dropout: float
    scores_kept: int = 0


VARIANTS = (
    Attention(f"{OURS}, dropout {DROPOUT:g}", True, DROPOUT),
    Attention(f"{EAGER}, dropout {DROPOUT:g}", False, DROPOUT, scores_kept=5),
    Attention(f"{OURS}, dropout 0", True, 0.0),
    Attention(f"{EAGER}, dropout 0 (SDPA flash)", False, 0.0),
)


def attention_call(variant: Attention, length: int, backward: bool) -> Callable[[], object]:
    """The call whose memory is measured; importable, for a child process."""
    maker = Maker(torch.float32, torch.device("cpu"), seed=length)
    names = ("q", "k", "v", "dy")
    tensors = {name: maker.normal(1, HEADS, length, HEAD_DIM) for name in names}
    attend = LF.scaled_dot_product_attention if variant.ours else F.scaled_dot_product_attention

    def fn(t):
        return attend(t["q"], t["k"], t["v"], dropout_p=variant.dropout, is_causal=True)

    return functional(fn, wanted=("q", "k", "v") if backward else ())(tensors)


def measure(
    lengths: tuple[int, ...] = LENGTHS, directions: tuple[bool, ...] = (False, True)
) -> Iterator[dict[str, Any]]:
    """One entry per variant, direction and length, in the order of a table."""
    for variant in VARIANTS:
        for backward in directions:
            for length in lengths:
                found = memory.peak_in_child(
                    attention_call,
                    (variant, WARM_LENGTH, backward),
                    (variant, length, backward),
                    threads=torch.get_num_threads(),
                    expected_bytes=4 * variant.scores_kept * HEADS * length * length,
                )
                yield {
                    "variant": variant.name,
                    "ours": variant.ours,
                    "direction": "fwd+bwd" if backward else "fwd",
                    "S": length,
                    "H": HEADS,
                    "D": HEAD_DIM,
                    "peak_bytes": found.peak_bytes,
                    "seconds": found.seconds,
                    "reason": found.reason,
                }
