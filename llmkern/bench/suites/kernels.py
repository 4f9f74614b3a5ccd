"""Cases of single ops. DEFAULT fits in a few minutes on two cores (torch.compile, which takes up to
half a minute a case, in one of them), FULL goes wider, CHECK is small and odd-shaped and never
timed (`llmkern check`)."""

from __future__ import annotations

import torch

from llmkern.bench.cases.attention import attention
from llmkern.bench.cases.linear import linear, linear_gated
from llmkern.bench.cases.norm import add_layer_norm, layer_norm, rms_norm
from llmkern.bench.cases.pointwise import activation, dropout
from llmkern.bench.registry import Case

ALLOCATOR_TAG = frozenset({"allocator"})
SWEEP_TAG = frozenset({"sweep"})
SWEEP = (256, 512, 1024, 2048)  # sequence lengths of the time curve
ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu")


def norm_cases(dtype: torch.dtype, full: bool = False) -> list[Case]:
    cases = [
        layer_norm(8, 64, dtype),
        layer_norm(2048, 768, dtype, backward=False),
        layer_norm(2048, 768, dtype, compile=full),
        # 33 MB and more: glibc returns such blocks to the system, so they are measured both ways.
        layer_norm(8192, 1024, dtype, tags=ALLOCATOR_TAG),
        rms_norm(2048, 768, dtype),
        add_layer_norm(2048, 768, dtype, dropout_p=0.1, compile=True),
    ]
    if full:
        cases += [
            layer_norm(512, 4096, dtype),
            layer_norm(4096, 769, dtype),
            rms_norm(2048, 768, dtype, backward=False, compile=True),
            rms_norm(2048, 4096, dtype, compile=True),
            add_layer_norm(2048, 768, dtype, dropout_p=0.0, compile=True),
        ]
    return cases


def attention_cases(dtype: torch.dtype, full: bool = False) -> list[Case]:
    cases = [
        attention(2, 12, 1024, 64, dtype, backward=False),
        attention(2, 12, 1024, 64, dtype, causal=True, backward=False),
        attention(2, 12, 1024, 64, dtype),
        attention(2, 12, 1024, 64, dtype, causal=True, compile=full),
        attention(2, 12, 512, 64, dtype, causal=True, dropout_p=0.1),
        attention(4, 12, 512, 64, dtype, padding=True),
    ]
    if full:
        cases += [
            attention(2, 16, 1024, 64, dtype, g=4, causal=True),
            attention(2, 12, 1000, 64, dtype, causal=True),
            attention(2, 8, 1024, 128, dtype, causal=True),
            attention(2, 8, 512, 32, dtype),
            attention(1, 8, 1, 64, dtype, t=4096, backward=False),
        ]
    return cases


def sweep_cases(dtype: torch.dtype, full: bool = False) -> list[Case]:
    """Time against sequence length."""
    lengths = (*SWEEP, 4096, 8192, 16384) if full else SWEEP
    return [
        attention(1, 4, s, 64, dtype, causal=True, budget_s=0.5, tags=SWEEP_TAG) for s in lengths
    ]


def linear_cases(dtype: torch.dtype, full: bool = False) -> list[Case]:
    cases = [
        linear(2048, 768, 768, dtype),
        linear(2048, 768, 3072, dtype),
        linear(2048, 3072, 768, dtype),
        linear(2048, 768, 3072, dtype, backward=True),
        linear(2048, 768, 3072, dtype, activation="gelu"),
        linear(2048, 768, 3072, dtype, activation="gelu", dropout_p=0.1, backward=True,
               compile=full),
        linear(1, 768, 3072, dtype),
    ]  # fmt: skip
    if full:
        cases += [
            linear(2048, 2048, 2048, dtype),
            linear(4096, 768, 3072, dtype, backward=True),
            linear(2048, 3072, 768, dtype, backward=True),
            linear(2048, 3072, 768, dtype, residual=True, dropout_p=0.1, backward=True),
            linear(127, 769, 1001, dtype, backward=True),
            linear(16, 768, 3072, dtype),
            linear(2048, 768, 3072, dtype, activation="relu", backward=True),
            linear(2048, 768, 3072, dtype, activation="silu", backward=True),
            linear_gated(2048, 768, 2048, dtype),
            linear_gated(2048, 768, 2048, dtype, backward=True, compile=True),
        ]
    return cases


def dropout_cases(dtype: torch.dtype, full: bool = False) -> list[Case]:
    cases = [dropout(2048, 768, dtype, compile=full)]
    if full:
        cases += [dropout(2048, 768, dtype, backward=True), dropout(4096, 3072, dtype)]
    return cases


def activation_cases(dtype: torch.dtype, full: bool = False) -> list[Case]:
    names = ACTIVATIONS if full else ("gelu",)
    return [activation(name, 2048, 3072, dtype) for name in names]


FAMILIES = {
    "norm": norm_cases,
    "attention": attention_cases,
    "sweep": sweep_cases,
    "linear": linear_cases,
    "dropout": dropout_cases,
    "activation": activation_cases,
}


def default(dtypes: list[torch.dtype]) -> list[Case]:
    """float32 in full, and where asked for the 16-bit types in the cases that users run in them."""
    return [case for dtype in dtypes for family in FAMILIES.values() for case in family(dtype)]


def default_bf16() -> list[Case]:
    """The few bfloat16 cases of the default run: without a bf16 unit torch needs seconds each."""
    dtype = torch.bfloat16
    return [
        layer_norm(2048, 768, dtype),
        attention(1, 12, 512, 64, dtype, causal=True),
        linear(512, 768, 768, dtype),
        linear(512, 768, 768, dtype, backward=True),
        dropout(2048, 768, dtype),
    ]


def full(dtypes: list[torch.dtype]) -> list[Case]:
    return [
        case for dtype in dtypes for family in FAMILIES.values() for case in family(dtype, True)
    ]


def check(dtype: torch.dtype) -> list[Case]:
    """Every op at sizes around vector lengths and tiles, for `llmkern check`."""
    return [
        layer_norm(33, 65, dtype),
        layer_norm(5, 768, dtype, backward=False),
        rms_norm(33, 65, dtype),
        add_layer_norm(17, 130, dtype, dropout_p=0.0),
        add_layer_norm(17, 130, dtype, dropout_p=0.25),
        attention(2, 3, 65, 24, dtype),
        attention(2, 3, 130, 64, dtype, causal=True),
        attention(2, 4, 70, 32, dtype, g=2, t=131),
        attention(2, 3, 67, 40, dtype, padding=True),
        attention(1, 2, 129, 16, dtype, causal=True, dropout_p=0.2),
        linear(65, 130, 97, dtype, backward=True),
        *(linear(33, 64, 72, dtype, activation=name, backward=True) for name in ACTIVATIONS),
        linear(33, 64, 72, dtype, activation="gelu", residual=True, dropout_p=0.2, backward=True),
        linear_gated(33, 64, 72, dtype, backward=True),
        dropout(33, 65, dtype, p=0.3, backward=True),
        *(activation(name, 33, 65, dtype) for name in ACTIVATIONS),
    ]
