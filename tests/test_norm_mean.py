"""Layer norm of rows of equal elements: the mean is exact, so y is the bias and the weight's
gradient 0, on every backend. A plain sum of equal elements is rounded, which 1 / sqrt(eps) = 316
scales."""

import pytest
import torch
from rule import check_rule
from torch.nn import functional

from llmkern import numerics
from llmkern.functional import add_layer_norm, layer_norm

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# (rows, cols): a thread, part of a warp, primes, model widths of one and more warps, padded, long.
# 40 x 768 has saved statistics on a CPU, where fewer elements have theirs computed again.
SHAPES = [(5, 1), (5, 3), (9, 8), (6, 31), (40, 768), (5, 769), (5, 1000), (5, 2304), (5, 4096),
          (5, 5000), (5, 17003)]  # fmt: skip
LIGHT = {"shape": [(5, 1), (5, 3), (5, 769), (5, 2304), (5, 17003)],
         "dtype": [torch.float32, torch.bfloat16]}  # fmt: skip


def _equal(shape, dtype):
    """A large, a middling, a tiny, the largest value and its negative, a row each, over again."""
    values = [123456.7, 1000.1, 1e-30, torch.finfo(dtype).max, -torch.finfo(dtype).max]
    if dtype == torch.float16:
        values[0] = 12345.6
    rows = torch.tensor(values, dtype=torch.float64).to(dtype).repeat(-(-shape[0] // len(values)))
    return rows[: shape[0], None].expand(shape).contiguous()


def _affine(cols, dtype):
    return [torch.randn(cols).to(dtype).requires_grad_() for _ in range(2)]


def _check(y, z, weight, bias, dy):
    """z: what was normalised, a leaf or a sum that takes part in nothing else."""
    assert torch.equal(y, bias.detach().expand_as(y))
    dz, dweight, dbias = torch.autograd.grad(y, (z, weight, bias), dy)
    assert torch.equal(dweight, torch.zeros_like(weight))
    g = dy.double() * weight.detach().double()
    exact = (g - g.mean(-1, keepdim=True)) / 1e-5**0.5
    assert numerics.error(dz, exact) <= numerics.allowed(0.0, dz.dtype)
    if y.shape[-1] == 1:
        assert not dz.any()
    assert numerics.error(dbias, dy.double().sum(0)) <= numerics.allowed(0.0, dbias.dtype)


@pytest.mark.light(**LIGHT)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_layer_norm_of_equal_elements_is_the_bias(backend, shape, dtype):
    x = _equal(shape, dtype).requires_grad_()
    weight, bias = _affine(shape[1], dtype)
    y = layer_norm(x, shape[1], weight, bias)
    _check(y, x, weight, bias, torch.randn(shape).to(dtype))
    assert not layer_norm(x, shape[1]).any()


@pytest.mark.light(**LIGHT, p=[0.3])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_add_layer_norm_of_equal_elements_is_the_bias(backend, shape, dtype, p):
    residual = _equal(shape, dtype)
    x = torch.zeros_like(residual) if p else residual / 4
    residual = (residual if p else residual / 2).requires_grad_()
    weight, bias = _affine(shape[1], dtype)
    y = add_layer_norm(x, residual, shape[1], weight, bias, dropout_p=p)
    _check(y, residual, weight, bias, torch.randn(shape).to(dtype))


@pytest.mark.light(cols=[3, 1000], half=[torch.bfloat16])
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cols", [3, 768, 1000, 17003])
def test_equal_elements_of_a_half_input_beside_a_float_stream(backend, cols, half):
    x = torch.full((4, cols), 1000.1, dtype=half)
    residual = torch.full((4, cols), 123456.7, requires_grad=True)
    weight, bias = _affine(cols, torch.float32)
    y = add_layer_norm(x, residual, cols, weight, bias)
    _check(y, residual, weight, bias, torch.randn(4, cols))


@pytest.mark.light(dtype=[torch.float32])
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_element_passes_on_the_gradient_of_the_stream_alone(backend, dtype):
    x, residual = (torch.randn(64, 1).to(dtype).requires_grad_() for _ in range(2))
    weight, bias = _affine(1, dtype)
    y, z = add_layer_norm(x, residual, 1, weight, bias, prenorm=True)
    dy, dz = torch.randn(2, 64, 1).to(dtype)
    assert torch.equal(y, bias.detach().expand_as(y))
    for gradient in torch.autograd.grad((y, z), (x, residual), (dy, dz)):
        assert torch.equal(gradient, dz)


@pytest.mark.light(cols=[3, 40, 768])
@pytest.mark.parametrize("cols", [3, 40, 768, 1000, 2304])
def test_a_row_beside_rows_of_equal_elements_keeps_its_bits(backend, cols):
    x, weight, bias = torch.randn(9, cols), *_affine(cols, torch.float32)
    mixed = x.clone()
    mixed[::2] = 123456.7
    y, other = layer_norm(x, cols, weight, bias), layer_norm(mixed, cols, weight, bias)
    assert torch.equal(other[1::2], y[1::2])
    assert torch.equal(other[::2], bias.detach().expand(5, cols))


@pytest.mark.light(offset=[1e4], cols=[100, 768])
@pytest.mark.parametrize("offset", [30.0, 1e3, 1e4, 3e5])
@pytest.mark.parametrize("cols", [3, 100, 768, 1031, 2048, 17003])
def test_nearly_equal_elements_match_fp64(backend, cols, offset):
    x = offset + torch.randn(5, cols)
    exact = functional.layer_norm(x.double(), (cols,))
    y = layer_norm(x, cols)
    check_rule("y", y, functional.layer_norm(x, (cols,)), exact)


def test_rows_of_zeros_infinities_and_nans(backend):
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([[0.0] * 4, [inf, 1, 2, 3], [1, -inf, 2, 3], [inf] * 4, [5, 5, nan, 5]])
    y = layer_norm(x, 4)
    assert torch.equal(y[0], torch.zeros(4))
    assert y[1:].isnan().all()


def test_differences_beyond_the_largest_value_do_not_spoil_the_mean(backend):
    """Their variance overflows, so y is 0 where an element's own difference does not."""
    x = torch.tensor([[3e38, -3e38, 0, 0], [3e38, 1, 1, 1], [1, 3e38, 1, 1]])
    assert not layer_norm(x, 4).any()


@pytest.mark.light(cols=[4096, 17003])
@pytest.mark.parametrize("place", [0, 1, -1])
@pytest.mark.parametrize("cols", [65, 768, 4096, 16384, 17003])
def test_one_element_far_from_the_others_costs_no_accuracy(backend, cols, place):
    x, weight = torch.randn(16, cols), torch.ones(cols)
    x[:, place] *= 1e3
    weight[place] = 0.01  # or its size would hide the errors of the others
    theirs = functional.layer_norm(x, (cols,), weight)
    exact = functional.layer_norm(x.double(), (cols,), weight.double())
    check_rule("y", layer_norm(x, (cols,), weight), theirs, exact)
