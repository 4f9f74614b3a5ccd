"""Attention against float64 in every dtype, over sizes that straddle the kernels' blocks, layouts,
ranks and packed projections. Masks: test_attention_masks.py. Properties, dropout, determinism:
test_attention_properties.py. Compiler and autograd: test_attention_compile.py."""

import pytest
import torch
import torch.nn.functional as F
from attention_cases import Case, formula, inputs_of, make, ours, theirs, with_grad
from rule import check_rule, check_same, gradients

from llmkern import numerics
from llmkern.functional import (
    attention_kvpacked,
    attention_qkvpacked,
    scaled_dot_product_attention,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]

# Under Triton's interpreter these are slow; test_triton_attention.py is its short run.
pytestmark = pytest.mark.light(backend=["reference", "cpu"])

# Blocks are 64 queries x 64..128 keys, register tiles 6 x 16 and 14 x 32: one below, at, one above.
SIZES = [
    Case(1, 1, 1, 1, 1),
    Case(2, 3, 5, 7, 8),
    Case(1, 2, 15, 16, 16, dv=24),
    Case(1, 2, 17, 63, 33, dv=5),
    Case(1, 1, 64, 64, 64),
    Case(2, 1, 65, 129, 40),
    Case(1, 4, 33, 111, 64, g=2),
    Case(1, 2, 127, 113, 80, causal=True),
    Case(1, 3, 130, 257, 64, causal=True),
    Case(1, 1, 40, 50, 128, causal=True, dv=256),
    Case(1, 1, 20, 70, 256),
    Case(1, 2, 200, 31, 32, scale=0.5),
    Case(2, 6, 19, 21, 13, g=1, causal=True),
]

FEATURES = [
    Case(2, 2, 33, 65, 16, causal=True, align="bottom_right"),
    Case(1, 2, 70, 40, 16, causal=True, align="bottom_right"),
    Case(1, 2, 150, 150, 16, window=(20, 3)),
    Case(1, 2, 150, 170, 16, causal=True, window=(64, None), align="bottom_right"),
    Case(1, 2, 70, 70, 16, window=(-1, 2)),
    Case(2, 2, 40, 66, 16, softcap=3.0),
    Case(2, 4, 66, 66, 16, alibi=True, causal=True),
    Case(2, 4, 20, 66, 16, alibi=True, align="bottom_right"),
    Case(2, 4, 40, 70, 16, sinks=True, g=2),
    Case(2, 3, 40, 66, 24, mask=(40, 66)),
    Case(2, 3, 40, 66, 24, bias=(1, 3, 40, 66)),
    Case(2, 3, 66, 130, 24, padded=True),
    Case(2, 2, 66, 70, 16, p=0.2),
    Case(2, 4, 70, 90, 24, g=2, dv=16, causal=True, align="bottom_right", window=(30, None),
         softcap=4.0, alibi=True, sinks=True, bias=(4, 70, 90), padded=True, p=0.15),
]  # fmt: skip


def label(case: Case) -> str:
    base = Case(*case[:5])
    extra = [f"{n}={v}" for n, v, w in zip(case._fields, case, base, strict=True) if v != w]
    return "x".join(map(str, case[:5])) + "".join("-" + e.replace(" ", "") for e in extra)


def check(case: Case, dtype: torch.dtype) -> None:
    tensors = make(case, dtype)
    exact_in, torch_in = with_grad(tensors, case, torch.float64), with_grad(tensors, case)
    wide_in = with_grad(tensors, case, numerics.compute_dtype(dtype))
    our_in = with_grad(tensors, case)
    exact, exact_lse = formula(exact_in, case)
    wide_lse = formula(wide_in, case)[1]
    torch_out = theirs(torch_in, case)
    out, lse = ours(our_in, case)
    check_rule("out", out, torch_out, exact)
    check_rule("lse", lse, wide_lse, exact_lse)
    exact_g = gradients([exact, exact_lse], inputs_of(exact_in, case))
    torch_lse = formula(torch_in, case)[1]
    torch_g = gradients([torch_out, torch_lse], inputs_of(torch_in, case))
    our_g = gradients([out, lse], inputs_of(our_in, case))
    for name, *gs in zip(("q", "k", "v", "4th", "5th"), our_g, torch_g, exact_g, strict=False):
        check_rule(f"gradient of {name}", *gs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SIZES, ids=label)
