"""Gradients of the CPU attention kernel against float64 autograd, feature by feature, and the
promises that no tolerance shows: what NaN may reach, and which bits may change."""

import math

import pytest
import torch
from rule import check_rule

from llmkern import functional, random
from llmkern.backends.cpu import _ext

if _ext.load().module is None:
    pytest.skip(f"no CPU kernels: {_ext.load().reason}", allow_module_level=True)

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def dense(q, k, v, bias=None, mask=None, key_mask=None, slopes=None, sinks=None, keep=None,
          dropout_p=0.0, softcap=0.0, shift=0, left=None, right=None):  # fmt: skip
    """(out, lse) in plain differentiable torch, every score in memory."""
    (s, d), t = q.shape[2:], k.shape[2]
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.mT / math.sqrt(d)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    distance = torch.arange(t) - (torch.arange(s) + shift)[:, None]
    visible = torch.ones(scores.shape, dtype=torch.bool)
    if bias is not None:
        scores, visible = scores + bias, visible & (bias != -torch.inf)
    if slopes is not None:
        scores = scores - slopes.to(q.dtype)[:, None, None] * distance.abs()
    visible = visible if left is None else visible & (distance >= -left)
    visible = visible if right is None else visible & (distance <= right)
    visible = visible if mask is None else visible & mask
    visible = visible if key_mask is None else visible & key_mask[:, None, None]
    scores = scores.masked_fill(~visible, -torch.inf)
    everything = scores
    if sinks is not None:
        sink = sinks.to(q.dtype)[:, None, None].expand(*scores.shape[:3], 1)
        everything = torch.cat([scores, sink], -1)
    dead = ~(everything > -torch.inf).any(-1, keepdim=True)
    lse = torch.logsumexp(everything.masked_fill(dead, 0.0), -1, keepdim=True)
    p = torch.exp(scores - lse).masked_fill(dead | ~visible, 0.0)
    if keep is not None:
        p = p * keep * random.scale(dropout_p)
    return p @ v, lse.masked_fill(dead, -torch.inf).squeeze(-1)


def differentiate(function, tensors, dtype, weights):
    """Gradients of a fixed projection of (out, finite lse) in `dtype`."""
    leaves = {n: t.detach().to(dtype).requires_grad_() for n, t in tensors.items()}
    out, lse = function(**leaves)
    finite = torch.isfinite(lse.detach())
    loss = (out.double() * weights[0]).sum() + (lse.double() * weights[1])[finite].sum()
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return {
        n: torch.zeros_like(leaf) if g is None else g
        for (n, leaf), g in zip(leaves.items(), grads, strict=True)
    }


def check(dtype, sizes, *, bias=None, sinks=None, **options):
    b, h, g, s, t, d, dv = sizes
    torch.manual_seed(0)
    tensors = {
        "q": torch.randn(b, s, h, d).to(dtype).transpose(1, 2),
        "k": torch.randn(b, t, g, d).to(dtype).transpose(1, 2),
        "v": torch.randn(b, t, g, dv).to(dtype).transpose(1, 2),
    }
    if bias is not None:
        tensors["bias"] = bias
    if sinks is not None:
        tensors["sinks"] = sinks
    weights = torch.randn(b, h, s, dv).double(), torch.randn(b, h, s).double()
    # The projection's gradient reaches the kernel in its dtype: let both sides see the same one.
    weights = weights[0].to(dtype).double(), weights[1].float().double()
    p, keep = options.pop("dropout_p", 0.0), None
    if p:
        torch.manual_seed(7)
        seed = random.draw_seed(torch.device("cpu"))
        keep = random.attention_keep_mask(seed, (b, h, s, t), p)

    def ours(q, k, v, bias=None, sinks=None):
        torch.manual_seed(7)
        return functional.scaled_dot_product_attention(
            q, k, v, options.get("mask") if bias is None else bias, p, enable_gqa=True,
            window=(options.get("left"), options.get("right")), softcap=options.get("softcap", 0.0),
            causal_align="bottom_right" if options.get("shift") else "top_left",
            alibi_slopes=options.get("slopes"), key_padding_mask=options.get("key_mask"),
            sinks=sinks, return_lse=True, backend="cpu",
        )  # fmt: skip

    def theirs(**leaves):
        return dense(**leaves, keep=keep, dropout_p=p, **options)

    exact = differentiate(theirs, tensors, torch.float64, weights)
    torch_grads = differentiate(theirs, tensors, dtype, weights)
    result = differentiate(lambda **leaves: ours(**leaves), tensors, dtype, weights)
    for name, value in result.items():
        check_rule(f"d{name}", value, torch_grads[name], exact[name])


