"""A norm module's second call takes a short cut past checks and choices: it may show nowhere."""

import pytest
import torch
from torch.nn.utils import parametrize

import llmkern
from llmkern import dispatch, nn
from llmkern.errors import DtypeError

MODULES = {
    "layer_norm": lambda: nn.LayerNorm(16),
    "without bias": lambda: nn.LayerNorm(16, bias=False),
    "without both": lambda: nn.LayerNorm(16, elementwise_affine=False),
    "rms_norm": lambda: nn.RMSNorm(16),
}


@pytest.fixture(params=MODULES)
def called(request):
    """(module, x) of a module that has been called with such an x."""
    module = MODULES[request.param]()
    for p in module.parameters():
        torch.nn.init.normal_(p)
    x = torch.randn(3, 5, 16, requires_grad=True)
    module(x)
    return module, x


def _plain(module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The same call by the reference backend, which no short cut leads to."""
    if isinstance(module, torch.nn.RMSNorm):
        return llmkern.functional.rms_norm(x, (16,), module.weight, module.eps, backend="reference")
    return llmkern.functional.layer_norm(
        x, (16,), module.weight, module.bias, module.eps, backend="reference"
    )


def test_second_call_gives_the_same_values_and_gradients(called):
    module, x = called
    inputs = (x, *module.parameters())
    grad = torch.randn(3, 5, 16)
    for strided in (x, torch.randn(3, 16, 5, requires_grad=True).mT):
        inputs = (strided, *module.parameters())
        found, wanted = module(strided), _plain(module, strided)
        torch.testing.assert_close(found, wanted)
        for a, b in zip(
            torch.autograd.grad(found, inputs, grad),
            torch.autograd.grad(wanted, inputs, grad),
            strict=True,
        ):
            torch.testing.assert_close(a, b)


def test_second_call_records_what_asks_for_a_gradient_now(called):
    module, x = called
    with torch.no_grad():
        assert not module(x).requires_grad
    assert not module.requires_grad_(False)(x.detach()).requires_grad
    assert module(x).requires_grad
    if list(module.parameters()):
        assert module.requires_grad_()(x.detach()).requires_grad


def test_second_call_asks_which_backend_serves_now(called):
    module, x = called
    with llmkern.use_backend("reference"), dispatch.recording() as records:
        module(x)
    assert [decision.backend for _, _, decision in records] == ["reference"]


def test_second_call_sees_a_changed_parameter(called):
    module, x = called
    if module.weight is None:
        pytest.skip("no parameter to change")
    parametrize.register_parametrization(module, "weight", torch.nn.Softplus())
    torch.testing.assert_close(module(x), _plain(module, x))
    parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
    module.weight.data = module.weight.data.repeat_interleave(2)[::2]
    torch.testing.assert_close(module(x), _plain(module, x))
    module.weight.data = module.weight.data.double()
    if isinstance(module, torch.nn.LayerNorm):  # torch's RMSNorm promotes
        with pytest.raises(DtypeError, match="layer_norm: weight"):
            module(x)


def test_second_call_reads_negated_views_negated(called):
    module, _ = called
    x = torch._neg_view(torch.randn(3, 5, 16))
    assert x.is_neg() and x.is_contiguous()
    torch.testing.assert_close(module(x), _plain(module, x.clone()))


def test_second_call_is_seen_by_modes_and_transforms(called):
    module, x = called
    seen = []

    class Mode(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    with Mode():
        module(x)
    assert any("llmkern.norm" in name for name in seen)
    rows = torch.randn(2, 3, 5, 16)
    torch.testing.assert_close(
        torch.func.vmap(module)(rows), torch.stack([module(row) for row in rows])
    )


def test_a_list_for_the_shape_as_torch_takes_it():
    layer, x = nn.LayerNorm(8), torch.randn(3, 8)
    layer.normalized_shape = [8]
    torch.testing.assert_close(layer(x), torch.nn.functional.layer_norm(x, (8,)))
    torch.testing.assert_close(layer(x), torch.nn.functional.layer_norm(x, (8,)))
