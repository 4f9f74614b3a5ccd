"""Whole modules. The first cases are the reference Transformer: two layers, d = 768, 12 heads,
ff = 3072, gelu, pre-norm, causal, as torch.nn ships it, on a batch of 2 x 256 in the default run
and of 4 x 512 in the full one."""

from __future__ import annotations

import torch

from llmkern.bench.cases.modules import encoder, multihead_attention, transformer
from llmkern.bench.registry import Case

# Modules keep float32 weights; a 16-bit case is autocast, which on a CPU means bfloat16.
DTYPES = (torch.float32, torch.bfloat16)


def default(dtypes: list[torch.dtype]) -> list[Case]:
    cases = []
    for dtype in dtypes:
        cases += [
            encoder(dtype, b=2, s=256, dropout=0.1),
            encoder(dtype, b=2, s=256, dropout=0.0),
            encoder(dtype, b=2, s=256, training=False, budget_s=6.0),
            transformer(dtype, b=2, s=64, t=64),  # the gate runs its float64 up to three times
            multihead_attention(dtype, b=2, s=256),
        ]
    return cases


def default_bf16() -> list[Case]:
    """The reference layer at a size that torch's bfloat16 finishes on a CPU without bf16 units."""
    dtype = torch.bfloat16
    return [
        encoder(dtype, b=2, s=128, d=256, h=4, ff=1024, dropout=0.1, budget_s=3.0),
        encoder(dtype, b=2, s=128, d=256, h=4, ff=1024, dropout=0.0, budget_s=3.0),
    ]


def full(dtypes: list[torch.dtype]) -> list[Case]:
    cases = []
    for dtype in dtypes:
        cases += [
            encoder(dtype, dropout=0.1, compile=True),
            encoder(dtype, dropout=0.0, compile=True),
            encoder(dtype, training=False, compile=True),
            encoder(dtype, causal=False, dropout=0.1),
            encoder(dtype, b=1, s=2048, dropout=0.1),
            transformer(dtype, compile=True),
            transformer(dtype, s=256, t=512, d=768, h=12, ff=3072, dropout=0.0),
            multihead_attention(dtype, dropout=0.1),
            multihead_attention(dtype),
        ]
    return cases
