"""FlopCounterMode counts the matrix products of our ops as it counts torch's."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import llmkern
from llmkern.functional import linear_gated, scaled_dot_product_attention


def _flops(run) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("grad", [False, True])
def test_encoder_layer(grad):
    """torch's own CPU attention is not in its registry, so what it would count is written out."""
    layer = nn.TransformerEncoderLayer(32, 4, 48, 0.1, batch_first=True)
    llmkern.accelerate(layer)
    x = torch.randn(2, 10, 32, requires_grad=True)
    mask = torch.zeros(2, 10, dtype=torch.bool)
    mask[:, -3:] = True

    def step():
        y = layer(x, src_key_padding_mask=mask)
        if grad:
            y.sum().backward()

    products = 2 * 20 * 32 * (4 * 32 + 2 * 48)
    of_pair = 2 * 2 * 4 * 10 * 10 * 8
    expected = products + 2 * of_pair
    if grad:
        expected += 2 * products + 5 * of_pair
    assert _flops(step) == expected


def test_feed_forward_counts_as_before():
    model = nn.Sequential(nn.Linear(16, 40), nn.GELU(), nn.LayerNorm(40), nn.Linear(40, 16))
    x = torch.randn(6, 16, requires_grad=True)
    expected = _flops(lambda: model(x).sum().backward())
    llmkern.accelerate(model)
    assert _flops(lambda: model(x).sum().backward()) == expected > 0


@pytest.mark.parametrize("kv_heads, length, value_dim", [(4, 10, 8), (2, 7, 8), (4, 7, 16)])
def test_attention_counts_every_pair(kv_heads, length, value_dim):
    q = torch.randn(2, 4, 10, 8, requires_grad=True)
    k = torch.randn(2, kv_heads, length, 8, requires_grad=True)
    v = torch.randn(2, kv_heads, length, value_dim, requires_grad=True)
    options = {"is_causal": True, "enable_gqa": True}
    pairs = 2 * 4 * 10 * length
    assert _flops(lambda: scaled_dot_product_attention(q, k, v, **options)) == (
        2 * pairs * (8 + value_dim)
    )
    both = _flops(lambda: scaled_dot_product_attention(q, k, v, **options).sum().backward())
    assert both == 2 * pairs * (8 + value_dim + 3 * 8 + 2 * value_dim)


def test_gated_linear():
    x = torch.randn(3, 5, 8, requires_grad=True)
    gate, up = (torch.randn(12, 8, requires_grad=True) for _ in range(2))
    product = 2 * 15 * 8 * 12
    assert _flops(lambda: linear_gated(x, gate, up, activation="silu")) == 2 * product
    step = _flops(lambda: linear_gated(x, gate, up, activation="silu").sum().backward())
    assert step == 6 * product


def test_a_formula_of_the_users_own_stays_and_the_others_count():
    linear_of_user = {torch.ops.llmkern.linear: lambda *args, out_shape=None, **options: 7}
    x, w = torch.randn(3, 8), torch.randn(5, 8)
    q = torch.randn(1, 2, 6, 8)
    with FlopCounterMode(display=False, custom_mapping=linear_of_user) as counter:
        llmkern.functional.linear(x, w)
        scaled_dot_product_attention(q, q, q)
    assert counter.get_total_flops() == 7 + 2 * 2 * 36 * 16
