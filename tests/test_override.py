"""override(): torch.nn.functional calls on llmkern, counted, reversible, compiled."""

import concurrent.futures
import copy
import pickle
import time

import pytest
import torch
import torch.nn.functional as F
from models import NanoGPT
from torch import nn
from torch.overrides import TorchFunctionMode

import llmkern

X = torch.randn(3, 5, 16)
QKV = torch.randn(2, 3, 7, 8)
WEIGHT = torch.randn(16)

CALLS = {
    "linear": [
        lambda: F.linear(X, torch.ones(4, 16)),
        lambda: F.linear(X, torch.ones(4, 16), None),
    ],
    "scaled_dot_product_attention": [
        lambda: F.scaled_dot_product_attention(QKV, QKV, QKV),
        lambda: F.scaled_dot_product_attention(QKV, QKV, QKV, is_causal=True, scale=0.3),
        lambda: F.scaled_dot_product_attention(
            QKV, QKV, QKV, attn_mask=torch.ones(7, 7).tril() > 0
        ),
        lambda: F.scaled_dot_product_attention(QKV, QKV[:, :1], QKV[:, :1], enable_gqa=True),
        lambda: F.scaled_dot_product_attention(QKV[0], QKV[0], QKV[0], torch.randn(7, 7)),
    ],
    "layer_norm": [
        lambda: F.layer_norm(X, (16,), WEIGHT, eps=1e-3),
        lambda: torch.layer_norm(X, (5, 16)),
        lambda: torch.layer_norm(X, [16], WEIGHT, None, 1e-5, False),
    ],
    "rms_norm": [lambda: F.rms_norm(X, (16,), WEIGHT), lambda: torch.rms_norm(X, (16,), eps=1e-4)],
    "gelu": [lambda: F.gelu(X), lambda: F.gelu(X, approximate="tanh")],
    "silu": [lambda: F.silu(X), lambda: torch._C._nn.silu(X)],
    "relu": [lambda: F.relu(X), lambda: torch.relu(X), lambda: X.relu()],
    "dropout": [
        lambda: F.dropout(X, 0.0),
        lambda: torch.dropout(X, 0.0, True),
        lambda: torch.dropout(X, p=0.0, train=True),
    ],
}


@pytest.mark.parametrize("name", CALLS)
def test_calls_are_rerouted_and_right(name):
    for call in CALLS[name]:
        torch.manual_seed(5)
        expected = call()
        with llmkern.override() as calls:
            torch.manual_seed(5)
            got = call()
        assert calls.served == {name: 1} and not calls.declined
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda: F.relu(X.clone(), inplace=True), "relu: in place"),
        (lambda: F.silu(X.clone(), inplace=True), "silu: in place"),
        (lambda: F.dropout(X, 0.5, training=False), "dropout: not in training"),
        (lambda: F.dropout(X.clone(), 1.0, inplace=True), "dropout: in place"),
        (lambda: torch.relu(torch.arange(-3, 3)), "relu: dtype int64"),
        (lambda: F.gelu(X.to("meta")), "gelu: no fused backend serves meta here"),
        (lambda: F.relu(X.to_sparse()), "relu: layout torch.sparse_coo"),
    ],
)
def test_what_is_not_served_runs_as_before(call, reason):
    expected = call()
    with llmkern.override() as calls:
        got = call()
    assert not calls.served and calls.declined == {reason: 1}
    assert got.shape == expected.shape and got.layout == expected.layout
    if not got.is_meta:
        torch.testing.assert_close(got.to_dense(), expected.to_dense())
    assert reason in str(calls)


def test_errors_are_those_of_torch():
    with pytest.raises(RuntimeError) as expected:
        F.layer_norm(X, (15,))
    with llmkern.override() as calls, pytest.raises(RuntimeError) as got:
        F.layer_norm(X, (15,))
    assert str(got.value) == str(expected.value)
    (reason,) = calls.declined
    assert reason.startswith("layer_norm: layer_norm: input must end in normalized_shape")


def test_what_no_fused_backend_serves_is_left_to_torch(monkeypatch):
    from llmkern.backends.cpu import norm

    monkeypatch.setattr(norm, "supports", lambda spec: "not today")
    monkeypatch.setattr(llmkern.dispatch, "_choices", {})
    expected = F.layer_norm(X, (16,))
    with llmkern.override() as calls:
        torch.testing.assert_close(F.layer_norm(X, (16,)), expected)
    assert not calls.served
    assert "not today" in next(iter(calls.declined))


