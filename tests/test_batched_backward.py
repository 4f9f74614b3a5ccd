"""Backward of a batch of gradients: is_grads_batched, vectorised Jacobians, vmap over grad."""

import pytest
import torch
from op_cases import CASES, serving
from torch.utils.flop_counter import FlopCounterMode

from llmkern.errors import BackendError

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")


def _vectors(outputs):
    generator = torch.Generator().manual_seed(7)
    return [torch.randn((3, *y.shape), generator=generator) for y in outputs]


def _one_by_one(outputs, tensors, vectors, **options):
    found = [torch.autograd.grad(outputs, tensors, [v[i] for v in vectors], retain_graph=True,
                                 **options) for i in range(3)]  # fmt: skip
    return [torch.stack(gradients) for gradients in zip(*found, strict=True)]


def _is_grads_batched(outputs, tensors, vectors, **options):
    return torch.autograd.grad(outputs, tensors, vectors, retain_graph=True, is_grads_batched=True,
                               **options)  # fmt: skip


def _vmap_over_grad(outputs, tensors, vectors, **options):
    def gradients(*vector):
        return torch.autograd.grad(outputs, tensors, vector, retain_graph=True, **options)

    return torch.func.vmap(gradients)(*vectors)


@pytest.mark.parametrize("batched", [_is_grads_batched, _vmap_over_grad])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("name", CASES)
def test_a_batch_of_gradients_is_each_of_them(name, backend, batched):
    with serving(backend):
        tensors = CASES[name].tensors()
        outputs = CASES[name].outputs(tensors)
        vectors = _vectors(outputs)
        expected = _one_by_one(outputs, tensors, vectors)
        got = batched(outputs, tensors, vectors)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_second_derivatives_of_a_batch_of_gradients(name):
    tensors = [t.detach().double().requires_grad_() for t in CASES[name].tensors()]
    outputs = CASES[name].outputs(tensors)
    vectors = [v.double() for v in _vectors(outputs)]
    results = []
    for gradients in (_one_by_one, _is_grads_batched):
        found = gradients(outputs, tensors, vectors, create_graph=True)
        squares = [g.square().sum() for g in found if g.requires_grad]
        options = {"retain_graph": True, "allow_unused": True}
        results.append(torch.autograd.grad(sum(squares), tensors, **options) if squares else ())
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("name", CASES)
def test_vectorised_jacobian_is_the_jacobian(name):
    case = CASES[name]
    tensors = tuple(t.detach()[:1, :2] if t.dim() > 2 else t.detach() for t in case.tensors())
    if name in ("layer_norm large", "layer_norm two dims", "attention dropout bias"):
        tensors = tuple(t.detach() for t in case.tensors())

    def first(*given):
        return case.outputs(list(given))[0].flatten()[:6]

    plain = torch.autograd.functional.jacobian(first, tensors)
    vectorised = torch.autograd.functional.jacobian(first, tensors, vectorize=True)
    torch.testing.assert_close(vectorised, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in CASES if name != "dropout"])
def test_second_derivatives_under_a_dispatch_mode_are_right_or_refused(name):
    """torch.ops.llmkern.*, which a mode sees, have first derivatives: an error, no zeros."""
    tensors = [t.detach().double().requires_grad_() for t in CASES[name].tensors()]
    with FlopCounterMode(display=False):
        outputs = CASES[name].outputs(tensors)
    loss = sum(y.square().sum() for y in outputs)
    gradients = torch.autograd.grad(loss, tensors, create_graph=True)
    with pytest.raises(BackendError, match="second derivatives need plain eager mode"):
        torch.autograd.grad(sum(g.square().sum() for g in gradients), tensors)
