"""Scaled dot product attention, [B, H, S, D] with G key/value heads and T keys.

FLOPs: 4 D for each visible (query, key) pair forward (two products), 2.5 times that backward (five
products, the scores recomputed); pairs that the causal mask hides are not counted. Bytes: each of
q, k, v, o and the gradients once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import llmkern.functional as LF
from llmkern.bench import baselines
from llmkern.bench.cases.kernel import kernel_case
from llmkern.bench.registry import Case, Cost, Maker, Tensors, Variant, functional


def attention_cost(
    b: int, h: int, g: int, s: int, t: int, d: int, itemsize: int, causal: bool, backward: bool
) -> Cost:
    if causal:
        full_rows = max(0, s - t)
        rows = s - full_rows
        pairs = rows * (rows + 1) // 2 + full_rows * t
    else:
        pairs = s * t
    flops = 4.0 * b * h * pairs * d * (3.5 if backward else 1.0)
    queries, keys = b * h * s * d, b * g * t * d
    elements = 2 * queries + 2 * keys  # q, o; k, v
    if backward:
        elements += 4 * queries + 4 * keys  # q, o, do read, dq written; k, v read, dk, dv written
    return Cost(flops, elements * itemsize)


def attention(
    b: int,
    h: int,
    s: int,
    d: int,
    dtype: torch.dtype,
    *,
    t: int | None = None,
    g: int | None = None,
    causal: bool = False,
    dropout_p: float = 0.0,
    padding: bool = False,
    backward: bool = True,
    compile: bool = False,
    budget_s: float = 3.0,
    tags: frozenset[str] = frozenset(),
) -> Case:
    """t: keys, as many as queries if None; g: key/value heads, h if None. `padding` hides about a
    quarter of the keys by a bool mask [B, 1, 1, T]."""
    t, g = t or s, g or h

    def make(m: Maker) -> Tensors:
        # Head dim last but heads outermost but one in memory, as a fused projection writes them.
        tensors = {
            "q": m.normal(b, s, h, d).transpose(1, 2),
            "k": m.normal(b, t, g, d).transpose(1, 2),
            "v": m.normal(b, t, g, d).transpose(1, 2),
            "dy": m.normal(b, s, h, d).transpose(1, 2),
        }
        if padding:
            keep = torch.arange(t)[None, :] < torch.linspace(t // 2, t, b).long()[:, None]
            tensors["keep"] = keep.to(tensors["q"].device)
        return tensors

    options = {"is_causal": causal, "enable_gqa": g != h}

    def ours(x: Tensors) -> Tensor:
        return LF.scaled_dot_product_attention(
            x["q"], x["k"], x["v"], dropout_p=dropout_p, key_padding_mask=x.get("keep"), **options
        )

    def torch_with(p: float):
        def torch_(x: Tensors) -> Tensor:
            mask = x["keep"][:, None, None, :] if padding else None
            return F.scaled_dot_product_attention(x["q"], x["k"], x["v"], mask, p, **options)

        return torch_

    wanted = ("q", "k", "v") if backward else ()
    contenders = ()
    if dropout_p:
        flash = functional(torch_with(0.0), wanted=wanted)
        note = "leaves dropout out, which is what lets torch use flash attention on a CPU"
        contenders = (Variant(baselines.FLASH, flash, note=note),)
    label = [
        "causal" if causal else "",
        "padding" if padding else "",
        f"dropout {dropout_p:g}" if dropout_p else "",
    ]
    shape = {"B": b, "H": h, **({"G": g} if g != h else {}), "S": s}
    shape |= {**({"T": t} if t != s else {}), "D": d}
    return kernel_case(
        "attention",
        shape,
        dtype,
        make=make,
        ours=ours,
        torch_=torch_with(dropout_p),
        wanted=wanted,
        cost=attention_cost(b, h, g, s, t, d, dtype.itemsize, causal, backward),
        label=" ".join(word for word in label if word),
        random=dropout_p > 0.0,
        compile=compile,
        contenders=contenders,
        budget_s=budget_s,
        tags=tags,
    )
