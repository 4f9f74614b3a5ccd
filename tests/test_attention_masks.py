"""Attention masks: what a query sees, what it never sees, and gradients of biases."""

import math
import sys

import pytest
import torch
import torch.nn.functional as F
from attention_cases import Case, formula, make, ours, visible, with_grad
from rule import check_same

from llmkern.functional import scaled_dot_product_attention

NAN, INF = float("nan"), math.inf

# Under Triton's interpreter these are slow; test_triton_attention.py is its short run.
pytestmark = pytest.mark.light(backend=["reference", "cpu"])

MASK_SHAPES = [(1, 1), (20, 1), (1, 70), (20, 70), (3, 1, 70), (3, 20, 70), (2, 1, 1, 70),
               (1, 3, 1, 1), (2, 1, 20, 1), (2, 3, 20, 70)]  # fmt: skip


@pytest.mark.computes_in(torch.float64)
@pytest.mark.parametrize("shape", MASK_SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["bool", "float64", "float32"])
def test_attention_mask_broadcasts_as_torch(backend, shape, kind):
    q, k, v = (torch.randn(2, 3, n, 8, dtype=torch.float64) for n in (20, 70, 70))
    if kind == "bool":
        mask = torch.rand(shape) > 0.3
        mask[..., 0] = True
    else:
        mask = torch.randn(shape, dtype=getattr(torch, kind))
    out = scaled_dot_product_attention(q, k, v, mask)
    if kind == "float32":  # torch 2.13 takes it, and reads it as float64
        mask = mask.double()
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, mask))


@pytest.mark.parametrize("shape", MASK_SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_attention_bias_gradient_has_the_shape_of_the_mask(backend, shape, dtype):
    case = Case(2, 3, 20, 70, 8, bias=shape)
    exact = with_grad(make(case, dtype), case, torch.float64)
    got = with_grad(make(case, dtype), case)
    weight = torch.randn(2, 3, 20, 8, dtype=torch.float64)
    (formula(exact, case)[0] * weight).sum().backward()
    (ours(got, case)[0] * weight.to(dtype)).sum().backward()
    assert got["mask"].grad.shape == shape and got["mask"].grad.dtype == dtype
    tolerance = 1e-4 if dtype == torch.float32 else 1e-9
    torch.testing.assert_close(
        got["mask"].grad.double(), exact["mask"].grad, atol=tolerance, rtol=tolerance
    )


@pytest.mark.parametrize("mask_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_attention_bias_of_another_dtype(backend, mask_dtype):
    q, k, v = (torch.randn(1, 2, n, 8, dtype=torch.bfloat16) for n in (5, 7, 7))
    mask = torch.randn(2, 5, 7, dtype=mask_dtype, requires_grad=True)
    out = scaled_dot_product_attention(q, k, v, mask)
    exact = mask.detach().double().requires_grad_()
    want = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), exact)
    torch.testing.assert_close(out.double(), want, atol=0.02, rtol=0.02)
    out.sum().backward()
    want.sum().backward()
    assert mask.grad.dtype == mask_dtype
    torch.testing.assert_close(mask.grad.double(), exact.grad, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("layout", ["transposed", "expanded", "strided"])
@pytest.mark.parametrize("kind", [torch.bool, torch.float32], ids=str)
def test_attention_mask_layouts(backend, layout, kind):
    q, k, v = (torch.randn(2, 2, 24, 8) for _ in range(3))
    base = torch.randn(24, 24)
    if layout == "transposed":
        mask = base.T
    elif layout == "expanded":
        mask = base[:, :1].expand(2, 2, 24, 24)
    else:
        mask = torch.randn(24, 48)[:, ::2]
    if kind == torch.bool:
        mask = mask > -1.0 if layout != "expanded" else (base[:1] > -1).expand(2, 2, 24, 24)
    want = F.scaled_dot_product_attention(q, k, v, mask.contiguous())
    torch.testing.assert_close(scaled_dot_product_attention(q, k, v, mask), want)


def test_attention_bias_that_is_a_view_to_be_negated(backend):
    q, k, v = (torch.randn(2, 3, n, 8) for n in (5, 7, 7))
    bias = torch.randn(5, 7, dtype=torch.complex64).conj().imag
    out = scaled_dot_product_attention(q, k, v, bias)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, bias.resolve_neg()))


