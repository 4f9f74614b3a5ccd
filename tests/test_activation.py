"""GELU, ReLU and SiLU on every backend, against float64 and torch's own."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rule import check_rule, check_same
from torch.nn import functional

from llmkern import errors, use_backend
from llmkern.functional import gelu, relu, silu

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SIZES = [0, 1, 3, 4, 5, 7, 8, 9, 15, 16, 17, 2047, 2048, 2049, 3 * 768]
ACTIVATIONS = {
    "relu": (relu, functional.relu),
    "gelu": (gelu, functional.gelu),
    "gelu_tanh": (
        lambda x, **keywords: gelu(x, "tanh", **keywords),
        lambda x: functional.gelu(x, approximate="tanh"),
    ),
    "silu": (silu, functional.silu),
}


@pytest.fixture(params=ACTIVATIONS)
def activation(request):
    return ACTIVATIONS[request.param]


def _forward_and_gradient(function, x, dy):
    x = x.detach().clone().requires_grad_()
    y = function(x)
    return y.detach(), torch.autograd.grad(y, x, dy.to(y.dtype))[0]


def _check(activation, x, dy):
    ours, theirs = activation
    results = _forward_and_gradient(ours, x, dy)
    torchs = _forward_and_gradient(theirs, x, dy)
    exacts = _forward_and_gradient(theirs, x.double(), dy)
    for name, got, torch_got, exact in zip("y dx".split(), results, torchs, exacts, strict=True):
        check_rule(name, got, torch_got, exact)


@pytest.mark.light(size=[0, 9, 2048, 2049], dtype=DTYPES[:2])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_activation_matches_fp64(backend, activation, dtype, size):
    _check(activation, (3 * torch.randn(size)).to(dtype), torch.randn(size).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_activation_matches_fp64_over_the_whole_range(backend, activation, dtype):
    x = torch.cat([sign * torch.logspace(-7, 4, 4001) for sign in (1, -1)]).to(dtype)
    _check(activation, x, torch.ones(8002, dtype=dtype))


def test_activation_holds_at_the_ends(backend, activation):
    function, _ = activation
    infinity, largest = float("inf"), torch.finfo(torch.float32).max
    x = torch.tensor([infinity, -infinity, largest, -largest, 0.0, float("nan")])
    y, dx = _forward_and_gradient(function, x, torch.ones(6))
    assert y[:5].tolist() == [infinity, 0.0, largest, 0.0, 0.0]
    assert dx[:4].tolist() == [1.0, 0.0, 1.0, 0.0]
    assert y[5].isnan()


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.randn(70, 6).t(),
        lambda: torch.randn(6, 80)[:, 3:73],
        lambda: torch.randn(6, 140)[:, ::2],
        lambda: torch.randn(1, 70).expand(6, 70),
        lambda: torch.randn(421)[1:].view(6, 70),
        lambda: torch.randn(2, 3, 5, 64).permute(0, 2, 1, 3),
        lambda: torch.randn(70).as_strided((1, 70), (1, 1)),
        lambda: torch.randn(()),
    ],
    ids=["transposed", "sliced", "strided", "expanded", "offset", "permuted", "size-1", "scalar"],
)
@pytest.mark.parametrize("dense_dy", [True, False])
def test_activation_takes_any_layout(backend, activation, make, dense_dy):
    x = make().requires_grad_()
    dy = torch.randn(x.shape) if dense_dy else torch.randn(()).expand(x.shape)
    y = activation[0](x)
    (dx,) = torch.autograd.grad(y, x, dy)
    plain, plain_dx = _forward_and_gradient(activation[0], x.contiguous(), dy.contiguous())
    # torch's own functions differ in the last bit between their vector loop and its tail.
    tolerance = 1e-6 if backend == "reference" else 0.0
    assert torch.allclose(y, plain, tolerance, tolerance)
    assert torch.allclose(dx, plain_dx, tolerance, tolerance)


@pytest.mark.parametrize("name", ["relu", "silu"])
@pytest.mark.parametrize("make", [lambda: torch.randn(300), lambda: torch.randn(6, 80)[:, 3:73]])
def test_activation_inplace_writes_input_and_has_the_same_gradient(backend, name, make):
    function, _ = ACTIVATIONS[name]
    leaf = make().requires_grad_()
    x = leaf.detach().as_strided(leaf.shape, leaf.stride()).clone().requires_grad_()
    y = function(x)
    written = x * 1.0
    result = function(written, inplace=True)
    assert result is written
    check_same(backend, result, y)
    check_same(backend, *(torch.autograd.grad(t.sum(), x)[0] for t in (y, result)))


@pytest.mark.computes_in(torch.float64)
def test_activation_gradients_by_differences(backend, activation):
    x = torch.randn(20, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(activation[0], (x,))
    assert torch.autograd.gradgradcheck(activation[0], (x,))


@pytest.mark.without("reference", "torch's own ops promise no bits over thread counts")
@pytest.mark.without("triton", "its programs do not share threads")
def test_activation_is_the_same_for_any_thread_count(backend, activation):
    x, threads = torch.randn(300_001), torch.get_num_threads()
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        results.append(_forward_and_gradient(activation[0], x, x))
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(0, 30), max_size=4),
    name=st.sampled_from(list(ACTIVATIONS)),
    dtype=st.sampled_from(DTYPES),
)
def test_activation_of_any_shape_matches_fp64(shape, name, dtype):
    torch.manual_seed(0)  # an example is its arguments alone
    with use_backend("cpu"):
        _check(ACTIVATIONS[name], torch.randn(shape).to(dtype), torch.randn(shape).to(dtype))


@pytest.mark.light(name=["gelu"])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_op_check(backend, name):
    x = torch.randn(5, 33, requires_grad=True)
    torch.library.opcheck(torch.ops.llmkern.activation, (x, name, backend))
    torch.library.opcheck(torch.ops.llmkern.activation, (x.detach().t(), name, backend))
    sliced = torch.randn(5, 80)[:, 3:70]
    torch.library.opcheck(torch.ops.llmkern.activation, (sliced, name, backend))


def test_activation_compile(backend, activation):
    def both(x):
        return activation[0](x, backend=backend) * 2

    torch._dynamo.reset()  # each backend and activation compiles `both` anew, more than 8 times
    x, dy = torch.randn(6, 40), torch.randn(6, 40)
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for got, expected in zip(
        _forward_and_gradient(compiled, x, dy), _forward_and_gradient(both, x, dy), strict=True
    ):
        check_same(backend, got, expected)


def test_activation_under_torch_func(backend, activation):
    ours, theirs = activation
    x = torch.randn(9, dtype=torch.float64)
    for transform in (torch.func.grad, torch.func.hessian):
        got, expected = (transform(lambda t, f=f: f(t).sum())(x) for f in (ours, theirs))
        assert torch.allclose(got, expected)
    assert torch.allclose(torch.vmap(ours)(x[:, None]), theirs(x)[:, None])


def test_activation_rejects():
    with pytest.raises(errors.ArgumentError, match="gelu: approximate must be one of 'none', 'ta"):
        gelu(torch.ones(3), approximate="erf")
    with pytest.raises(errors.DtypeError, match="relu: input must be one of .*, got int64"):
        relu(torch.ones(3).long())
    with pytest.raises(errors.DtypeError, match="silu: input must be a Tensor, got list"):
        silu([1.0])
    x = torch.ones(3, requires_grad=True)
    with pytest.raises(errors.ArgumentError, match="silu: input must not be a leaf"):
        silu(x, inplace=True)
    with pytest.raises(errors.ShapeError, match="relu: input must not be expanded"):
        relu(torch.ones(1).expand(3), inplace=True)
    assert torch.equal(x, torch.ones(3))
