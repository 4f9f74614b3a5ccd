"""Choice of backend: by name, by support, by policy; and what is told about it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import llmkern
from llmkern import dispatch, functional
from llmkern.backends.cpu import norm as cpu_norm
from llmkern.backends.cpu import tiles
from llmkern.errors import BackendError, FallbackWarning
from llmkern.functional import layer_norm


@pytest.fixture
def unsupported(monkeypatch):
    """The cpu backend refuses every norm."""
    monkeypatch.setattr(cpu_norm, "supports", lambda spec: "it is a test")
    monkeypatch.setattr(dispatch, "_choices", {})
    monkeypatch.setattr(dispatch, "_fallbacks", type(dispatch._fallbacks)())


def _call(**options):
    return layer_norm(torch.ones(3, 8), (8,), **options)


def _backends_of_call(**options):
    with dispatch.recording() as records:
        _call(**options)
    return [decision.backend for _, _, decision in records]


def test_cpu_tensors_go_to_the_cpu_backend():
    assert _backends_of_call() == ["cpu"]


def test_use_backend_and_argument_name_the_backend():
    with llmkern.use_backend("reference"):
        assert _backends_of_call() == ["reference"]
        assert _backends_of_call(backend="cpu") == ["cpu"]
        with llmkern.use_backend("cpu"):
            assert _backends_of_call() == ["cpu"]
        assert _backends_of_call() == ["reference"]
    assert _backends_of_call() == ["cpu"]


def test_use_backend_holds_after_the_choice_was_cached():
    _call()
    with llmkern.use_backend("reference"):
        assert _backends_of_call() == ["reference"]


def test_a_second_fused_backend_is_no_fallback(unsupported, monkeypatch):
    class Fused:
        supports = staticmethod(lambda spec: None)

    find = dispatch.module_of
    monkeypatch.setattr(
        dispatch, "module_of", lambda name, op: Fused if name == "triton" else find(name, op)
    )
    monkeypatch.setitem(dispatch.BACKENDS, "cpu", ("cpu", "triton", "reference"))
    with dispatch.recording() as records:
        _call(backend="reference")
    spec = records[0][1]
    with llmkern.fallback_policy("error"):
        assert dispatch.resolve("norm", spec) is Fused
    assert llmkern.fallbacks() == {}


def test_unknown_backend_is_an_error():
    with pytest.raises(BackendError, match="backend must be one of .* got 'gpu'"):
        _call(backend="gpu")
    with pytest.raises(ValueError, match="backend must be one of"), llmkern.use_backend("gpu"):
        pass


def test_missing_backend_named_raises_and_says_why():
    with pytest.raises(BackendError, match="norm: no backend serves this call on cpu .*cuda"):
        _call(backend="cuda")


def test_named_backend_that_cannot_serve_raises_under_any_policy(unsupported):
    with llmkern.fallback_policy("silent"):
        with pytest.raises(BackendError, match="it is a test"):
            _call(backend="cpu")
        with llmkern.use_backend("cpu"), pytest.raises(BackendError, match="it is a test"):
            _call()


def test_fallback_policy_warn_counts_and_tells(unsupported):
    with llmkern.fallback_policy("warn"), pytest.warns(FallbackWarning, match="it is a test"):
        _call()
    assert llmkern.fallbacks() == {"norm: it is a test": 1}


def test_fallback_policy_silent_still_counts(unsupported, recwarn):
    with llmkern.fallback_policy("silent"):
        _call()
        _call()
    assert not [w for w in recwarn if issubclass(w.category, FallbackWarning)]
    assert llmkern.fallbacks() == {"norm: it is a test": 2}


def test_fallback_policy_error_raises(unsupported):
    with llmkern.fallback_policy("error"), pytest.raises(BackendError, match="it is a test"):
        _call()
    assert llmkern.fallbacks() == {}


def test_unknown_policy_is_an_error():
    with pytest.raises(BackendError, match="fallback policy must be one of"):
        with llmkern.fallback_policy("loud"):
            pass


def test_backends_lists_every_backend_with_a_reason():
    status = {s.name: s for s in llmkern.backends()}
    assert set(status) == set(dispatch.NAMES)
    assert status["cpu"].available and status["reference"].available
    assert all(s.detail for s in status.values())


def test_explain_names_backend_cost_and_rejections(unsupported):
    x = torch.ones(3, 8)
    with llmkern.fallback_policy("silent"):
        explanation = llmkern.explain(layer_norm, x, (8,))
    (op,) = explanation.ops
    assert (op.op, op.backend) == ("norm", "reference")
    assert op.rejected == (("cpu", "it is a test"),)
    assert op.bytes == 2 * x.numel() * 4
    assert "passed over cpu: it is a test" in str(explanation)


def test_explain_of_a_call_without_our_ops_says_what_to_do():
    text = str(llmkern.explain(torch.ones, 3))
    assert text.startswith("no llmkern op ran in this call: ") and "llmkern.override()" in text
    model, x = torch.nn.Sequential(torch.nn.Linear(8, 8)), torch.ones(3, 8)
    plain = "no llmkern op ran in this call: the model is not accelerated; "
    for function in (model, model.forward, torch.compile(model, backend="eager")):
        assert str(llmkern.explain(function, x)) == f"{plain}llmkern.accelerate(model) first"
    with llmkern.accelerate(model):
        assert len(llmkern.explain(model, x).ops) == 1
        text = str(llmkern.explain(model.eval(), x.to_sparse()))
    assert "the model is accelerated, but what it ran is left to torch" in text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("rows", [1, 64])
def test_explain_names_the_library_of_a_product(dtype, rows, monkeypatch):
    x, weight = torch.ones(rows, 8, dtype=dtype), torch.ones(8, 8, dtype=dtype)
    said = {
        "own": "product by llmkern",
        "onednn": "product by oneDNN",
        "torch": "product by torch.mm",
    }
    for choice, text in said.items():
        if choice == "onednn" and dtype != torch.float32:
            continue  # it has none in float64, and in 16 bits on some processors alone
        monkeypatch.setattr(tiles, "pick_gemm", lambda *_, choice=choice: choice)
        (op,) = llmkern.explain(llmkern.functional.linear, x, weight).ops
        assert op.backend == "cpu" and f", {text}" in op.detail


def test_choices_do_not_grow_without_bound(monkeypatch):
    monkeypatch.setattr(dispatch, "_choices", {("k", n): None for n in range(4096)})
    _call()
    assert len(dispatch._choices) < 4096


def test_allocator_tuning_is_reversible_and_checked():
    with pytest.raises(ValueError, match="keep_bytes must be in"):
        llmkern.tune_allocator(1)
    assert llmkern.tune_allocator(1 << 28).detail
    assert torch.ones(1 << 20).sum() == 1 << 20
    assert llmkern.untune_allocator().detail


def test_support_matrix_of_the_docs_is_current():
    root = Path(__file__).resolve().parent.parent
    run = subprocess.run(
        [sys.executable, root / "tools" / "support_matrix.py", "--check"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    if run.returncode == 2:
        pytest.skip(run.stderr.strip())
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.usefixtures("own_product")
@pytest.mark.parametrize("device", ["meta"])
def test_default_device_and_dtype_do_not_reach_the_kernels_buffers(device):
    """A torch.device context or another default dtype is about the caller's tensors, not ours."""
    from llmkern import functional as K

    x, w = torch.randn(4, 8, requires_grad=True), torch.randn(6, 8, requires_grad=True)
    q = torch.randn(1, 2, 20, 8, requires_grad=True)
    calls = [
        lambda: K.layer_norm(x, (8,)),
        lambda: K.linear(x, w, activation="gelu"),
        lambda: K.scaled_dot_product_attention(q, q, q),
        lambda: K.gelu(x),
    ]
    for call in calls:
        want = call()
        torch.set_default_dtype(torch.float16)
        try:
            with torch.device(device):
                got = call()
                got.sum().backward()
        finally:
            torch.set_default_dtype(torch.float32)
        assert got.device.type == "cpu" and torch.equal(got, want)


def test_views_that_negate_lazily_are_read_negated(backend):
    """torch keeps -x of a conjugate's imaginary part as a bit of the view."""
    x = torch.randn(2, 3, 5, 8, dtype=torch.complex64).conj().imag
    plain, weight = x.clone(), torch.randn(6, 8)
    assert x.is_neg() and not plain.is_neg()
    for function in (
        lambda t: functional.gelu(t),
        lambda t: functional.layer_norm(t, 8),
        lambda t: functional.add_rms_norm(weight[:5].expand(2, 3, 5, 8), t, 8),
        lambda t: functional.linear(t, weight),
        lambda t: functional.linear(weight, t[0, 0]),
        lambda t: functional.dropout(t, 0.0),
        lambda t: functional.scaled_dot_product_attention(t, t, t, t @ t.mT),
    ):
        torch.testing.assert_close(function(x), function(plain))