def test_attention_matches_fp64(backend, case, dtype):
    check(case, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", FEATURES, ids=label)
def test_attention_features_match_fp64(backend, case, dtype):
    check(case, dtype)


def _tight(t):
    return t


def _transposed(t):
    return t.transpose(1, 2).contiguous().transpose(1, 2)


def _columns(t):
    return t.mT.contiguous().mT


def _every_other(t):
    wide = torch.full((*t.shape[:3], 2 * t.shape[3]), float("nan"), dtype=t.dtype)
    wide[..., ::2] = t
    return wide[..., ::2]


def _window_of_larger(t):
    b, h, n, d = t.shape
    large = torch.full((b + 1, h + 2, n + 3, d + 5), float("nan"), dtype=t.dtype)
    large[1:, 1:-1, 2:-1, 3:-2] = t
    return large[1:, 1:-1, 2:-1, 3:-2]


def _offset(t):
    return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)


LAYOUTS = [_transposed, _columns, _every_other, _window_of_larger, _offset]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__[1:])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attention_reads_any_layout(backend, layout, dtype):
    """What it gives for contiguous tensors, bitwise with our kernels; gradients too."""
    case = Case(2, 3, 17, 70, 20, dv=24, causal=True)
    tensors = make(case, dtype)
    want = with_grad(tensors, case)
    want_out, _ = ours(want, case)
    weight = torch.randn_like(want_out)
    want_out.backward(weight)
    got = dict(tensors)
    for name in "qkv":
        got[name] = layout(tensors[name]).detach().requires_grad_()
    out, _ = ours(got, case)
    out.backward(layout(weight))
    check_same(backend, out, want_out)
    for name in "qkv":
        check_same(backend, got[name].grad, want[name].grad)


@pytest.mark.parametrize("rows", [(1, 3, 17), (2, 1, 17), (2, 3, 1), (1, 1, 1)], ids=str)
def test_attention_reads_expanded_tensors(backend, rows):
    """Stride 0, in the inputs and in the gradient that comes back."""
    b, h, n = rows
    narrow = [torch.randn(b, h, n, 8, requires_grad=True) for _ in range(3)]
    wide = [t.expand(2, 3, 17, 8) for t in narrow]
    copies = [t.detach().contiguous().requires_grad_() for t in wide]
    out = scaled_dot_product_attention(*wide)
    want = scaled_dot_product_attention(*copies)
    check_same(backend, out, want)
    out.sum().backward()
    want.backward(torch.ones_like(want))
    for t, c in zip(narrow, copies, strict=True):
        torch.testing.assert_close(t.grad, c.grad.sum_to_size(t.shape))


def test_attention_size_one_strides_do_not_matter(backend):
    q, k, v = (torch.randn(1, 1, 9, 1) for _ in range(3))
    odd = [t.as_strided((1, 1, 9, 1), (77, 13, 1, 5)) for t in (q, k, v)]
    got, want = scaled_dot_product_attention(*odd), scaled_dot_product_attention(q, k, v)
    check_same(backend, got, want)


RANKS = [
    ((5, 8), (7, 8), (7, 6)),
    ((3, 5, 8), (3, 7, 8), (3, 7, 6)),
    ((2, 2, 3, 5, 8), (2, 2, 3, 7, 8), (2, 2, 3, 7, 6)),
    ((2, 3, 5, 8), (3, 7, 8), (1, 1, 7, 6)),
    ((1, 3, 5, 8), (4, 3, 7, 8), (7, 6)),
    ((2, 1, 5, 8), (2, 3, 7, 8), (2, 3, 7, 6)),
    ((2, 1, 3, 5, 8), (4, 3, 7, 8), (4, 1, 7, 6)),
]


