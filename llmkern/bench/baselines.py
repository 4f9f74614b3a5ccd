"""The torch side of a case: as shipped, and every faster way that torch itself offers.

`eager` is what a user's unchanged code runs and what the headline ratio is against. The others are
candidates for "the best torch baseline" beside it; where one does less work than the case (dropout
left out so that flash attention is reached) its note says so and the report shows the note.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import llmkern
from llmkern import torch_private
from llmkern.bench.registry import EAGER, OURS, Function, Step, Tensors, Variant, functional

COMPILED = "torch.compile"
ONEDNN = "oneDNN _linear_pointwise"
FLASH = "torch SDPA flash, dropout 0"


def ours(fn: Function, **options) -> Variant:
    return Variant(OURS, functional(fn, **options))


def eager(fn: Function, **options) -> Variant:
    return Variant(EAGER, functional(fn, **options))


def compiled(fn: Function, **options) -> Variant:
    """`fn` under torch.compile with the default backend; compilation is not timed."""

    def prepare(tensors: Tensors) -> Step:
        torch.compiler.reset()
        step = functional(torch.compile(fn, dynamic=False, fullgraph=True), **options)(tensors)
        step()
        return step

    return Variant(COMPILED, prepare, slow_to_prepare=True)


def onednn_linear(activation: str | None) -> Variant:
    """oneDNN's GEMM behind torch's inference-only fused op; x, weight, bias as in F.linear."""
    attribute = {None: "none", "relu": "relu", "gelu": "gelu", "gelu_tanh": "gelu", "silu": "swish"}
    algorithm = {"gelu": "none", "gelu_tanh": "tanh"}.get(activation or "", "")

    def fn(t: Tensors) -> Tensor:
        return torch_private.onednn_linear(
            t["x"], t["weight"], t["bias"], attribute[activation], [], algorithm
        )

    return Variant(ONEDNN, functional(fn))


def on_reference_backend(prepare: Callable[[Tensors], Step]) -> Callable[[Tensors], Step]:
    """The same call on the plain-torch backend, backward included.

    The oracle of cases with dropout: on every backend the mask is a function of the seed alone, so
    this in float64 is the exact answer for the very mask that the kernel draws.
    """

    def prepare_reference(tensors: Tensors) -> Step:
        with llmkern.use_backend("reference"):
            step = prepare(tensors)

        def run() -> tuple[Tensor, ...]:
            with llmkern.use_backend("reference"):
                return step()

        return run

    return prepare_reference
