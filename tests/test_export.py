"""torch.export and torch.ao.quantization of accelerated models: a program has llmkern's ops; what
looks for torch's classes does not pass over llmkern's in silence."""

import contextlib
import copy
import io
import warnings

import pytest
import torch
from models import NanoGPT
from torch import nn

import llmkern

E, S = 16, 6
STRICT = pytest.mark.parametrize("strict", [False, True])


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(E, E), nn.LayerNorm(E), nn.GELU(), nn.Dropout(0.1))
        layer = nn.TransformerEncoderLayer(E, 2, 2 * E, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.decoder = nn.TransformerDecoderLayer(E, 2, 2 * E, batch_first=True)
        self.last = nn.Sequential(nn.RMSNorm(E), nn.SiLU(), nn.ReLU())

    def forward(self, x):
        x = self.encoder(self.first(x))
        return self.last(self.decoder(x, x))


def ops(program) -> set[str]:
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    return {target.split(".")[1] for target in targets if target.startswith("llmkern.")}


@STRICT
@pytest.mark.parametrize("dynamic", [False, True])
def test_the_program_has_llmkerns_ops(strict, dynamic):
    model, x = Model().eval(), torch.randn(2, S, E)
    expected = model(x)
    llmkern.accelerate(model)
    shapes = ({0: torch.export.Dim("batch"), 1: torch.export.Dim("length")},) if dynamic else None
    program = torch.export.export(model, (x,), strict=strict, dynamic_shapes=shapes)
    assert ops(program) == {"linear", "norm", "activation", "attention"}
    torch.testing.assert_close(program.module()(x), expected, rtol=1e-4, atol=1e-5)
    if dynamic:
        longer = torch.randn(3, S + 1, E)
        torch.testing.assert_close(program.module()(longer), model(longer), rtol=1e-4, atol=1e-5)
    assert ops(program.run_decompositions()) == ops(program)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer)
    torch.testing.assert_close(loaded.module()(x), expected, rtol=1e-4, atol=1e-5)


@STRICT
def test_a_program_in_training_has_dropout_and_gradients(strict):
    model, x = Model(), torch.randn(2, S, E)
    llmkern.accelerate(model)
    program = torch.export.export(model, (x,), strict=strict)
    assert ops(program) == {"linear", "norm", "activation", "attention", "dropout"}
    trained = program.module()
    torch.manual_seed(0)
    got = trained(x)
    torch.manual_seed(0)
    torch.testing.assert_close(got, model(x))
    got.square().sum().backward()
    assert all(p.grad is not None for p in trained.parameters())


@STRICT
def test_rerouted_calls_are_in_the_program(strict):
    model, idx = NanoGPT().eval(), torch.randint(0, 50, (2, S))
    expected = model(idx)
    report = llmkern.accelerate(model, functional=True)
    program = torch.export.export(model, (idx,), strict=strict)
    assert ops(program) == {"linear", "norm", "activation", "attention"}
    torch.testing.assert_close(program.module()(idx), expected, rtol=1e-4, atol=1e-5)
    report.undo()
    assert not ops(torch.export.export(model, (idx,), strict=strict))


def test_onnx_gets_torchs_operators(monkeypatch):
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    model, x = Model().eval(), torch.randn(2, S, E)
    llmkern.accelerate(model, functional=True)
    assert not ops(torch.export.export(model, (x,), strict=False))


def test_onnx_export():
    pytest.importorskip("onnxscript", reason="torch.onnx.export needs onnxscript")
    model, x = Model().eval(), torch.randn(2, S, E)
    llmkern.accelerate(model)
    program = torch.onnx.export(model, (x,), dynamo=True, verbose=False)
    assert {node.domain for node in program.model.graph} <= {"", "pkg.torch"}


def quantised(model: nn.Module) -> bool:
    return any("quantized" in type(m).__module__ for m in model.modules())


@contextlib.contextmanager
def told():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield (found := [])
    found += [str(w.message) for w in caught if "llmkern" in str(w.message)]


ao = pytest.importorskip("torch.ao.quantization", reason="torch's own quantisation has moved out")


@pytest.mark.parametrize("spec", [None, {nn.Linear}])
def test_dynamic_quantisation_says_that_it_passes_over(spec):
    model = nn.Sequential(nn.Linear(E, E), nn.ReLU(), nn.Linear(E, 2))
    with told() as messages:
        plain = ao.quantize_dynamic(copy.deepcopy(model), spec)
    assert quantised(plain) and not messages
    report = llmkern.accelerate(model)
    with told() as messages:
        left = ao.quantize_dynamic(model, spec)
    assert not quantised(left) and "undo()" in messages[0]
    assert not hasattr(left[0], "qconfig") and not hasattr(model[0], "qconfig")
    report.undo()
    with told() as messages:
        assert quantised(ao.quantize_dynamic(model, spec))
    assert not messages
    llmkern.accelerate(plain)  # before accelerate it is quantised and stays so
    assert quantised(plain) and plain(torch.randn(3, E)).shape == (3, 2)


def test_static_quantisation_says_that_it_passes_over():
    model = nn.Sequential(ao.QuantStub(), nn.Linear(E, E), ao.DeQuantStub()).eval()
    model.qconfig = ao.get_default_qconfig("x86")
    llmkern.accelerate(model)
    with told() as messages:
        prepared = ao.prepare(model)
    assert messages and copy.deepcopy(prepared[1]).qconfig is not None


def test_models_without_a_linear_of_ours_are_quantised_in_silence():
    model = nn.Sequential(nn.Linear(E, E), nn.LayerNorm(E), nn.GELU())
    llmkern.accelerate(model, exclude=nn.Linear)
    with told() as messages:
        assert quantised(ao.quantize_dynamic(model))
    assert not messages