@pytest.mark.parametrize("lead", [(), (2,), (2, 3), (1, 3)], ids=str)
def test_attention_masks_follow_leading_dims(backend, lead):
    q = torch.randn(*lead, 2, 5, 8)
    k = torch.randn(*lead, 2, 6, 8)
    padding = torch.rand(*lead, 6) > 0.3
    slopes = torch.rand(*lead, 2)
    mask = torch.randn(*lead, 1, 5, 6, requires_grad=True)
    distance = (torch.arange(6) - torch.arange(5)[:, None]).abs()
    full = mask - slopes[..., None, None] * distance
    full = full.masked_fill(~padding[..., None, None, :], -INF)
    out = scaled_dot_product_attention(q, k, k, mask, alibi_slopes=slopes, key_padding_mask=padding)
    want = torch.softmax(q @ k.mT / math.sqrt(8) + full, -1).nan_to_num() @ k
    torch.testing.assert_close(out, want)
    out.sum().backward()
    assert mask.grad.shape == mask.shape
    partial = torch.randn(lead[-1] if lead else 1, 2, 1, 6)[:, :1] if len(lead) > 1 else None
    if partial is not None:  # broadcasts over the first leading dim only
        torch.testing.assert_close(
            scaled_dot_product_attention(q, k, k, partial),
            torch.softmax(q @ k.mT / math.sqrt(8) + partial, -1) @ k,
        )


@pytest.mark.parametrize("lengths", [(70, 70), (5, 9), (9, 5), (1, 130), (130, 1)], ids=str)
@pytest.mark.parametrize("align", ["top_left", "bottom_right"])
def test_attention_causal_alignment(backend, lengths, align):
    s, t = lengths
    q, k, v = (torch.randn(1, 2, n, 8) for n in (s, t, t))
    seen = torch.ones(s, t, dtype=torch.bool).tril(t - s if align == "bottom_right" else 0)
    out = scaled_dot_product_attention(q, k, v, is_causal=True, causal_align=align)
    scores = (q @ k.mT / math.sqrt(8)).masked_fill(~seen, -INF)
    torch.testing.assert_close(out, torch.softmax(scores, -1).nan_to_num() @ v)


def test_attention_causal_and_mask_both_hold(backend):
    """torch's fused kernel takes the intersection, its math raises; ours always intersects."""
    q, k, v = (torch.randn(2, 2, 30, 8) for _ in range(3))
    mask = torch.rand(30, 30) > 0.3
    out = scaled_dot_product_attention(q, k, v, mask, is_causal=True)
    both = mask & torch.ones(30, 30, dtype=torch.bool).tril()
    torch.testing.assert_close(out, scaled_dot_product_attention(q, k, v, both))


@pytest.mark.parametrize("left", [None, -1, 0, 1, 5, 63, 64, 65, 500])
@pytest.mark.parametrize("right", [None, 0, 2, 70])
def test_attention_window(backend, left, right):
    q, k, v = (torch.randn(1, 2, n, 8) for n in (140, 150, 150))
    place = torch.arange(140)[:, None] + 10
    j = torch.arange(150)
    seen = (j >= place - (10**6 if left in (None, -1) else left)) & (
        j <= place + (10**6 if right is None else right)
    )
    out = scaled_dot_product_attention(q, k, v, window=(left, right), causal_align="bottom_right")
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, seen))


@pytest.mark.parametrize("wide", [2**31, 2**62, sys.maxsize, 2**64])
def test_attention_window_of_any_size_is_no_limit(backend, wide):
    q, k, v = (torch.randn(1, 2, 9, 8) for _ in range(3))
    for align in ("top_left", "bottom_right"):
        out = scaled_dot_product_attention(q, k, v, window=(wide, wide), causal_align=align)
        check_same(backend, out, scaled_dot_product_attention(q, k, v))


