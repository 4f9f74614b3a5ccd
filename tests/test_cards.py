"""Costs of backward and the data-sheet bounds of llmkern/cards.py."""

import pytest
import torch

import llmkern
from llmkern import cards, cost, functional
from llmkern.bench import roofline
from llmkern.specs import (
    UNBOUNDED,
    ActivationSpec,
    AttentionSpec,
    DropoutSpec,
    LinearSpec,
    NormSpec,
)

BF16 = torch.bfloat16
LINEAR = LinearSpec(BF16, "cuda", 8192, 8192, 8192, None, False, True, False, 0.0, False)
ATTENTION = AttentionSpec(
    BF16, "cuda", 2, 16, 16, 4096, 4096, 128, 128, 0.1, 0.0, 0, UNBOUNDED, UNBOUNDED, 0.0,
    bias=False, mask=False, key_mask=False, slopes=False, sinks=False,
)  # fmt: skip
NORM = NormSpec(BF16, BF16, "cuda", 8192, 4096, 1e-5, False, False, False, 0.0, False, BF16)
SPECS = {
    "linear": LINEAR,
    "attention": ATTENTION,
    "norm": NORM,
    "dropout": DropoutSpec(BF16, "cuda", 1 << 20, 0.1),
    "activation": ActivationSpec(BF16, "cuda", 1 << 20, "gelu"),
}


def _by_name(bounds):
    return {bound.card: bound for bound in bounds}


def test_large_products_are_bound_by_compute_and_norms_by_memory():
    for op, kind in (("linear", "compute"), ("attention", "compute"), ("norm", "memory")):
        for backward in (False, True):
            bounds = roofline.card_bounds(op, SPECS[op], backward)
            assert {bound.kind for bound in bounds} == {kind}, op


def test_bounds_are_what_the_data_sheets_give():
    product = _by_name(roofline.card_bounds("linear", LINEAR))
    assert product["A100"].seconds == pytest.approx(2 * 8192**3 / 312e12)
    assert product["H100"].seconds == product["H200"].seconds
    norm = _by_name(roofline.card_bounds("norm", NORM))
    assert norm["H200"].seconds == pytest.approx(2 * 8192 * 4096 * 2 / 4.8e12)
    names = [card.name for card in cards.CARDS]
    assert names == ["A100", "H100", "H200", "B200", "L40S", "RTX 4090"]


@pytest.mark.parametrize("op", SPECS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_every_op_and_dtype_has_a_bound(op, dtype):
    for backward in (False, True):
        for bound in roofline.card_bounds(op, SPECS[op]._replace(dtype=dtype), backward):
            assert 0.0 < bound.seconds < 1e3


def test_backward_costs():
    forward, backward = cost.of("linear", LINEAR), cost.backward("linear", LINEAR)
    assert backward.flops == 2 * forward.flops
    forward, backward = cost.of("attention", ATTENTION), cost.backward("attention", ATTENTION)
    assert backward.flops * 2 == 5 * forward.flops
    assert backward.bytes == 2 * forward.bytes
    assert cost.backward("norm", NORM).bytes * 2 == 3 * cost.of("norm", NORM).bytes
    added = NORM._replace(add=True, dropout_p=0.1, keep_z=True)
    assert cost.backward("norm", added).bytes == 5 * 8192 * 4096 * 2
    assert cost.backward("dropout", SPECS["dropout"]) == cost.of("dropout", SPECS["dropout"])
    gated = LINEAR._replace(gated=True, keep_preact=True)
    assert cost.backward("linear", gated).bytes == 2 * 8192**2 * (1 + 2 + 2 + 4)


def test_explain_gives_the_bounds_and_says_what_they_are():
    explanation = llmkern.explain(functional.layer_norm, torch.randn(64, 256), 256)
    (op,) = explanation.ops
    assert op.forward_bounds == roofline.card_bounds("norm", op.spec)
    text = str(explanation)
    assert "bound" not in text and not any(f"{card.name} " in text for card in cards.CARDS)
    on_cuda = op._replace(spec=op.spec._replace(device="cuda"))
    text = str(explanation._replace(ops=(on_cuda,)))
    assert "a bound from data sheets, not a measurement" in text
    for card in cards.CARDS:
        assert f"{card.name} " in text
