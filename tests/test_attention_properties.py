"""What holds for attention whatever the numbers: independence, symmetry, dropout, determinism."""

import math
import mmap
import subprocess
import sys

import pytest
import torch
from attention_cases import Case, formula, inputs_of, keep_mask, make, ours, with_grad
from hypothesis import given, settings
from hypothesis import strategies as st
from rule import check_same, gradients

from llmkern import dispatch, random
from llmkern.functional import scaled_dot_product_attention

sdpa = scaled_dot_product_attention

# Under Triton's interpreter these are slow; test_triton_attention.py is its short run.
pytestmark = pytest.mark.light(backend=["reference", "cpu"])


def _everything(b=2, p=0.1):
    return Case(b, 4, 70, 130, 24, g=2, causal=True, align="bottom_right", window=(100, None),
                softcap=5.0, alibi=True, sinks=True, bias=(4, 70, 130), p=p)  # fmt: skip


def _results(tensors, case):
    tensors = with_grad(tensors, case)
    out, lse = ours(tensors, case)
    return [out.detach(), lse.detach(), *gradients([out, lse], inputs_of(tensors, case))]


@pytest.mark.without("reference", "torch's own ops promise no bits over thread counts")
@pytest.mark.without("triton", "its programs do not share threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_attention_is_bitwise_the_same_for_any_thread_count(backend, dtype):
    case = _everything()
    tensors = make(case, dtype)
    before = torch.get_num_threads()
    runs = []
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            runs.append(_results(tensors, case))
    finally:
        torch.set_num_threads(before)
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attention_elements_of_a_batch_do_not_meet(backend, dtype):
    """NaN everywhere in batch element 0 changes nothing of element 1; no bit with our kernels."""
    case = _everything(p=0.0)._replace(bias=None, sinks=False)
    tensors = make(case, dtype)
    clean = _results(tensors, case)
    for name in "qkv":
        tensors[name][0] = float("nan")
    for a, b in zip(clean, _results(tensors, case), strict=True):
        check_same(backend, b[1], a[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attention_forward_does_not_depend_on_the_batch_size(backend, dtype):
    q, k, v = (torch.randn(3, 2, n, 16).to(dtype) for n in (70, 130, 130))
    out = sdpa(q, k, v)
    alone = sdpa(q[1:2], k[1:2], v[1:2])
    check_same(backend, alone, out[1:2])


@pytest.mark.parametrize("length", [1, 16, 63, 64, 65, 100])
def test_attention_causal_prefix(backend, length):
    """The first rows do not change when the sequence goes on."""
    q, k, v = (torch.randn(2, 2, 150, 16) for _ in range(3))
    whole = sdpa(q, k, v, is_causal=True)
    front = sdpa(q[:, :, :length], k[:, :, :length], v[:, :, :length], is_causal=True)
    torch.testing.assert_close(whole[:, :, :length], front)


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_attention_grouped_heads_equal_repeated_ones(backend, groups):
    q = torch.randn(2, 6, 40, 16)
    k, v = (torch.randn(2, groups, 70, 16, requires_grad=True) for _ in range(2))
    wide = [t.detach().repeat_interleave(6 // groups, 1).requires_grad_() for t in (k, v)]
    out, want = sdpa(q, k, v, enable_gqa=True), sdpa(q, *wide)
    torch.testing.assert_close(out, want)
    weight = torch.randn_like(out)
    out.backward(weight)
    want.backward(weight)
    for narrow, repeated in zip((k, v), wide, strict=True):
        summed = repeated.grad.unflatten(1, (groups, 6 // groups)).sum(2)
        torch.testing.assert_close(narrow.grad, summed, atol=1e-5, rtol=1e-5)


def test_attention_permuted_keys_give_the_same(backend):
    q, k, v = (torch.randn(2, 2, n, 16) for n in (20, 130, 130))
    bias = torch.randn(20, 130)
    order = torch.randperm(130)
    torch.testing.assert_close(
        sdpa(q, k, v, bias), sdpa(q, k[:, :, order], v[:, :, order], bias[:, order])
    )


def test_attention_constant_bias_moves_only_lse(backend):
    q, k, v = (torch.randn(1, 2, n, 16) for n in (20, 90, 90))
    out, lse = sdpa(q, k, v, return_lse=True)
    moved, moved_lse = sdpa(q, k, v, torch.full((20, 1), 30.0), return_lse=True)
    torch.testing.assert_close(moved, out, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(moved_lse, lse + 30.0)


@pytest.mark.parametrize("size", [1e2, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attention_large_scores_do_not_overflow(backend, size, dtype):
    """The running maximum falls and rises between blocks; one key takes all."""
    q = torch.ones(1, 1, 3, 1, dtype=dtype)
    k = torch.linspace(-size, size, 300).view(1, 1, 300, 1).to(dtype)
    k = torch.cat([k, k.flip(2)], 2)
    k[0, 0, 250] = 2 * size
    v = torch.randn(1, 1, 600, 4).to(dtype)
    out, lse = sdpa(q, k, v, return_lse=True)
    assert torch.equal(out, v[:, :, 250:251].expand(1, 1, 3, 4))
    assert torch.equal(lse, k[0, 0, 250].to(lse.dtype).expand(1, 1, 3))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.999])
@pytest.mark.parametrize("sizes", [(2, 3, 20, 33), (1, 2, 70, 130)], ids=str)
def test_attention_dropout_mask_is_the_contract(backend, sizes, p):
    """Identity values show the weights: dropped where random.attention_keep_mask says so."""
    b, h, s, t = sizes
    q, k = torch.randn(b, h, s, 8), torch.randn(b, h, t, 8)
    v = torch.eye(t).expand(b, h, t, t)
    torch.manual_seed(3)
    dropped = sdpa(q, k, v, dropout_p=p)
    keep = keep_mask(Case(b, h, s, t, 8, p=p), seed=3)
    assert torch.equal(dropped != 0, keep)
    want = torch.where(keep, sdpa(q, k, v) * random.scale(p), 0.0)
    torch.testing.assert_close(dropped, want)


def test_attention_dropout_keeps_the_expectation(backend):
    q, k, v = (torch.randn(1, 2, n, 8) for n in (16, 64, 64))
    want = sdpa(q, k, v)
    draws = sdpa(*(t.expand(400, *t.shape[1:]) for t in (q, k, v)), dropout_p=0.3)
    assert float((draws.mean(0) - want[0]).abs().max()) < 0.15
    spread = draws.std(0).clamp_min(1e-3) / math.sqrt(400)
    assert float(((draws.mean(0) - want[0]) / spread).abs().max()) < 5.5


def test_attention_dropout_of_everything_is_zero(backend):
    q, k, v = (torch.randn(1, 2, 9, 8, requires_grad=True) for _ in range(3))
    out, lse = sdpa(q, k, v, dropout_p=1.0, return_lse=True)
    assert bool((out == 0).all())
    torch.testing.assert_close(lse, sdpa(q, k, v, return_lse=True)[1])
    out.sum().backward()
    assert all(bool((t.grad == 0).all()) for t in (q, k, v))


def test_attention_dropout_follows_manual_seed(backend):
    q = torch.randn(1, 2, 30, 8)
    torch.manual_seed(1)
    first, second = sdpa(q, q, q, dropout_p=0.4), sdpa(q, q, q, dropout_p=0.4)
    torch.manual_seed(1)
    check_same(backend, sdpa(q, q, q, dropout_p=0.4), first)
    assert not torch.equal(first, second)
    state = torch.get_rng_state()
    sdpa(q, q, q)
    assert torch.equal(torch.get_rng_state(), state)  # no dropout, no draw


def test_attention_backends_agree_bitwise_on_dropout_masks():
    q, v = torch.randn(2, 2, 40, 8), torch.eye(40).expand(2, 2, 40, 40)
    masks = []
    for name in ("reference", "cpu"):
        torch.manual_seed(5)
        masks.append(sdpa(q, q, v, dropout_p=0.5, backend=name) != 0)
    assert torch.equal(*masks)


sizes = st.integers(1, 40)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(1, 2), st.sampled_from([1, 2, 4]), st.integers(1, 140),
                    st.integers(1, 140), sizes, st.sampled_from([1, 2]), sizes),
    causal=st.booleans(),
    align=st.sampled_from(["top_left", "bottom_right"]),
    left=st.one_of(st.none(), st.integers(0, 150)),
    right=st.one_of(st.none(), st.integers(0, 150)),
    softcap=st.sampled_from([0.0, 2.5]),
    flags=st.tuples(*[st.booleans()] * 4),
    p=st.sampled_from([0.0, 0.0, 0.3]),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_attention_any_shape_and_feature(
    shape, causal, align, left, right, softcap, flags, p, seed
):
    """fp32 on the cpu backend against the formula in fp64, outputs and gradients."""
    b, h, s, t, d, g, dv = shape
    alibi, sinks, padded, biased = flags
    case = Case(b, h, s, t, d, g=min(g, h), dv=dv, causal=causal, align=align,
                window=(left, right), softcap=softcap, alibi=alibi, sinks=sinks, padded=padded,
                bias=(h, 1, t) if biased else None, p=p)  # fmt: skip
    tensors = make(case, torch.float32, seed)
    exact_in = with_grad(tensors, case, torch.float64)
    with dispatch.use_backend("cpu"):
        got = _results(tensors, case)
    exact = formula(exact_in, case)
    want = [*exact, *gradients(exact, inputs_of(exact_in, case))]
    for a, b_ in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b_.double(), atol=1e-4, rtol=1e-4)


def test_attention_strides_beyond_2_31(backend):
    """Two heads 2^31 + 40 elements apart, in memory that is only reserved."""
    gap = 2**31 + 40
    memory = torch.frombuffer(mmap.mmap(-1, 2 * (gap + 1000)), dtype=torch.bfloat16)
    q = memory.as_strided((1, 2, 5, 8), (0, gap, 8, 1))
    q.copy_(torch.randn(1, 2, 5, 8))
    check_same(backend, sdpa(q, q, q), sdpa(*[q.clone()] * 3))


_MEMORY = """
import resource, torch
from llmkern.functional import scaled_dot_product_attention as sdpa
def run(n):
    q, k, v = (torch.randn(1, 1, n, 16, requires_grad=True) for _ in range(3))
    sdpa(q, k, v, is_causal=True, dropout_p=0.1, backend="cpu").sum().backward()
run(64)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run(8192)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def test_attention_memory_does_not_grow_with_the_square():
    """At 8192 one float32 score matrix takes 256 MB; forward and backward stay far below."""
    run = subprocess.run(
        [sys.executable, "-c", _MEMORY], capture_output=True, text=True, check=True
    )
    assert float(run.stdout) < 40.0, f"{run.stdout} MB"