def test_attention_alibi_equals_its_bias(backend):
    q, k, v = (torch.randn(2, 4, n, 8) for n in (33, 70, 70))
    slopes = 2.0 ** -torch.arange(1.0, 5.0)
    distance = (torch.arange(70) - torch.arange(33)[:, None] - 37).abs()
    out = scaled_dot_product_attention(
        q, k, v, alibi_slopes=slopes, causal_align="bottom_right", is_causal=True
    )
    bias = (-slopes[:, None, None] * distance).masked_fill(
        torch.ones(33, 70, dtype=torch.bool).triu(38), -INF
    )
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, bias))


def test_attention_softcap_bounds_scores(backend):
    q, k = torch.randn(1, 1, 9, 8) * 100, torch.randn(1, 1, 12, 8) * 100
    v = torch.eye(12)[None, None]
    weights = scaled_dot_product_attention(q, k, v, softcap=2.0)
    ratio = weights.amax(-1) / weights.amin(-1)
    assert bool((ratio <= math.exp(4.0) * 1.001).all())
    near = scaled_dot_product_attention(q / 100, k / 100, v, softcap=1e6)
    torch.testing.assert_close(near, scaled_dot_product_attention(q / 100, k / 100, v))


def test_attention_sink_is_a_key_of_value_zero(backend):
    q, k, v = (torch.randn(2, 3, n, 8) for n in (9, 12, 12))
    sinks = torch.randn(3)
    out, lse = scaled_dot_product_attention(q, k, v, sinks=sinks, return_lse=True)
    plain, plain_lse = scaled_dot_product_attention(q, k, v, return_lse=True)
    torch.testing.assert_close(lse, torch.logaddexp(plain_lse, sinks[:, None]))
    torch.testing.assert_close(out, plain * torch.exp(plain_lse - lse)[..., None])
    none = scaled_dot_product_attention(q, k, v, sinks=torch.full((3,), -INF))
    torch.testing.assert_close(none, plain)


HIDERS = {
    "bool mask": dict(mask=True),
    "float mask": dict(bias=True),
    "key padding": dict(padded=True),
    "window": dict(window=(3, 0)),
    "bottom right": dict(causal=True, align="bottom_right"),
}


def _hide_rows(hider: str, dtype: torch.dtype) -> tuple[Case, dict]:
    """A call where some queries see no key at all."""
    options = dict(HIDERS[hider])
    masked, biased = options.pop("mask", None), options.pop("bias", None)
    shape = (70, 20)
    case = Case(2, 2, 70, 20, 8, **options, mask=shape if masked else None,
                bias=shape if biased else None)  # fmt: skip
    tensors = make(case, dtype)
    if masked:
        tensors["mask"][3:40] = False
    if biased:
        tensors["mask"][3:40] = -INF
    if hider == "key padding":
        tensors["padding"][1] = False
    return case, tensors


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("hider", HIDERS)
def test_attention_row_that_sees_nothing_is_zero(backend, hider, dtype, sinks):
    case, tensors = _hide_rows(hider, dtype)
    if sinks:
        case = case._replace(sinks=True)
        tensors["sinks"] = torch.randn(2)
    empty = ~visible(tensors, case).any(-1)
    assert bool(empty.any()) and not bool(empty.all())
    tensors["q"][empty] = NAN  # what such a row holds does not matter either
    tensors = with_grad(tensors, case)
    out, lse = ours(tensors, case)
    assert bool((out[empty] == 0).all()) and bool(torch.isfinite(out).all())
    if sinks:
        torch.testing.assert_close(
            lse, torch.where(empty, tensors["sinks"].detach()[:, None].to(lse.dtype), lse)
        )
    else:
        assert bool((lse[empty] == -INF).all())
    assert bool(torch.isfinite(lse[~empty]).all())
    dout = torch.randn_like(out)
    dout[empty] = NAN
    out.backward(dout)
    assert bool((tensors["q"].grad[empty] == 0).all())
    for name in ["q", "k", "v"] + ["mask"] * (hider == "float mask"):
        assert bool(torch.isfinite(tensors[name].grad).all()), name