SMALL = (2, 4, 2, 90, 130, 16, 16)
CASES = {
    "plain": ((2, 3, 3, 70, 130, 64, 64), {}),
    "causal": ((2, 2, 2, 300, 300, 64, 64), {"right": 0}),
    "grouped queries, decoder offset": (
        (1, 6, 2, 130, 257, 72, 40),
        {"right": 0, "shift": 127},
    ),
    "window": ((2, 3, 3, 200, 200, 33, 17), {"left": 20, "right": 5}),
    "softcap": ((2, 2, 2, 90, 90, 16, 16), {"softcap": 3.0, "right": 0}),
    "alibi": ((2, 2, 2, 90, 190, 16, 16), {"slopes": torch.tensor([0.1, 0.3]), "shift": 100}),
    "dropout": (SMALL, {"dropout_p": 0.3, "left": 70, "right": 9}),
    "dropout of everything": (SMALL, {"dropout_p": 1.0}),
    "mask": (SMALL, {"mask": torch.rand(2, 1, 90, 130) > 0.6}),
    "mask with dead rows": (
        SMALL,
        {"mask": (torch.rand(1, 4, 90, 130) > 0.6) & (torch.rand(1, 4, 90, 1) > 0.3)},
    ),
    "key mask": (SMALL, {"key_mask": torch.rand(2, 130) > 0.6, "right": 0}),
    "one of everything": ((1, 1, 1, 1, 1, 1, 1), {}),
    "widest head": ((1, 2, 1, 65, 113, 256, 256), {}),
    "few queries, many keys": ((1, 1, 1, 5, 3000, 32, 32), {}),
    "several tiles": ((1, 3, 1, 600, 1100, 24, 8), {"left": 700, "right": 300}),
    "no query": ((1, 2, 1, 0, 5, 8, 8), {}),
    "no key": ((1, 2, 1, 5, 0, 8, 8), {}),
    "no batch": ((0, 2, 1, 5, 4, 8, 8), {}),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_gradients_match_float64(name, dtype):
    sizes, options = CASES[name]
    check(dtype, sizes, **options)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64))
@pytest.mark.parametrize(
    "shape",
    [(2, 4, 90, 130), (1, 4, 90, 130), (2, 1, 90, 130), (1, 1, 1, 130), (1, 4, 90, 1),
     (1, 1, 1, 1), (2, 4, 1, 130)],
)  # fmt: skip
def test_bias_gradient_has_the_shape_of_the_bias(shape, dtype):
    torch.manual_seed(1)
    bias = torch.randn(shape)
    if shape[3] > 1:
        bias = torch.where(torch.rand(shape) < 0.2, -torch.inf, bias)
    check(dtype, SMALL, bias=bias.to(dtype), softcap=5.0)


def test_bias_gradient_of_several_tiles():
    torch.manual_seed(1)
    check(torch.float32, (2, 2, 1, 530, 1040, 8, 8), bias=torch.randn(1, 1, 530, 1040))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_sink_gradient_matches_float64(dtype):
    torch.manual_seed(1)
    check(dtype, (2, 4, 2, 90, 90, 16, 16), sinks=torch.randn(4).to(dtype), right=0)


def kernel_gradients(q, k, v, dout, **options):
    q, k, v = (x.detach().clone().requires_grad_() for x in (q, k, v))
    out = functional.scaled_dot_product_attention(
        q, k, v, enable_gqa=True, backend="cpu", **options
    )
    return torch.autograd.grad(out, (q, k, v), dout)


def hidden_cases(s, t):
    """name -> (options, visible [S, T])."""
    i, j = torch.arange(s)[:, None], torch.arange(t)
    random_mask = torch.rand(s, t, generator=torch.Generator().manual_seed(2)) > 0.5
    shown = torch.ones(2, t, dtype=torch.bool)
    shown[:, 97] = False
    return {
        "causal": ({"is_causal": True}, j <= i),
        "window": ({"window": (10, 3)}, (j >= i - 10) & (j <= i + 3)),
        "key mask": ({"key_padding_mask": shown}, shown[0].expand(s, t)),
        "mask": ({"attn_mask": random_mask}, random_mask),
        "bias": ({"attn_mask": torch.where(random_mask, 0.0, -torch.inf)}, random_mask),
    }


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("kind", hidden_cases(1, 98))
@pytest.mark.parametrize("value", (math.nan, math.inf))
@pytest.mark.parametrize("place", ("q", "k", "v", "dout"))
def test_what_is_hidden_never_meets_a_nan(kind, place, value, dtype):
    s = t = 150
    options, visible = hidden_cases(s, t)[kind]
    torch.manual_seed(3)
    heads = {"q": 4, "k": 2, "v": 2, "dout": 4}
    tensors = {name: torch.randn(2, h, s, 40).to(dtype) for name, h in heads.items()}
    clean = kernel_gradients(**tensors, **options)
    tensors[place][:, :, 97, 5] = value
    dq, dk, dv = kernel_gradients(**tensors, **options)
    if place in ("k", "v"):
        rows = ~visible[:, 97]
        # Keys that no query sees which also sees the bad key.
        keys = ~(visible & visible[:, 97:98]).any(0)
    else:
        rows = torch.arange(s) != 97
        keys = ~visible[97]
    # Rows that a bad row is taken out of are summed in another order.
    tolerance = {torch.float32: {"rtol": 1e-4, "atol": 1e-5}}.get(
        dtype, {"rtol": 0.02, "atol": 0.02}
    )
    torch.testing.assert_close(dq[:, :, rows], clean[0][:, :, rows], **tolerance)
    torch.testing.assert_close(dk[:, :, keys], clean[1][:, :, keys], **tolerance)
    torch.testing.assert_close(dv[:, :, keys], clean[2][:, :, keys], **tolerance)
    if kind == "key mask" and place in ("k", "v"):
        assert not dk[:, :, 97].any() and not dv[:, :, 97].any()


