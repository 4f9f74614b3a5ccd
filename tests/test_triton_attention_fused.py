"""Attention backward in one pass, in which programs add to dq in turn: in the emulator, whose
races between CTAs know of the locks."""

import pytest
import torch
from attention_cases import Case, formula, inputs_of, make, ours, theirs, with_grad
from rule import check_rule, gradients

from llmkern import dispatch, emulator
from llmkern.backends.triton import attention
from llmkern.backends.triton import tiles_attention as tiles
from llmkern.functional import scaled_dot_product_attention
from llmkern.specs import UNBOUNDED, AttentionSpec

triton = pytest.importorskip("triton")

# More than one block of keys, so that there are turns to wait for.
CASES = {
    "full": Case(1, 1, 128, 256, 64),
    "causal": Case(1, 2, 256, 256, 64, causal=True),
    "odd lengths": Case(2, 1, 70, 300, 64),
    "odd head dim": Case(1, 1, 9, 131, 50, causal=True, align="bottom_right"),
    "group, wide": Case(1, 4, 131, 129, 128, g=2, causal=True),
    "window to the right": Case(1, 1, 130, 140, 64, window=(None, 7)),
    "band beyond the last query": Case(1, 1, 100, 140, 64, window=(None, 20)),
    "key padding": Case(2, 1, 33, 140, 64, padded=True),
}


@pytest.fixture
def launched(monkeypatch):
    """Names of the passes of backward that ran."""
    found = []
    for name in ("_launch_fused", "_launch_keys", "_launch_queries"):
        real = getattr(attention, name)

        def note(*args, _name=name, _real=real, **options):
            found.append(_name.removeprefix("_launch_"))
            return _real(*args, **options)

        monkeypatch.setattr(attention, name, note)
    return found


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_one_pass_matches_fp64(case, launched, emulated_triton):
    tensors = make(case, torch.bfloat16)
    exact_in, torch_in = with_grad(tensors, case, torch.float64), with_grad(tensors, case)
    our_in = with_grad(tensors, case)
    exact, torch_lse = formula(exact_in, case), formula(torch_in, case)[1]
    torch_out = theirs(torch_in, case)
    with dispatch.use_backend("triton"):
        our_g = gradients(list(ours(our_in, case)), inputs_of(our_in, case))
    assert launched[0] == "fused" and "keys" not in launched
    torch_g = gradients([torch_out, torch_lse], inputs_of(torch_in, case))
    exact_g = gradients(exact, inputs_of(exact_in, case))
    for name, *gs in zip("qkv", our_g, torch_g, exact_g, strict=False):
        check_rule(f"gradient of {name}", *gs)


def _gradients(q, k, v, **options):
    inputs = [t.detach().requires_grad_() for t in (q, k, v)]
    with dispatch.use_backend("triton"):
        out = scaled_dot_product_attention(*inputs, **options)
        return torch.autograd.grad(out, inputs, _normal(*out.shape[1:]).expand_as(out))


def _normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def _inputs(*shape):
    return tuple(_normal(*shape, seed=seed) for seed in (1, 2, 3))


def test_bits_do_not_depend_on_the_order_in_which_programs_start():
    q, k, v = _inputs(1, 1, 256, 64)
    found = []
    for seed in (0, 1, 2):
        with emulator.device("sm_80", seed=seed):
            found.append(_gradients(q, k, v, is_causal=True))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_an_element_of_a_batch_has_the_same_bits_alone(emulated_triton):
    q, k, v = _inputs(2, 2, 160, 64)
    together = _gradients(q, k, v)
    for i in range(2):
        alone = _gradients(*(t[i : i + 1] for t in (q, k, v)))
        assert all(torch.equal(a[i : i + 1], b) for a, b in zip(together, alone, strict=True))


def _close(a, b):
    """Two passes, which step in, and one round elsewhere."""
    torch.testing.assert_close(a, b, atol=0.02 * b.abs().max().item(), rtol=0.02)


@pytest.mark.parametrize("broken", ["k", "v", "q"])
def test_hidden_nan_stays_where_it_is(broken, emulated_triton):
    """The last key is seen by the last query alone, the first query sees the first key alone."""
    tensors = dict(zip("qkv", _inputs(1, 1, 140, 64), strict=True))
    plain = _gradients(*tensors.values(), is_causal=True)
    row = 0 if broken == "q" else 139
    tensors[broken] = tensors[broken].clone()
    tensors[broken][0, 0, row] = float("nan")
    dq, dk, dv = _gradients(*tensors.values(), is_causal=True)
    if broken == "q":
        assert dk[0, 0, 1:].isfinite().all() and dv[0, 0, 1:].isfinite().all()
        assert dq[0, 0, 1:].isfinite().all() and dq[0, 0, 0].isnan().any()
        _close(dq[0, 0, 1:], plain[0][0, 0, 1:])
    else:
        assert dq[0, 0, :139].isfinite().all()
        _close(dq[0, 0, :139], plain[0][0, 0, :139])


def _spec(**changes) -> AttentionSpec:
    plain = AttentionSpec(torch.bfloat16, "cuda", 1, 4, 4, 512, 512, 64, 64, 0.125, 0.0, 0,
                          UNBOUNDED, UNBOUNDED, 0.0, False, False, False, False, False)  # fmt: skip
    return plain._replace(**changes)


@pytest.mark.parametrize(
    "changes, fused",
    [
        ({}, True),
        (dict(right=0), True),
        (dict(right=0, shift=-1), False),  # query 0 sees nothing
        (dict(left=100, right=0), False),  # later queries do not see key 0
        (dict(dropout_p=0.1), False),
        (dict(bias=True), False),
        (dict(dtype=torch.float32), False),
        (dict(head_dim=256, value_dim=256), False),
        (dict(head_dim=32, value_dim=32), False),
    ],
)
def test_one_pass_runs_where_every_query_sees_key_0(changes, fused):
    spec = _spec(**changes)
    assert (tiles.pick_fused(spec, tiles.form(spec, "ieee"), 80) is not None) == fused


def test_two_passes_run_where_one_gradient_is_wanted(launched, emulated_triton):
    q, k, v = _inputs(1, 1, 32, 64)
    q.requires_grad_()
    with dispatch.use_backend("triton"):
        scaled_dot_product_attention(q, k, v).sum().backward()
    assert launched == ["queries"]


@pytest.mark.parametrize("queries", [32, 64])
def test_lengths_do_not_change_how_counters_are_aligned(queries, monkeypatch, emulated_triton):
    """An address that is no multiple of 16 is another form of the kernel."""
    from llmkern.backends.triton import attention_bwd_fused_kernels as kernels

    given = {}

    class Kernel:
        def __getitem__(self, grid):
            return given.update

    monkeypatch.setattr(kernels, "attention_bwd_fused", Kernel())
    _gradients(*_inputs(1, 1, queries, 64))
    assert given["ticket"].data_ptr() % 16 == 0 and given["locks"].data_ptr() % 16 == 0
    assert given["locks"].numel() == queries // 32
