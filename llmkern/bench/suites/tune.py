"""Cases for `llmkern tune`: the kinds of calls that models make of the ops that both GPU backends
have, at sizes a factor of four apart at most in each dim, so that one is near enough to any call
between them (llmkern/choice.py)."""

from __future__ import annotations

import torch

from llmkern.bench.cases.attention import attention
from llmkern.bench.cases.linear import linear, linear_gated
from llmkern.bench.cases.norm import add_layer_norm, layer_norm, rms_norm
from llmkern.bench.registry import Case

NORMS = ((1024, 1024), (1024, 4096), (8192, 1024), (8192, 4096))  # rows, columns
LENGTHS = ((4, 16, 512), (2, 16, 2048))  # batch, heads, queries and keys
PRODUCTS = ((16, 1024, 4096), (256, 1024, 1024), (2048, 1024, 4096), (2048, 4096, 1024),
            (8192, 1024, 4096))  # rows, in, out  # fmt: skip


def cases(dtypes: list[torch.dtype], backward: bool) -> list[Case]:
    """Forward and backward, or forward alone."""
    return [
        case
        for dtype in dtypes
        for family in (_norms, _attentions, _linears)
        for case in family(dtype, backward)
    ]


def _norms(dtype: torch.dtype, backward: bool) -> list[Case]:
    found = []
    for rows, cols in NORMS:
        found += [layer_norm(rows, cols, dtype, backward=backward)]
        found += [rms_norm(rows, cols, dtype, backward=backward)]
        if backward:  # the case has no forward form
            found += [add_layer_norm(rows, cols, dtype, dropout_p=p) for p in (0.0, 0.1)]
    return found


def _attentions(dtype: torch.dtype, backward: bool) -> list[Case]:
    if dtype == torch.float32:
        return []  # the cuda backend leaves it to triton
    found = []
    for (b, h, s), d in ((length, d) for length in LENGTHS for d in (64, 128)):
        for causal in (False, True):
            found.append(attention(b, h, s, d, dtype, causal=causal, backward=backward))
        found.append(attention(b, h, s, d, dtype, causal=True, dropout_p=0.1, backward=backward))
        found.append(attention(b, h, s, d, dtype, padding=True, backward=backward))
    if not backward:
        found.append(attention(8, 16, 1, 128, dtype, t=2048, backward=False))
    return found


def _linears(dtype: torch.dtype, backward: bool) -> list[Case]:
    found = []
    for m, k, n in PRODUCTS:
        for activation in (None, "gelu"):
            found.append(linear(m, k, n, dtype, activation=activation, backward=backward))
        found.append(linear(m, k, n, dtype, dropout_p=0.1, backward=backward))
        found.append(linear_gated(m, k, n, dtype, backward=backward))
    return found
