"""The Triton attention kernels in the emulator: a short run over every feature, and what is
theirs alone (tiles, skipped blocks, split over keys). The whole matrix runs as slow tests of
test_attention*.py with backend triton."""

import inspect

import pytest
import torch
from attention_cases import Case, formula, inputs_of, keep_mask, make, ours, theirs, with_grad
from rule import check_rule, gradients

from llmkern import dispatch, random
from llmkern.backends.triton import attention
from llmkern.backends.triton import tiles_attention as tiles
from llmkern.functional import scaled_dot_product_attention
from llmkern.specs import UNBOUNDED, AttentionSpec

triton = pytest.importorskip("triton")

tl = pytest.importorskip("triton.language")
band = pytest.importorskip("llmkern.backends.triton.attention_mask_kernels").band

pytestmark = pytest.mark.usefixtures("emulated_triton")
CARDS = (80, 86, 89, 90, 100, 120)


def _spec(**changes) -> AttentionSpec:
    plain = AttentionSpec(torch.float16, "cuda", 1, 4, 4, 512, 512, 64, 64, 0.125, 0.0, 0,
                          UNBOUNDED, UNBOUNDED, 0.0, False, False, False, False, False)  # fmt: skip
    return plain._replace(**changes)


CASES = [
    Case(1, 2, 17, 33, 16, causal=True),
    Case(1, 2, 5, 9, 1, dv=20),
    Case(1, 1, 70, 130, 24, window=(40, 3)),
    Case(1, 4, 3, 70, 16, g=2, causal=True, align="bottom_right"),
    Case(1, 2, 20, 21, 16, mask=(20, 21), p=0.2),
    Case(2, 4, 19, 40, 16, g=2, dv=8, causal=True, align="bottom_right", window=(30, None),
         softcap=4.0, alibi=True, sinks=True, bias=(4, 1, 40), padded=True, p=0.15),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_attention_in_short_matches_fp64(case, dtype):
    tensors = make(case, dtype)
    exact_in, torch_in = with_grad(tensors, case, torch.float64), with_grad(tensors, case)
    our_in = with_grad(tensors, case)
    exact, torch_lse = formula(exact_in, case), formula(torch_in, case)[1]
    torch_out = theirs(torch_in, case)
    with dispatch.use_backend("triton"):
        out, lse = ours(our_in, case)
        our_g = gradients([out, lse], inputs_of(our_in, case))
    check_rule("out", out, torch_out, exact[0])
    torch.testing.assert_close(lse.double(), exact[1], atol=1e-5, rtol=1e-5)
    torch_g = gradients([torch_out, torch_lse], inputs_of(torch_in, case))
    exact_g = gradients(exact, inputs_of(exact_in, case))
    for name, *gs in zip(("q", "k", "v", "4th", "5th"), our_g, torch_g, exact_g, strict=False):
        check_rule(f"gradient of {name}", *gs)


@pytest.mark.parametrize("shape", [(20, 1), (1, 40), (2, 20, 40), (1, 1), (2, 2, 20, 40)], ids=str)
def test_bias_gradient_sums_what_was_broadcast(shape):
    case = Case(2, 2, 20, 40, 16, bias=shape, softcap=3.0)
    tensors = make(case, torch.float32)
    exact, got = with_grad(tensors, case, torch.float64), with_grad(tensors, case)
    formula(exact, case)[0].square().sum().backward()
    with dispatch.use_backend("triton"):
        ours(got, case)[0].square().sum().backward()
    torch.testing.assert_close(got["mask"].grad.double(), exact["mask"].grad, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("packed", [False, True])
def test_dropout_mask_is_bitwise_the_contract(packed):
    """Identity values show the weights; packed rows belong to several heads."""
    groups, s, t = (1, 5, 70) if packed else (2, 70, 40)
    case = Case(2, 2, s, t, 8, p=0.3)
    q, k = torch.randn(2, 2, s, 8), torch.randn(2, groups, t, 8)
    v = torch.eye(t).expand(2, groups, t, t)
    torch.manual_seed(3)
    got = scaled_dot_product_attention(q, k, v, dropout_p=case.p, enable_gqa=True, backend="triton")
    assert torch.equal(got != 0, keep_mask(case, seed=3))


def test_split_over_keys_equals_one_pass(monkeypatch):
    case = Case(2, 4, 3, 150, 16, g=2, causal=True, align="bottom_right", window=(100, None),
                sinks=True, padded=True, p=0.2)  # fmt: skip
    tensors = make(case, torch.float32)
    with dispatch.use_backend("triton"):
        whole = ours(tensors, case)
        monkeypatch.setattr(tiles, "SPLIT_KEYS", 64)
        monkeypatch.setattr(tiles, "CHUNK_KEYS", 64)
        monkeypatch.setattr(tiles, "MOST_PARTS", 3)
        parts = ours(tensors, case)
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_hidden_rows_reach_nothing(poison):
    """Of key 7 only queries 7 and later know; of query 3 keys 0 to 3."""
    case = Case(1, 1, 18, 18, 16, causal=True)
    given, clean = (with_grad(make(case, torch.float32), case) for _ in range(2))
    with torch.no_grad():
        given["k"][:, :, 7] = poison
        given["v"][:, :, 7] = poison
    dout = torch.randn(1, 1, 18, 16)
    with dispatch.use_backend("triton"):
        for tensors in (clean, given):
            ours(tensors, case)[0].backward(dout)
        out, want = ours(given, case)[0], ours(clean, case)[0]
    torch.testing.assert_close(out[:, :, :7], want[:, :, :7])
    torch.testing.assert_close(given["q"].grad[:, :, :7], clean["q"].grad[:, :, :7])
    assert bool(torch.isnan(out[:, :, 7:]).all())


def _band_of(first, last, length, shift, left, right, block):
    """Blocks that somebody of first..last sees into, and blocks that all see whole."""
    lows = [x + shift - left for x in range(first, last + 1)]
    highs = [x + shift + right for x in range(first, last + 1)]
    some, full = [], []
    for start in range(0, length, block):
        places = range(start, min(start + block, length))
        pairs = [lo <= y <= hi for lo, hi in zip(lows, highs, strict=True) for y in places]
        if any(pairs):
            some.append(start)
        if all(pairs) and len(places) == block:
            full.append(start)
    return some, full


@triton.jit
def _bounds(out, first, last, length, shift, left, right, LEFT: tl.constexpr, RIGHT: tl.constexpr,
            BLOCK: tl.constexpr):  # fmt: skip
    a, b, c, d = band(first, last, length, shift, left, right, LEFT, RIGHT, BLOCK)
    tl.store(out, a)
    tl.store(out + 1, b)
    tl.store(out + 2, c)
    tl.store(out + 3, d)


def test_band_visits_only_blocks_that_are_seen():
    n = torch.Generator().manual_seed(0)
    for _ in range(60):
        first, count, length, shift, left, right = (
            int(torch.randint(low, high, (1,), generator=n))
            for low, high in ((0, 60), (1, 20), (1, 80), (-30, 30), (0, 40), (0, 40))
        )
        out = torch.zeros(4, dtype=torch.int32)
        has = torch.rand(2, generator=n) > 0.3
        _bounds[(1,)](out, first, first + count - 1, length, shift, left, right, LEFT=bool(has[0]),
                      RIGHT=bool(has[1]), BLOCK=8)  # fmt: skip
        begin, full_begin, full_end, end = out.tolist()
        some, full = _band_of(first, first + count - 1, length, shift, left if has[0] else 10**6,
                              right if has[1] else 10**6, 8)  # fmt: skip
        visited = list(range(begin, end, 8))
        assert set(some) <= set(visited) and len(visited) <= len(some) + 1
        assert list(range(full_begin, full_end, 8)) == full


@pytest.mark.parametrize("capability", CARDS)
def test_tiles_fit_in_shared_memory(capability):
    """The operands of one block, for every buffer of the pipeline."""
    limit = tiles.shared_bytes(capability)
    for dtype in (torch.float16, torch.float32):
        for dim in (1, 16, 40, 64, 96, 128, 160, 256):
            spec = _spec(dtype=dtype, head_dim=dim, value_dim=dim, right=0)
            shape = tiles.form(spec, "ieee")
            row = (shape.block_d + shape.block_dv) * dtype.itemsize
            for pick in (tiles.pick_forward, tiles.pick_queries, tiles.pick_bias):
                tile = pick(spec, shape, capability)
                assert max(1, tile.num_stages - 1) * tile.block_n * row <= limit, (pick, dim)
            tile = tiles.pick_keys(spec, shape, capability)
            passing = max(1, tile.num_stages - 1) * tile.block_m * row
            assert passing + tile.block_n * row <= limit, dim


def test_tiles_do_not_depend_on_the_batch():
    for s, t in ((1, 4096), (17, 300), (2048, 2048)):
        one, many = (_spec(q_len=s, kv_len=t, batch=n) for n in (1, 64))
        assert tiles.form(one, "ieee") == tiles.form(many, "ieee")
        assert tiles.pick_chunk(one) == tiles.pick_chunk(many)
        shape = tiles.form(one, "ieee")
        for pick in (tiles.pick_forward, tiles.pick_keys, tiles.pick_queries):
            assert pick(one, shape, 80) == pick(many, shape, 80)


@pytest.mark.parametrize("dim", [0, 1, 15, 16, 17, 64, 65, 255, 256])
def test_padded_is_the_next_power_of_two(dim):
    width = tiles.padded(dim)
    assert width >= max(dim, 16) and width & (width - 1) == 0 and width < max(2 * dim, 17)


def test_forms_hold_no_code_for_limits_that_hide_nothing():
    assert not tiles.form(_spec(), "ieee").hides
    wide = tiles.form(_spec(left=511, right=511), "ieee")
    assert not (wide.left or wide.right)
    narrow = tiles.form(_spec(left=510, right=510), "ieee")
    assert narrow.left and narrow.right and narrow.hides
    shifted = tiles.form(_spec(q_len=1, shift=511, right=0), "ieee")
    assert not shifted.right  # one query at the last key sees all


@pytest.mark.parametrize("rows, keys, parts", [(1, 512, 1), (1, 1024, 4), (1, 8192, 32),
                                               (1, 1 << 20, 64), (65, 8192, 1)])  # fmt: skip
def test_chunks_cover_the_keys(rows, keys, parts):
    chunk = tiles.pick_chunk(_spec(q_len=rows, kv_len=keys))
    assert (-(-keys // chunk) if chunk else 1) == parts
    assert chunk % tiles.LARGEST_BLOCK == 0


def test_attention_supports_says_why_not():
    assert "float64" in attention.supports(_spec(dtype=torch.float64))
    assert "256" in attention.supports(_spec(value_dim=257))
    assert "xpu" in attention.supports(_spec(device="xpu"))
    assert attention.supports(_spec()) is None


def test_compilations_name_every_argument_of_their_kernel():
    for capability in CARDS:
        seen = set()
        for form in attention.compilations(capability):
            kernel = form.kernel()
            assert list(form.signature) == list(inspect.signature(kernel.fn).parameters), form.name
            constants = {n for n, kind in form.signature.items() if kind == "constexpr"}
            assert constants == set(form.constexprs), form.name
            assert form.name not in seen
            seen.add(form.name)


def test_kernels_are_not_compiled_anew_for_numbers_that_lengths_decide():
    numbers = {"q_len", "kv_len", "shift", "left", "right", "chunk", "part_rows", "rows", "parts"}
    for form in attention.compilations(80):
        for parameter in form.kernel().params:
            if parameter.name in numbers:
                assert parameter.do_not_specialize, (form.name, parameter.name)


@pytest.mark.parametrize("dim", [128, 256])
@pytest.mark.parametrize("sides", [dict(mask=(40, 70)), dict(padded=True)], ids=["mask", "padded"])
def test_masks_of_bytes_with_dropout_and_wide_heads(dim, sides):
    case = Case(1, 1, 40, 70, dim, p=0.1, **sides)
    tensors = make(case, torch.float16)
    exact_in, our_in = with_grad(tensors, case, torch.float64), with_grad(tensors, case)
    with dispatch.use_backend("triton"):
        got = gradients(list(ours(our_in, case)), inputs_of(our_in, case))
    want = gradients(formula(exact_in, case), inputs_of(exact_in, case))
    for ours_, exact in zip(got, want, strict=True):
        assert (ours_.double() - exact).norm() <= 2e-3 * exact.norm()


def test_dropout_of_everything_leaves_lse():
    q = torch.randn(1, 1, 5, 8)
    out, lse = scaled_dot_product_attention(q, q, q, dropout_p=1.0, return_lse=True,
                                            backend="triton")  # fmt: skip
    want = scaled_dot_product_attention(q, q, q, return_lse=True, backend="reference")[1]
    assert bool((out == 0).all()) and random.threshold(1.0) == 65536
    torch.testing.assert_close(lse, want)
