"""Outputs may be modified in place in training, wherever torch's own modules allow it."""

import pytest
import torch
from op_cases import CASES, serving
from torch import nn

import llmkern
from llmkern import functional as K
from llmkern.backends.cpu import linear as cpu_linear
from llmkern.backends.cpu import tiles

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def _zero_last(y):
    y[..., -1] = 0


CHANGES = {
    "add_": lambda y: y.add_(1),
    "*=": lambda y: y.mul_(2),
    "relu_": torch.relu_,
    "masked_fill_": lambda y: y.masked_fill_(y > 0, 0.5),
    "index assignment": _zero_last,
}


def _gradients(case, dtype, change, copy):
    tensors = case.tensors(dtype)
    outputs = [y.clone() if copy else y for y in case.outputs(tensors)]
    for y in outputs:
        change(y)
    loss = sum((y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum() for y in outputs)
    return torch.autograd.grad(loss, tensors)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.saves_output])
def test_an_output_changed_in_place_gives_the_gradients_of_a_changed_copy(
    name, backend, dtype, change
):
    with serving(backend):
        got = _gradients(CASES[name], dtype, CHANGES[change], copy=False)
        expected = _gradients(CASES[name], dtype, CHANGES[change], copy=True)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton", "cuda"])
@pytest.mark.parametrize("name", CASES)
def test_no_function_returns_a_view_of_memory_that_it_made(name, backend):
    case = CASES[name]
    with serving(backend):
        dtype = torch.float16 if backend == "cuda" else torch.float32
        try:
            outputs = case.outputs(case.tensors(dtype))
        except llmkern.errors.BackendError as refusal:
            pytest.skip(str(refusal))
    for y in outputs:
        while y.grad_fn.name() not in _FUNCTIONS:  # views that the caller's side makes
            y = y._base
        assert not y._is_view(), y.grad_fn


_FUNCTIONS = {
    f"{name}Backward"
    for name in ("_LinearFunction", "NormFunction", "_AddNormFunction", "_AttentionFunction",
                 "_DropoutFunction", "_ActivationFunction")
}  # fmt: skip


@pytest.mark.parametrize("library", [tiles.OWN, tiles.TORCH, tiles.ONEDNN])
@pytest.mark.parametrize("shape", [(8, 64), (2, 8, 64)], ids=str)
def test_linear_then_relu_in_place_trains_whoever_computes_the_product(library, shape, monkeypatch):
    monkeypatch.setattr(cpu_linear, "_pick", lambda *_: library)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(inplace=True), nn.Linear(64, 1))
    x = torch.randn(shape)
    expected = torch.autograd.grad(model(x).sum(), list(model.parameters()))
    llmkern.accelerate(model)
    got = torch.autograd.grad(model(x).sum(), list(model.parameters()))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_a_change_in_place_under_a_transform_is_right_or_an_error(activation):
    """torch.func differentiates plain formulas; relu's derivative reads what relu returned."""
    x, w = torch.randn(2, 3, 8), torch.randn(8, 8)

    def gradient(change):
        def loss(x):
            return change(K.linear(x, w, activation=activation)).sum()

        return torch.func.grad(loss)(x)

    if activation == "relu":
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            gradient(lambda y: y.add_(10.0))
    else:
        expected = gradient(lambda y: y + 10.0)
        torch.testing.assert_close(gradient(lambda y: y.add_(10.0)), expected)