@pytest.mark.parametrize("poison", [NAN, INF, -INF])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("hider", ["bool mask", "float mask", "key padding", "window", "causal"])
def test_attention_ignores_nan_in_hidden_keys(backend, hider, dtype, poison):
    """A key that no query sees: the same with and without poison, gradients too."""
    case = Case(2, 2, 20, 150, 24, mask=(1, 150) if hider == "bool mask" else None,
                bias=(20, 150) if hider == "float mask" else None, padded=hider == "key padding",
                window=(4, 2) if hider == "window" else None, causal=hider == "causal")  # fmt: skip
    tensors = make(case, dtype)
    if hider == "float mask":
        tensors["mask"][:, torch.rand(150) > 0.5] = -INF
    dead = ~visible(tensors, case).any(2)  # [B, H, T]
    assert bool(dead.any())
    # Not of out itself: where that is rounded the other way, so is all that follows.
    dout = torch.randn(2, 2, 20, 24).to(dtype)
    results = []
    for value in (0.0, poison):
        given = with_grad(tensors, case)
        with torch.no_grad():
            given["k"][dead] = value
            given["v"][dead] = value
        out, lse = ours(given, case)
        ((out * dout).sum() + lse.sum()).backward()
        results.append([out, lse] + [given[name].grad for name in "qkv"])
        assert bool((given["k"].grad[dead] == 0).all()) and bool((given["v"].grad[dead] == 0).all())
    # Not bitwise: where a block holds NaN, a kernel may add up in another order.
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1e-2}[dtype]
    for clean, poisoned in zip(*results, strict=True):
        assert bool(torch.isfinite(clean).all())
        torch.testing.assert_close(poisoned, clean, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("where", ["k", "v", "q", "dout"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("mask_kind", ["bool", "float", "causal"])
def test_attention_nan_stays_with_those_who_see_it(backend, where, dtype, mask_kind):
    """NaN in one row reaches exactly the outputs and gradients of the pairs that are visible."""
    s = t = 100
    case = Case(1, 2, s, t, 16, causal=mask_kind == "causal",
                mask=(s, t) if mask_kind == "bool" else None,
                bias=(s, t) if mask_kind == "float" else None)  # fmt: skip
    tensors = make(case, dtype)
    if mask_kind == "float":
        tensors["mask"][torch.rand(s, t) > 0.5] = -INF
        tensors["mask"][:, 0] = 0.0
    seen = visible(tensors, case)[0, 0]
    row = 71
    clean, given = with_grad(tensors, case), with_grad(tensors, case)
    dout = torch.randn(1, 2, s, 16).to(dtype)
    ours(clean, case)[0].backward(dout)
    with torch.no_grad():
        (dout if where == "dout" else given[where])[:, :, row] = NAN
    out, _ = ours(given, case)
    out.backward(dout)
    tainted = seen[:, row] if where in "kv" else torch.arange(s) == row  # queries
    if where == "dout":
        assert bool(torch.isfinite(out).all())
    else:
        assert torch.equal(torch.isnan(out).any(-1)[0, 0], tainted)
    assert torch.equal(torch.isnan(given["q"].grad).any(-1)[0, 0], tainted)
    # A key's gradient mixes all queries that see it, so it is clean iff none of those is tainted.
    reached = (seen & tainted[:, None]).any(0)
    assert not bool(torch.isnan(given["k"].grad)[0, 0][~reached].any())
    assert not bool(torch.isnan(given["v"].grad)[0, 0][~reached].any())
    for name in "kv":
        torch.testing.assert_close(
            given[name].grad[0, 0][~reached], clean[name].grad[0, 0][~reached],
            atol=1e-2 if dtype == torch.bfloat16 else 1e-5, rtol=1e-2,
        )  # fmt: skip