@pytest.mark.parametrize("place", ("k", "v"))
@pytest.mark.parametrize("shape", ((1, 1, 1, 32), (1, 1, 1, 1), (1, 1, 6, 1)), ids=str)
def test_bias_gradient_never_meets_a_nan_that_the_window_hides(shape, place):
    """6 queries leave lanes idle, and 8 keys a step begin before the window does."""
    q, k, v = (torch.randn(1, 1, n, 8) for n in (6, 32, 32))
    bias = torch.randn(shape)
    results = []
    for value in (0.0, math.nan):
        {"k": k, "v": v}[place][:, :, 24:26] = value
        leaf = bias.clone().requires_grad_()
        out = functional.scaled_dot_product_attention(
            q, k, v, leaf, window=(0, 0), causal_align="bottom_right", backend="cpu"
        )
        results.append(torch.autograd.grad(out.square().sum(), leaf)[0])
    assert torch.equal(*results)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1000, 3000), (3, 4, 2, 700, 700), (1, 24, 24, 70, 70)])
def test_gradients_do_not_depend_on_threads(sizes, dtype):
    b, h, g, s, t = sizes
    torch.manual_seed(4)
    q, k, v, dout = (
        torch.randn(b, heads, n, 24).to(dtype) for heads, n in ((h, s), (g, t), (g, t), (h, s))
    )
    results = []
    threads = torch.get_num_threads()
    for count in (1, 2, 1):
        torch.set_num_threads(count)
        results.append(kernel_gradients(q, k, v, dout, is_causal=True))
    torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("heads", (1, 8))
def test_gradients_do_not_depend_on_the_rest_of_the_batch(heads):
    torch.manual_seed(5)
    q, k, v, dout = (torch.randn(9, heads, 600, 16) for _ in range(4))
    whole = kernel_gradients(q, k, v, dout)
    one = kernel_gradients(*(x[4:5] for x in (q, k, v, dout)))
    assert all(torch.equal(a[4:5], b) for a, b in zip(whole, one, strict=True))


@pytest.mark.parametrize("wanted", ("q", "k", "v", "kv"))
def test_only_what_is_wanted_is_computed(wanted):
    torch.manual_seed(6)
    tensors = {n: torch.randn(2, 2, 70, 16) for n in "qkv"}
    every = kernel_gradients(*tensors.values(), torch.ones(2, 2, 70, 16))
    leaves = {n: t.clone().requires_grad_(n in wanted) for n, t in tensors.items()}
    functional.scaled_dot_product_attention(*leaves.values(), backend="cpu").sum().backward()
    for (name, leaf), expected in zip(leaves.items(), every, strict=True):
        assert (leaf.grad is None) if name not in wanted else torch.equal(leaf.grad, expected)


def test_packed_gradient_is_written_in_place_of_three():
    torch.manual_seed(7)
    qkv = torch.randn(2, 60, 3, 4, 16)
    packed = qkv.clone().requires_grad_()
    dout = torch.randn(2, 60, 4, 16)
    functional.attention_qkvpacked(packed, is_causal=True, backend="cpu").backward(dout)
    apart = kernel_gradients(*qkv.permute(2, 0, 3, 1, 4), dout.transpose(1, 2), is_causal=True)
    assert torch.equal(packed.grad, torch.stack(apart).permute(1, 3, 0, 2, 4))


@pytest.mark.parametrize("layout", ("transposed", "expanded", "sliced"))
def test_any_strides(layout):
    torch.manual_seed(8)
    base = torch.randn(2, 3, 50, 20)
    dout = torch.randn(2, 3, 1, 1).expand(2, 3, 50, 20)
    views = {
        "transposed": base.mT.contiguous().mT,
        "expanded": base[:, :1].expand(2, 3, 50, 20),
        "sliced": torch.randn(2, 3, 100, 41)[:, :, ::2, 1:21],
    }
    x = views[layout]
    expected = kernel_gradients(*(x.contiguous(),) * 3, dout.contiguous())
    leaf = x.detach().requires_grad_()
    out = functional.scaled_dot_product_attention(leaf, leaf, leaf, backend="cpu")
    got = torch.autograd.grad(out, leaf, dout)[0]
    torch.testing.assert_close(got, sum(expected))


def test_gradcheck():
    torch.manual_seed(9)
    q, k, v = (torch.randn(1, 2, n, 5, dtype=torch.float64, requires_grad=True) for n in (7, 9, 9))
    bias = torch.randn(1, 1, 7, 9, dtype=torch.float64, requires_grad=True)

    def run(q, k, v, bias):
        return functional.scaled_dot_product_attention(
            q, k, v, bias, is_causal=True, softcap=2.0, return_lse=True, backend="cpu"
        )

    assert torch.autograd.gradcheck(run, (q, k, v, bias))
