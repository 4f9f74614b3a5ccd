"""CUDA calls without a CUDA device: fake tensors go through every op, dispatch picks Triton.

torch built for the CPU cannot record gradients on fake cuda tensors, so backward is called by its
op's name.
"""

import pytest
import torch
from torch._subclasses import FakeTensorMode

import llmkern
from llmkern import dispatch, functional
from llmkern.backends.triton import _launch
from llmkern.errors import BackendError, FallbackWarning
from llmkern.specs import ActivationSpec, DropoutSpec, NormSpec

pytestmark = pytest.mark.skipif(
    _launch.version() is None, reason="triton is not installed, cuda calls fall to the reference"
)
BF16 = torch.bfloat16
NORM = NormSpec(BF16, BF16, "cuda", 2048, 1024, 1e-5, False, False, True, 0.1, True, BF16)
SPECS = {
    "norm": NORM,
    "dropout": DropoutSpec(BF16, "cuda", 4096, 0.1),
    "activation": ActivationSpec(BF16, "cuda", 4096, "gelu"),
}


@pytest.fixture
def on_fake_cuda():
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        yield


def _tensor(*shape, dtype=BF16):
    return torch.empty(shape, dtype=dtype, device="cuda")


def _check(result, shape, dtype=BF16):
    assert (tuple(result.shape), result.dtype) == (shape, dtype)
    assert result.device.type == "cuda"


def test_functions_give_cuda_tensors_of_the_right_shape(on_fake_cuda):
    x, weight, shape = _tensor(4, 16, 64), _tensor(64), (4, 16, 64)
    _check(functional.layer_norm(x, 64, weight, weight), shape)
    _check(functional.rms_norm(x, 64, weight), shape)
    wide = _tensor(4, 16, 64, dtype=torch.float32)
    for part in functional.add_layer_norm(x, wide, 64, dropout_p=0.1, prenorm=True):
        _check(part, shape, torch.float32)
    _check(functional.dropout(x, 0.1), shape)
    for function in (functional.gelu, functional.relu, functional.silu):
        _check(function(x), shape)
    _check(functional.linear(x, _tensor(128, 64), activation="gelu"), (4, 16, 128))
    q, k = _tensor(2, 4, 16, 64), _tensor(2, 2, 24, 64)
    out = functional.scaled_dot_product_attention(q, k, k, enable_gqa=True, dropout_p=0.1)
    _check(out, (2, 4, 16, 64))


def test_gradients_are_cuda_tensors_of_the_right_shape(on_fake_cuda):
    x, weight, seed = _tensor(8, 64), _tensor(64), torch.zeros(1, dtype=torch.int64, device="cuda")
    statistics = _tensor(2, 8, dtype=torch.float32)
    dx, dresidual, dweight, dbias = torch.ops.llmkern.norm_backward(
        x, x, x, weight, statistics, seed, 64, 1e-5, False, False, 0.1, True, BF16, BF16,
        [True, True, True], None,
    )  # fmt: skip
    for gradient, shape in ((dx, (8, 64)), (dresidual, (8, 64)), (dweight, (64,)), (dbias, (64,))):
        _check(gradient, shape)
    _check(torch.ops.llmkern.activation_backward(x, x, "gelu", None), (8, 64))
    _check(torch.ops.llmkern.dropout(x, seed, 0.1, None), (8, 64))


FUSED = ("cuda", "triton")  # cuda where there was an nvcc to build it, and for some ops alone


@pytest.mark.parametrize("op", SPECS)
def test_a_fused_backend_serves_cuda_without_a_fallback(op):
    before = llmkern.fallbacks()
    chosen = dispatch.decide(op, SPECS[op]).backend
    assert chosen in FUSED
    assert dispatch.decide(op, SPECS[op], "triton").backend == "triton"
    with llmkern.fallback_policy("error"):
        assert dispatch.resolve(op, SPECS[op]).__name__ == f"llmkern.backends.{chosen}.{op}"
    assert llmkern.fallbacks() == before
    with pytest.raises(BackendError, match="cpu: it serves CPU tensors, not cuda"):
        dispatch.decide(op, SPECS[op], "cpu")


@pytest.mark.parametrize("op", SPECS)
def test_float64_on_cuda_falls_to_the_reference_and_says_so(op):
    spec = SPECS[op]._replace(dtype=torch.float64)
    said = "(cuda|triton) cannot serve .*float64.* reference serves it"  # the last that was asked
    with pytest.warns(FallbackWarning, match=said):
        assert dispatch.resolve(op, spec).__name__ == f"llmkern.backends.reference.{op}"


def test_explain_tells_of_cuda_without_a_device(on_fake_cuda):
    x, weight = _tensor(2048, 1024), _tensor(1024)
    (report,) = llmkern.explain(functional.layer_norm, x, 1024, weight, weight).ops
    assert report.op == "norm" and report.backend in FUSED
    assert report.bytes == 2 * 2048 * 1024 * 2
    assert report.spec.device == "cuda"
    with llmkern.use_backend("reference"):
        (report,) = llmkern.explain(functional.gelu, x).ops
    assert report.backend == "reference"


def test_accelerated_layer_takes_fused_ops_on_cuda(monkeypatch):
    layer = torch.nn.TransformerEncoderLayer(
        64, 4, 128, dropout=0.1, activation="gelu", batch_first=True, device="meta"
    )
    llmkern.accelerate(layer)
    # On a CUDA machine tensors are no subclass and a fused backend is there.
    monkeypatch.setattr(dispatch, "unserved", lambda *tensors: None)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        layer.to_empty(device="cuda")
        x = _tensor(2, 8, 64, dtype=torch.float32)
        _check(layer(x), (2, 8, 64), torch.float32)
        reports = llmkern.explain(layer, x).ops
    ops = [report.op for report in reports]
    assert ops.count("norm") == 2 and "attention" in ops and "linear" in ops
    for report in reports:
        assert report.backend in FUSED, report


def test_compiling_an_explained_call_records_it_once():
    compiled = torch.compile(functional.layer_norm, fullgraph=True, backend="aot_eager")
    ops = llmkern.explain(compiled, torch.randn(3, 8), 8).ops
    assert [report.op for report in ops] == ["norm"]
