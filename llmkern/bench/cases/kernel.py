"""A case of one op: a function of ours against the same function of torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from llmkern.bench import baselines
from llmkern.bench.registry import Case, Cost, Function, Maker, Tensors, Variant, functional


def kernel_case(
    op: str,
    shape: Mapping[str, int],
    dtype: torch.dtype,
    *,
    make: Callable[[Maker], Tensors],
    ours: Function,
    torch_: Function,
    cost: Cost,
    wanted: tuple[str, ...] = (),
    cotangents: tuple[str, ...] = ("dy",),
    label: str = "",
    random: bool = False,
    compile: bool = False,
    contenders: tuple[Variant, ...] = (),
    budget_s: float = 2.0,
    tags: frozenset[str] = frozenset(),
) -> Case:
    """`wanted` names the inputs whose gradients are taken; empty is a forward case. `random` marks
    dropout: torch draws other masks, so the oracle is our reference backend with the same seed."""
    options = {"wanted": wanted, "cotangents": cotangents}
    variants = [baselines.ours(ours, **options), baselines.eager(torch_, **options), *contenders]
    if compile:
        variants.append(baselines.compiled(torch_, **options))
    if random:
        exact = baselines.on_reference_backend(functional(ours, **options))
    else:
        exact = functional(torch_, **options)
    return Case(
        suite="kernels",
        op=op,
        label=label,
        shape=shape,
        dtype=dtype,
        backward=bool(wanted),
        make=make,
        variants=tuple(variants),
        oracle=exact,
        torch_error=exact,
        cost=cost,
        budget_s=budget_s,
        tags=tags,
    )