@pytest.mark.computes_in(torch.float64)
@pytest.mark.parametrize("shapes", RANKS, ids=str)
def test_attention_takes_ranks_and_broadcasts_as_torch(backend, shapes):
    ours_in = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    torch_in = [t.detach().clone().requires_grad_() for t in ours_in]
    out, lse = scaled_dot_product_attention(*ours_in, return_lse=True)
    want = F.scaled_dot_product_attention(*torch_in)
    torch.testing.assert_close(out, want)
    assert lse.shape == out.shape[:-1]
    weight = torch.randn_like(want)
    out.backward(weight)
    want.backward(weight)
    for a, b in zip(ours_in, torch_in, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.computes_in(torch.float64)
@pytest.mark.parametrize("heads", [(6, 3, 3), (6, 3, 1), (6, 2, 3), (4, 4, 4), (8, 1, 1)], ids=str)
@pytest.mark.parametrize("lead", [(), (2,), (2, 2)], ids=str)
def test_attention_takes_grouped_heads_as_torch(backend, heads, lead):
    h, gk, gv = heads
    q = torch.randn(*lead, h, 5, 8, dtype=torch.float64)
    k = torch.randn(*lead, gk, 7, 8, dtype=torch.float64)
    v = torch.randn(*lead, gv, 7, 8, dtype=torch.float64)
    out = scaled_dot_product_attention(q, k, v, enable_gqa=True)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, enable_gqa=True))


EMPTY = [(0, 2, 3, 4, 8, 8), (2, 0, 3, 4, 8, 8), (2, 2, 0, 4, 8, 8), (2, 2, 3, 0, 8, 8),
         (2, 2, 3, 4, 0, 8), (2, 2, 3, 4, 8, 0), (2, 2, 0, 0, 0, 0)]  # fmt: skip