def test_ends_with_its_block_and_nests():
    with llmkern.override() as outer:
        F.gelu(X)
        with pytest.raises(KeyError), llmkern.override() as inner:
            F.gelu(X)
            raise KeyError
        F.gelu(X)
    F.gelu(X)
    assert outer.served == {"gelu": 2} and inner.served == {"gelu": 1}


def test_other_modes_still_see_the_rest():
    class Names(TorchFunctionMode):
        def __init__(self):
            super().__init__()
            self.names = []

        def __torch_function__(self, func, types, args=(), kwargs=None):
            self.names.append(getattr(func, "__name__", str(func)))
            return func(*args, **(kwargs or {}))

    with Names() as names, llmkern.override() as calls:
        torch.softmax(X, -1)
    assert "softmax" in names.names and not calls.served


def test_gradients_are_right_and_backward_may_be_outside():
    model = NanoGPT()
    idx = torch.randint(0, 50, (2, 6))
    expected = torch.autograd.grad(model(idx).square().mean(), list(model.parameters()))
    with llmkern.override():
        loss = model(idx).square().mean()
    got = torch.autograd.grad(loss, list(model.parameters()))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def test_other_threads_are_not_touched():
    with llmkern.override() as calls, concurrent.futures.ThreadPoolExecutor(1) as pool:
        pool.submit(F.gelu, X).result()
        assert not calls.served


def test_counts_of_many_threads_add_up():
    model = NanoGPT()
    report = llmkern.accelerate(model, functional=True)
    idx = torch.randint(0, 50, (1, 4))
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: model(idx), range(20)))
    assert report.rerouting.served["layer_norm"] == 100


def test_dropout_is_rerouted_in_training_only():
    model = NanoGPT(dropout=0.5)
    idx = torch.randint(0, 50, (2, 6))
    with llmkern.override() as calls:
        model(idx)
        assert calls.served["dropout"] == 2
        model.eval()
        model(idx)
        assert calls.declined["dropout: not in training"] == 2


@pytest.mark.parametrize("where", ["inside", "around"])
def test_compiled_regions_are_rerouted(where):
    def function(x, weight):
        h = F.gelu(F.layer_norm(x, (16,)) @ weight, approximate="tanh")
        return F.linear(F.relu(h, inplace=True), weight)

    def inside(x, weight):
        with calls:
            return function(x, weight)

    calls = llmkern.override()
    x, weight = X.clone().requires_grad_(), torch.randn(16, 16, requires_grad=True)
    expected = function(x, weight)
    traced = inside if where == "inside" else function
    compiled = torch.compile(traced, fullgraph=True, backend="aot_eager")
    if where == "around":
        with calls:
            got = compiled(x, weight)
    else:
        got = compiled(x, weight)
    assert set(calls.served) == {"layer_norm", "gelu", "linear"}
    assert set(calls.declined) == {"relu: in place"}
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        torch.autograd.grad(got.sum(), [x, weight]),
        torch.autograd.grad(expected.sum(), [x, weight]),
        rtol=1e-4,
        atol=1e-4,
    )
    if where == "around":  # outside the block the region is torch's again
        counts = dict(calls.served)
        torch.testing.assert_close(compiled(x, weight), expected)
        assert counts == dict(calls.served)


def test_a_compiled_region_may_make_its_own():
    def function(x):
        with llmkern.override():
            return F.gelu(x)

    got = torch.compile(function, fullgraph=True, backend="aot_eager")(X)
    torch.testing.assert_close(got, F.gelu(X))


def test_copies_and_pickles():
    calls = llmkern.override()
    with calls:
        F.gelu(X)
    for copied in (copy.deepcopy(calls), pickle.loads(pickle.dumps(calls))):
        assert copied.served == {"gelu": 1}
        with copied:
            torch.compile(F.gelu, fullgraph=True, backend="eager")(X)
        assert copied.served == {"gelu": 2} and calls.served == {"gelu": 1}


def test_overhead_of_other_calls_is_small():
    """A dictionary look-up and torch's own mode machinery, as a difference of minima."""
    small = torch.ones(4)

    def best(repeats: int = 15, calls: int = 500) -> float:
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            for _ in range(calls):
                torch.add(small, small)
            times.append((time.perf_counter() - start) / calls)
        return min(times)

    plain = best()
    with llmkern.override():
        rerouted = best()
    assert rerouted - plain < 30e-6


def test_nn_modules_of_torch_are_reached_through_their_functions():
    model = nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.LayerNorm(16), nn.SiLU(), nn.ReLU())
    expected = model(X)
    with llmkern.override() as calls:
        got = model(X)
    assert calls.served == {"linear": 1, "gelu": 1, "layer_norm": 1, "silu": 1, "relu": 1}
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
