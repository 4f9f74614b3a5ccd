"""The CUDA attention backward in the emulator: one pass or two, whose blocks hand on float sums of
dQ. The whole matrix runs as slow tests of test_attention*.py with backend cuda."""

import pytest
import torch
from attention_cases import Case, formula, inputs_of, make, ours, theirs, with_grad
from rule import check_rule, gradients

from llmkern import emulator
from llmkern.backends.cuda import _ext

BF16, F16 = torch.bfloat16, torch.float16


def _backward(case, tensors, architecture="sm_80", seed=0, wanted="qkv"):
    """Gradients by name, and the kernels that ran."""
    given = with_grad(tensors, case)
    for name in set("qkv") - set(wanted):
        given[name].requires_grad_(False)
    with emulator.device(architecture, seed=seed) as device:
        reason = _ext.unavailable("cpu")
        if reason:
            pytest.skip(reason)
        outputs = ours(given, case, backend="cuda")
        got = gradients(outputs, [given[name] for name in wanted])
        kernels = " ".join(device.kernels())
    return dict(zip(wanted, got, strict=True)), kernels


# Blocks of 64 or 128 keys, tiles of 64 or 32 queries: several of each, cut and whole.
ONE_PASS = {
    "causal": (Case(1, 2, 190, 190, 64, causal=True), BF16, "sm_80"),
    "group": (Case(1, 4, 70, 150, 40, g=2, causal=True, align="bottom_right"), F16, "sm_80"),
    "full": (Case(2, 1, 70, 150, 128, dv=72), BF16, "sm_80"),
    "less shared memory": (Case(2, 1, 70, 150, 128, dv=72), BF16, "sm_86"),
    "causal, less shared memory": (Case(1, 2, 150, 150, 80, g=1, causal=True), F16, "sm_86"),
    "window": (Case(1, 1, 200, 280, 64, window=(70, 20)), BF16, "sm_80"),
    "padding": (Case(2, 1, 70, 200, 24, padded=True, causal=True), BF16, "sm_80"),
    "dropout": (Case(1, 2, 50, 140, 64, p=0.2), F16, "sm_80"),
    "wide dropout": (Case(1, 1, 50, 140, 96, p=0.2, causal=True), BF16, "sm_80"),
}


@pytest.mark.parametrize("name", ONE_PASS)
def test_backward_in_one_pass_matches_fp64(name):
    case, dtype, architecture = ONE_PASS[name]
    tensors = make(case, dtype)
    got, kernels = _backward(case, tensors, architecture)
    assert "attention_bwd_joint" in kernels and "attention_bwd_queries" not in kernels
    exact_in, torch_in = with_grad(tensors, case, torch.float64), with_grad(tensors, case)
    exact = gradients(formula(exact_in, case), inputs_of(exact_in, case))
    outputs = (theirs(torch_in, case), formula(torch_in, case)[1])
    torch_g = gradients(outputs, inputs_of(torch_in, case))
    for key, *gs in zip("qkv", got.values(), torch_g, exact, strict=True):
        check_rule(f"gradient of {key}", *gs)


@pytest.mark.parametrize("name", ["causal", "group", "less shared memory"])
def test_backward_does_not_depend_on_the_order_of_blocks(name):
    case, dtype, architecture = ONE_PASS[name]
    tensors = make(case, dtype)
    first, _ = _backward(case, tensors, architecture)
    for seed in (1, 2):
        again, _ = _backward(case, tensors, architecture, seed)
        assert all(torch.equal(again[key], first[key]) for key in first)


def test_backward_of_an_element_does_not_depend_on_the_rest_of_the_batch():
    case = Case(3, 2, 70, 150, 64, causal=True, align="bottom_right")
    tensors = make(case, BF16)
    whole, _ = _backward(case, tensors)
    alone = {key: t[1:2] if key in "qkv" else t for key, t in tensors.items()}
    projected = _projected(case, alone)
    for key, gradient in projected.items():
        assert torch.equal(gradient, whole[key][1:2]), key


def _projected(case, tensors):
    """Gradients of element 1, of the projection that `gradients` makes of the whole batch."""
    given = with_grad(tensors, case)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(case.b, case.h, case.s, case.d, generator=generator),
               torch.randn(case.b, case.h, case.s, generator=generator)]  # fmt: skip
    with emulator.device("sm_80"):
        outputs = ours(given, case._replace(b=1), backend="cuda")
        loss = sum((y.double() * w[1:2].double()).sum()
                   for y, w in zip(outputs, weights, strict=True))  # fmt: skip
        return dict(zip("qkv", torch.autograd.grad(loss, inputs_of(given, case)), strict=True))


@pytest.mark.parametrize("where", ["k", "v", "q", "dout"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_backward_keeps_nan_from_those_who_do_not_see_it(where, poison, head_dim):
    """One row of several tiles, which those before or after it in its own tile do not see."""
    s, row = 200, 150
    case = Case(1, 1, s, s, head_dim, causal=True)
    tensors, dout = make(case, BF16), torch.randn(1, 1, s, head_dim).to(BF16)
    results = []
    for value in (None, poison):
        given = with_grad(tensors, case)
        to = dout.clone() if where == "dout" else given[where]
        if value is not None:
            with torch.no_grad():
                to[:, :, row] = value
        with emulator.device("sm_80") as device:
            out, _ = ours(given, case, backend="cuda")
            out.backward(to if where == "dout" else dout)
            assert "attention_bwd_joint" in " ".join(device.kernels())
        results.append({name: given[name].grad[0, 0] for name in "qkv"})
    clean, got = results
    queries = torch.arange(s)
    tainted = queries >= row if where in "kv" else queries == row
    assert not bool(torch.isfinite(got["q"][tainted]).all(-1).any())
    torch.testing.assert_close(got["q"][~tainted], clean["q"][~tainted], atol=2e-2, rtol=2e-2)
    hidden = slice(s if where in "kv" else row + 1, s)  # keys that no tainted query sees
    for name in "kv":
        torch.testing.assert_close(got[name][hidden], clean[name][hidden], atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize(
    ("case", "wanted"),
    [
        (Case(1, 2, 70, 70, 64, causal=True), "q"),
        (Case(1, 2, 70, 70, 64, causal=True), "kv"),
        (Case(1, 2, 70, 40, 64, causal=True, align="bottom_right"), "qkv"),  # rows that see no key
        (Case(1, 2, 70, 40, 64, window=(5, 0)), "qkv"),
    ],
)
def test_backward_takes_two_passes_where_one_would_waste_or_leave_out(case, wanted):
    tensors = make(case, BF16)
    got, kernels = _backward(case, tensors, wanted=wanted)
    assert "attention_bwd_joint" not in kernels
    assert ("attention_bwd_queries" in kernels) == ("q" in wanted)
    assert ("attention_bwd_keys" in kernels) == ("k" in wanted)
    exact_in = with_grad(tensors, case, torch.float64)
    exact = gradients(formula(exact_in, case), [exact_in[name] for name in wanted])
    for gradient, true in zip(got.values(), exact, strict=True):
        torch.testing.assert_close(gradient.double(), true, atol=5e-2, rtol=5e-2)
