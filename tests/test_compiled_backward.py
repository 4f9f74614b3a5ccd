"""An eager graph whose backward runs inside a compiled function, or under compiled autograd."""

import copy

import pytest
import torch
import torch._dynamo.compiled_autograd
from op_cases import CASES
from torch import nn
from torch.utils.checkpoint import checkpoint

import llmkern


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _in_a_compiled_function(loss):
    torch.compile(lambda value: value.backward(), backend="eager")(loss)


def _in_a_compiled_step(loss):
    def step(value):
        value.backward()
        return value * 2

    torch.compile(step, backend="aot_eager")(loss)


def _under_compiled_autograd(loss):
    whole = torch.compile(backend="eager", fullgraph=True)
    with torch._dynamo.compiled_autograd._enable(whole):
        loss.backward()


BACKWARDS = [_in_a_compiled_function, _in_a_compiled_step, _under_compiled_autograd]


def _loss(outputs):
    return sum(y.square().sum() for y in outputs)


@pytest.mark.parametrize("backward", BACKWARDS)
@pytest.mark.parametrize("name", CASES)
def test_compiled_backward_of_an_eager_graph_is_the_eager_one(name, backward):
    case = CASES[name]
    tensors = case.tensors()
    expected = torch.autograd.grad(_loss(case.outputs(tensors)), tensors)
    for _ in range(2):  # the second time the code that the first made
        for t in tensors:
            t.grad = None
        backward(_loss(case.outputs(tensors)))
        for t, gradient in zip(tensors, expected, strict=True):
            torch.testing.assert_close(t.grad, gradient)


MODELS = {
    "linear": lambda: nn.Sequential(nn.Linear(64, 64)),
    "mlp": lambda: nn.Sequential(
        nn.Linear(64, 128), nn.GELU(), nn.Dropout(0.1), nn.Linear(128, 64)
    ),
    "norms": lambda: nn.Sequential(nn.LayerNorm(64), nn.ReLU(), nn.RMSNorm(64)),
    "encoder layer": lambda: nn.TransformerEncoderLayer(64, 4, 128, batch_first=True),
    "encoder layer, norm first": lambda: nn.TransformerEncoderLayer(
        64, 4, 128, batch_first=True, norm_first=True
    ),
}


def _train(model, forward, backward):
    for p in model.parameters():
        p.grad = None
    torch.manual_seed(11)
    backward(forward(model, torch.linspace(-1, 1, 2 * 16 * 64).view(2, 16, 64)).square().mean())
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize("backward", BACKWARDS)
@pytest.mark.parametrize("name", MODELS)
def test_compiled_backward_of_an_accelerated_model_is_the_eager_one(name, backward):
    model = MODELS[name]()
    llmkern.accelerate(model)
    expected = _train(model, lambda m, x: m(x), torch.Tensor.backward)
    for _ in range(5):
        got = _train(model, lambda m, x: m(x), backward)
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("name", MODELS)
def test_a_disabled_model_in_a_compiled_train_step(name):
    model = MODELS[name]()
    llmkern.accelerate(model)
    expected = _train(model, lambda m, x: m(x), torch.Tensor.backward)
    model.forward = torch.compiler.disable(model.forward)

    @torch.compile(backend="eager")
    def step(x):
        loss = model(x).square().mean()
        loss.backward()
        return loss

    def backward_with_forward(_):
        torch.manual_seed(11)
        for p in model.parameters():
            p.grad = None
        step(torch.linspace(-1, 1, 2 * 16 * 64).view(2, 16, 64))

    got = _train(model, lambda m, x: torch.zeros(1), backward_with_forward)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("backward", BACKWARDS[:2])
@pytest.mark.parametrize("name", MODELS)
def test_a_compiled_backward_recomputes_a_checkpoint(name, backward):
    model = MODELS[name]()
    llmkern.accelerate(model)

    def checkpointed(m, x):
        return checkpoint(m, x, use_reentrant=False)

    expected = _train(model, checkpointed, torch.Tensor.backward)
    got = _train(model, checkpointed, backward)
    torch.testing.assert_close(got, expected)


def test_a_function_made_after_a_reset_of_the_compiler_is_still_left_alone():
    model = MODELS["norms"]()
    plain = copy.deepcopy(model)
    llmkern.accelerate(model)
    torch._dynamo.reset()
    for got, expected in zip(
        _train(model, lambda m, x: m(x), _in_a_compiled_function),
        _train(plain, lambda m, x: m(x), torch.Tensor.backward),
        strict=True,
    ):
        torch.testing.assert_close(got, expected)
