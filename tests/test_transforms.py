"""torch.func and forward-mode AD: every function and module gives torch's derivatives."""

import copy

import pytest
import torch
import torch.nn.functional as F
from modules import slow_path
from torch import nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

import llmkern
from llmkern import functional as K

WEIGHT, BIAS = torch.linspace(0.5, 1.5, 8), torch.linspace(-1.0, 1.0, 8)
MATRIX, VECTOR = torch.linspace(-1.0, 1.0, 48).sin().view(6, 8), torch.linspace(0.0, 1.0, 6)


def _gated(x):
    return F.silu(F.linear(x, MATRIX)) * F.linear(x, -MATRIX)


CALLS = {
    "layer_norm": (
        lambda x: K.layer_norm(x, (8,), WEIGHT, BIAS),
        lambda x: F.layer_norm(x, (8,), WEIGHT, BIAS),
    ),
    "rms_norm": (lambda x: K.rms_norm(x, (8,), WEIGHT), lambda x: F.rms_norm(x, (8,), WEIGHT)),
    "add_layer_norm": (
        lambda x: K.add_layer_norm(x, x.sin(), (8,), WEIGHT, BIAS),
        lambda x: F.layer_norm(x + x.sin(), (8,), WEIGHT, BIAS),
    ),
    "attention": (
        lambda x: K.scaled_dot_product_attention(x, x, x, is_causal=True),
        lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True),
    ),
    "linear": (
        lambda x: K.linear(x, MATRIX, VECTOR, activation="gelu"),
        lambda x: F.gelu(F.linear(x, MATRIX, VECTOR)),
    ),
    "linear_residual": (
        lambda x: K.linear(x, MATRIX, VECTOR, residual=x[..., :6]),
        lambda x: F.linear(x, MATRIX, VECTOR) + x[..., :6],
    ),
    "linear_gated": (lambda x: K.linear_gated(x, MATRIX, -MATRIX), _gated),
    "gelu": (K.gelu, F.gelu),
    "silu": (K.silu, F.silu),
    "relu": (K.relu, F.relu),
}


def _tangent(function, x, direction):
    with forward_ad.dual_level():
        output = function(forward_ad.make_dual(x, direction))
        return forward_ad.unpack_dual(output).tangent


def _forward_over_reverse(function, x, direction):
    """A Hessian-vector product: the tangent of the gradient."""
    with forward_ad.dual_level():
        leaf = x.clone().requires_grad_()
        dual = forward_ad.make_dual(leaf, direction)
        (gradient,) = torch.autograd.grad(function(dual).square().sum(), dual, create_graph=True)
        return forward_ad.unpack_dual(gradient).tangent.detach()


def _loss(function):
    return lambda x: function(x).square().sum()


TRANSFORMS = {
    "grad": lambda f, x, d: torch.func.grad(_loss(f))(x),
    "vmap": lambda f, x, d: torch.func.vmap(f)(x),
    "per-sample grad": lambda f, x, d: torch.func.vmap(torch.func.grad(_loss(f)))(x),
    "jvp": lambda f, x, d: torch.func.jvp(f, (x,), (d,))[1],
    "jacrev": lambda f, x, d: torch.func.jacrev(f)(x),
    "jacfwd": lambda f, x, d: torch.func.jacfwd(f)(x),
    "hessian": lambda f, x, d: torch.func.hessian(_loss(f))(x),
    "forward mode": _tangent,
    "forward over reverse": _forward_over_reverse,
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", CALLS)
def test_derivatives_are_torchs(name, transform):
    ours, theirs = CALLS[name]
    x, direction = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    found = TRANSFORMS[transform](ours, x, direction)
    with sdpa_kernel(SDPBackend.MATH):  # torch's flash attention has no tangents
        expected = TRANSFORMS[transform](theirs, x, direction)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("transform", ["grad", "per-sample grad", "jacfwd", "forward mode"])
def test_derivatives_of_an_accelerated_model_are_torchs(transform):
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=True)
    theirs = nn.Sequential(layer, nn.Linear(8, 8), nn.RMSNorm(8), nn.GELU()).eval()
    theirs.requires_grad_(False)
    ours = copy.deepcopy(theirs)
    llmkern.accelerate(ours)
    x, direction = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    with slow_path(), sdpa_kernel(SDPBackend.MATH):  # torch's flash attention has no tangents
        results = [TRANSFORMS[transform](f, x, direction) for f in (ours, theirs)]
    torch.testing.assert_close(*results, atol=1e-4, rtol=1e-4)


def test_gradients_of_parameters_through_functional_call():
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 1))
    llmkern.accelerate(model)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    x = torch.randn(5, 8)

    def loss(parameters, x):
        return torch.func.functional_call(model, parameters, (x,)).square().sum()

    model(x).square().sum().backward()
    found = torch.func.grad(loss)(parameters, x)
    samples = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x[:, None])
    for name, p in model.named_parameters():
        torch.testing.assert_close(found[name], p.grad, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(samples[name].sum(0), p.grad, atol=1e-5, rtol=1e-4)


def _of_samples(transform):
    return lambda f: lambda x: torch.func.vmap(transform(f))(torch.stack([x, x.cos()]))


COMPILED = {
    "grad": torch.func.grad,
    "jvp": lambda f: lambda x: torch.func.jvp(f, (x,), (x.cos(),))[1],
    "hessian": torch.func.hessian,
    "vmap of grad": _of_samples(torch.func.grad),
    "grad of vmap": lambda f: torch.func.grad(lambda x: _of_samples(lambda f: f)(f)(x).sum()),
}


@pytest.mark.parametrize("transform", COMPILED)
@pytest.mark.parametrize("name", ["layer_norm", "attention", "linear_residual", "gelu"])
def test_compiled_transforms(name, transform):
    ours, theirs = (lambda x, f=f: f(x).square().sum() for f in CALLS[name])
    x = torch.randn(1, 1, 3, 8)
    torch._dynamo.reset()
    found = torch.compile(COMPILED[transform](ours), fullgraph=True, backend="eager")(x)
    with sdpa_kernel(SDPBackend.MATH):
        expected = COMPILED[transform](theirs)(x)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_dropout_has_a_tangent():
    x, direction = torch.randn(64), torch.randn(64)
    torch.manual_seed(1)
    y = K.dropout(x, 0.5)
    torch.manual_seed(1)
    tangent = _tangent(lambda x: K.dropout(x, 0.5), x, direction)
    torch.testing.assert_close(tangent, torch.where(y == 0, 0.0, 2 * direction))
