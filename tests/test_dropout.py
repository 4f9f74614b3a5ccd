"""Dropout: the mask contract on every backend, gradients, layouts, errors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmkern import errors, random, use_backend
from llmkern.functional import dropout

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SIZES = [1, 7, 8, 9, 63, 64, 65, 127, 128, 129, 2047, 2048, 2049, 16411]


def _expected(x, seed_state, p):
    """What the contract says, from the generator state before the call."""
    torch.set_rng_state(seed_state)
    seed = random.draw_seed(x.device)
    keep = random.flat_keep_mask(seed, tuple(x.shape), p)
    wide = x.double() if x.dtype == torch.float64 else x.float()
    return torch.where(keep, wide * random.scale(p), 0.0).to(x.dtype)


def _layouts(rows=6, cols=70):
    base = torch.randn(rows, cols)
    return {
        "contiguous": base,
        "transposed": torch.randn(cols, rows).t(),
        "sliced": torch.randn(rows, cols + 9)[:, 3 : cols + 3],
        "strided": torch.randn(rows, 2 * cols)[:, ::2],
        "expanded": torch.randn(1, cols).expand(rows, cols),
        "offset": torch.randn(rows * cols + 1)[1:].view(rows, cols),
        "size-1 strides": torch.randn(cols).as_strided((1, cols), (1, 1)),
        "permuted": torch.randn(3, 5, 2, 64).permute(2, 0, 1, 3),
        "scalar": torch.randn(()),
    }


@pytest.mark.light(size=[1, 7, 65, 2049])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_dropout_follows_the_contract(backend, dtype, size):
    x = torch.randn(size).to(dtype)
    state = torch.get_rng_state()
    assert torch.equal(dropout(x, 0.3), _expected(x, state, 0.3))


@pytest.mark.parametrize("layout", _layouts())
@pytest.mark.parametrize("inplace", [False, True])
def test_dropout_takes_any_layout(backend, layout, inplace):
    x = _layouts()[layout]
    state = torch.get_rng_state()
    expected = _expected(x, state, 0.4)
    torch.set_rng_state(state)
    if inplace and layout == "expanded":
        with pytest.raises(errors.ShapeError, match="must not be expanded"):
            dropout(x, 0.4, inplace=True)
        return
    y = dropout(x, 0.4, inplace=inplace)
    assert torch.equal(y, expected)
    assert (y is x) == inplace


@pytest.mark.light(p=[])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_keeps_the_right_share_and_the_mean(backend, p):
    y = dropout(torch.ones(400_000), p)
    kept = float((y != 0).float().mean())
    assert abs(kept - (1 - p)) < 4 * (p * (1 - p) / y.numel()) ** 0.5 + 2**-17
    assert abs(float(y.mean()) - 1.0) < 4 * (p / (1 - p) / y.numel()) ** 0.5 + 2**-16


def test_dropout_at_the_ends_of_p(backend):
    x = torch.tensor([1.0, float("nan"), float("inf"), -2.0])
    assert dropout(x, 0.0) is x
    assert dropout(x, 0.7, training=False) is x
    assert torch.equal(dropout(x, 1.0), torch.zeros(4))
    empty = torch.randn(0, 3)
    assert dropout(empty, 0.5) is empty


def test_dropped_nan_and_inf_become_zero(backend):
    for special in (float("nan"), float("inf"), -float("inf")):
        y = dropout(torch.full((1000,), special), 0.5)
        dropped = y == 0
        assert 300 < int(dropped.sum()) < 700
        assert not torch.isfinite(y[~dropped]).any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout_backward_uses_the_mask_of_forward(backend, dtype):
    x = torch.ones(3, 1001, dtype=dtype, requires_grad=True)
    dy = torch.randn(3, 1001).to(dtype)
    y = dropout(x, 0.3)
    (dx,) = torch.autograd.grad(y, x, dy)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    expected = torch.where(y != 0, dy.to(wide) * random.scale(0.3), 0.0).to(dtype)
    assert torch.equal(dx, expected)


def test_dropout_inplace_has_the_gradient_of_dropout(backend):
    leaf = torch.randn(50, requires_grad=True)
    x = leaf * 1.0
    y = dropout(x, 0.5, inplace=True)
    assert y is x
    (dx,) = torch.autograd.grad(y.sum(), leaf)
    assert torch.equal(dx, (y != 0) * 2.0)


@pytest.mark.computes_in(torch.float64)
def test_dropout_has_a_second_derivative(backend):
    x = torch.randn(40, dtype=torch.float64, requires_grad=True)
    y = dropout(x, 0.5)
    (dx,) = torch.autograd.grad((y**3).sum(), x, create_graph=True)
    (ddx,) = torch.autograd.grad(dx.sum(), x)
    assert torch.allclose(ddx, 6 * y.detach() * torch.where(y == 0, 0.0, 4.0))


@pytest.mark.without("triton", "its programs do not share threads")
def test_dropout_is_the_same_for_any_thread_count(backend):
    x = torch.randn(300_001)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    results = []
    for count in (1, 2):
        torch.set_num_threads(count)
        torch.set_rng_state(state)
        results.append(dropout(x, 0.2))
    torch.set_num_threads(threads)
    assert torch.equal(*results)


@pytest.mark.usefixtures("emulated_triton")
def test_dropout_is_the_same_on_all_backends():
    x = torch.randn(1000)
    results = []
    for name in ("reference", "cpu", "triton"):
        torch.manual_seed(9)
        with use_backend(name):
            results.append(dropout(x, 0.2))
    assert all(torch.equal(result, results[0]) for result in results)


@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(0, 40), min_size=0, max_size=4),
    p=st.floats(0.001, 1.0),
    dtype=st.sampled_from(DTYPES),
)
def test_dropout_of_any_shape_agrees_with_the_reference(shape, p, dtype):
    torch.manual_seed(0)  # an example is its arguments alone
    x = torch.randn(shape).to(dtype)
    state = torch.get_rng_state()
    with use_backend("cpu"):
        y = dropout(x, p)
    assert torch.equal(y, _expected(x, state, p) if x.numel() else x)


def test_dropout_op_check(backend):
    seed = torch.tensor([3])
    x = torch.randn(5, 33, requires_grad=True)
    torch.library.opcheck(torch.ops.llmkern.dropout, (x, seed, 0.3, backend))
    torch.library.opcheck(torch.ops.llmkern.dropout, (x.detach().t(), seed, 0.3, backend))


def test_dropout_compile(backend):
    def twice(x):
        return dropout(x, 0.5, backend=backend) + dropout(x * 1.0, 0.0, inplace=True)

    x = torch.ones(4, 100, requires_grad=True)
    y = torch.compile(twice, fullgraph=True, backend="aot_eager")(x)
    assert set(y.unique().tolist()) == {1.0, 3.0}
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(dx, y.detach())


def test_dropout_under_torch_func(backend):
    x = torch.randn(64)
    dx = torch.func.grad(lambda t: dropout(t, 0.5).sum())(x)
    assert set(dx.unique().tolist()) == {0.0, 2.0}


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"p": -0.1}, errors.ArgumentError, r"dropout: p must be in \[0, 1\], got -0.1"),
        ({"p": 1.5}, errors.ArgumentError, r"dropout: p must be in \[0, 1\], got 1.5"),
        ({"p": float("nan")}, errors.ArgumentError, r"dropout: p must be in \[0, 1\], got nan"),
        ({"input": 3.0}, errors.DtypeError, "dropout: input must be a Tensor, got float"),
        ({"input": torch.ones(3).long()}, errors.DtypeError, "input must be one of .*, got int64"),
        ({"backend": "tpu"}, errors.BackendError, "backend must be one of"),
    ],
)
def test_dropout_rejects(arguments, error, text):
    with pytest.raises(error, match=text):
        dropout(**{"input": torch.ones(3), **arguments})
    assert issubclass(errors.ArgumentError, ValueError)  # what torch raises for a bad p


def test_dropout_inplace_on_a_leaf_is_rejected_before_it_writes(backend):
    x = torch.ones(30, requires_grad=True)
    with pytest.raises(errors.ArgumentError, match="leaf"):
        dropout(x, 0.5, inplace=True)
    assert torch.equal(x, torch.ones(30))