@pytest.mark.parametrize("sizes", EMPTY, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_attention_plain_call_of_empty_sizes(backend, sizes, dtype, p):
    """No bias, which the CUDA kernels leave to others."""
    b, h, s, t, d, dv = sizes
    shapes = [(b, h, s, d), (b, h, t, d), (b, h, t, dv)]
    q, k, v = (torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes)
    out = scaled_dot_product_attention(q, k, v, dropout_p=p)
    assert out.shape == (b, h, s, dv) and bool(torch.isfinite(out).all())
    out.float().sum().backward()
    for x in (q, k, v):
        assert x.grad.shape == x.shape and bool(torch.isfinite(x.grad).all())


@pytest.mark.parametrize("sizes", EMPTY, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attention_empty_sizes(backend, sizes, dtype):
    b, h, s, t, d, dv = sizes
    shapes = [(b, h, s, d), (b, h, t, d), (b, h, t, dv)]
    q, k, v = (torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes)
    bias = torch.zeros(h, s, t, requires_grad=True)
    out, lse = scaled_dot_product_attention(q, k, v, bias, is_causal=True, return_lse=True)
    assert out.shape == (b, h, s, dv) and lse.shape == (b, h, s)
    if t == 0:
        assert bool((out == 0).all()) and bool((lse == -torch.inf).all())
    elif d == 0:  # all scores are 0: the mean of the keys seen
        mean = v.double().cumsum(2) / torch.arange(1, t + 1)[:, None]
        torch.testing.assert_close(out.double(), mean[:, :, :s], atol=0.01, rtol=0.01)
    (out.float().sum() + lse.sum()).backward()
    for x in (q, k, v, bias):
        assert x.grad.shape == x.shape and bool(torch.isfinite(x.grad).all())


@pytest.mark.parametrize("dims", [2, 3, 4, 5])
def test_attention_output_memory_is_rows_of_all_heads(backend, dims):
    lead = (2, 2, 3)[5 - dims :] if dims > 2 else ()
    q = torch.randn(*lead, 5, 8)
    out = scaled_dot_product_attention(q, q, q)
    assert dims == 2 or out.transpose(-3, -2).is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("batch_first", [True, False])
def test_attention_qkvpacked_equals_separate(backend, dtype, batch_first):
    b, s, h, d = 2, 37, 3, 16
    qkv = torch.randn(b, s, 3, h, d, dtype=dtype)
    if not batch_first:
        qkv = qkv.transpose(0, 1).contiguous().transpose(0, 1)
    qkv.requires_grad_()
    apart = [t.transpose(1, 2).detach().requires_grad_() for t in qkv.unbind(2)]
    bias = torch.randn(h, s, s, requires_grad=True)
    other = bias.detach().clone().requires_grad_()
    out, lse = attention_qkvpacked(qkv, bias, is_causal=True, return_lse=True)
    want, want_lse = scaled_dot_product_attention(*apart, other, is_causal=True, return_lse=True)
    # What an output projection of the same layout reads without a copy.
    assert (out if batch_first else out.transpose(0, 1)).is_contiguous()
    check_same(backend, out, want.transpose(1, 2))
    check_same(backend, lse, want_lse)
    weight = torch.randn_like(out)
    out.backward(weight)
    want.backward(weight.transpose(1, 2))
    assert qkv.grad.stride() == qkv.stride()
    check_same(backend, qkv.grad, torch.stack([t.grad.transpose(1, 2) for t in apart], 2))
    check_same(backend, bias.grad, other.grad)


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("wanted", ["both", "q", "kv"])
def test_attention_kvpacked_equals_separate(backend, groups, wanted):
    b, s, t, h, d = 2, 21, 33, 4, 16
    q = torch.randn(b, s, h, d).requires_grad_(wanted != "kv")
    kv = torch.randn(b, t, 2, groups, d).requires_grad_(wanted != "q")
    apart = [x.transpose(1, 2).detach() for x in (q, *kv.unbind(2))]
    apart = [x.requires_grad_(y.requires_grad) for x, y in zip(apart, (q, kv, kv), strict=True)]
    out = attention_kvpacked(q, kv, window=(20, 5))
    want = scaled_dot_product_attention(*apart, enable_gqa=True, window=(20, 5))
    assert out.is_contiguous()
    check_same(backend, out, want.transpose(1, 2))
    weight = torch.randn_like(out)
    out.backward(weight)
    want.backward(weight.transpose(1, 2))
    grads = [None if x.grad is None else x.grad.transpose(1, 2) for x in apart]
    if wanted != "kv":
        check_same(backend, q.grad, grads[0])
    if wanted != "q":
        check_same(backend, kv.grad, torch.stack(grads[1:], 2))


@pytest.mark.parametrize("wanted", ["q", "k", "v", "bias", "sinks", "qv"])
def test_attention_gives_only_the_gradients_wanted(backend, wanted):
    case = Case(2, 2, 9, 11, 8, bias=(2, 9, 11), sinks=True)
    full = with_grad(make(case, torch.float32), case)
    ours(full, case)[0].square().sum().backward()
    names = ["mask"] if wanted == "bias" else ["sinks"] if wanted == "sinks" else list(wanted)
    some = with_grad(make(case, torch.float32), case)
    for name in ("q", "k", "v", "mask", "sinks"):
        some[name].requires_grad_(name in names)
    ours(some, case)[0].square().sum().backward()
    for name in ("q", "k", "v", "mask", "sinks"):
        assert (some[name].grad is not None) == (name in names)
        if name in names:
            check_same(backend, some[name].grad, full[name].grad)


@pytest.mark.computes_in(torch.float64)
@pytest.mark.parametrize("outputs", ["out", "lse"])
def test_attention_backward_of_one_output(backend, outputs):
    case = Case(2, 2, 9, 11, 8, sinks=True)
    exact, got = (with_grad(make(case, torch.float64), case) for _ in range(2))
    index = ("out", "lse").index(outputs)
    formula(exact, case)[index].square().sum().backward()
    ours(got, case)[index].square().sum().backward()
    for name in ("q", "k", "v"):
        theirs_ = exact[name].grad
        torch.testing.assert_close(
            got[name].grad, torch.zeros_like(exact[name]) if theirs_ is None else theirs_
        )
    torch.testing.assert_close(got["sinks"].grad, exact["sinks"].grad.float(), check_dtype=False)
