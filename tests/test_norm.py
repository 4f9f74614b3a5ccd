"""LayerNorm and RMSNorm, plain and with dropout + residual, on every backend."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rule import check_rule, check_same, gradients, leaves
from torch.nn import functional

from llmkern import random, use_backend
from llmkern.functional import add_layer_norm, add_rms_norm, layer_norm, rms_norm

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
HALVES = [torch.bfloat16, torch.float16]
# (rows, cols): around the vector widths, the row blocks, the dropout chunk; a prime, a model's.
SHAPES = [(1, 1), (3, 3), (4, 7), (5, 8), (7, 9), (2, 15), (9, 16), (6, 17), (8, 64), (33, 127),
          (3, 1023), (2, 1025), (131, 768)]  # fmt: skip
LIGHT = {"shape": [(1, 1), (5, 8), (9, 16), (2, 1025)], "dtype": [torch.float32, torch.bfloat16]}


def _torch_norm(kind, x, shape, weight, bias, eps=1e-5):
    if kind == "layer":
        return functional.layer_norm(x, shape, weight, bias, eps)
    return functional.rms_norm(x, shape, weight, eps)


def _norm(kind, x, shape, weight, bias, eps=1e-5, **keywords):
    if kind == "layer":
        return layer_norm(x, shape, weight, bias, eps, **keywords)
    return rms_norm(x, shape, weight, eps, **keywords)


def _add_norm(kind, x, residual, shape, weight, bias, eps=1e-5, **keywords):
    if kind == "layer":
        return add_layer_norm(x, residual, shape, weight, bias, eps, **keywords)
    return add_rms_norm(x, residual, shape, weight, eps, **keywords)


def _inputs(rows, cols, dtype=torch.float32, count=1):
    rows_ = [torch.randn(rows, cols).to(dtype) for _ in range(count)]
    return [*rows_, (1 + torch.randn(cols) / 4).to(dtype), torch.randn(cols).to(dtype)]


def _eps(shape):
    """A row of one element has dx = 0, as a difference of terms that 1 / sqrt(eps) scales up."""
    return 1e-5 if torch.Size(shape).numel() > 1 else 0.1


def _check(kind, run, run_torch, tensors):
    """Outputs and gradients by the rule; run(kind, *tensors) gives a tensor or a tuple of them."""
    ours, theirs, exact = leaves(tensors), leaves(tensors), leaves(tensors, torch.float64)
    used = slice(None) if kind == "layer" else slice(0, -1)  # RMSNorm has no bias
    results = []
    for function, inputs in ((run, ours), (run_torch, theirs), (run_torch, exact)):
        outputs = function(kind, *inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        results.append([*outputs, *gradients(outputs, inputs[used])])
    for index, (a, b, c) in enumerate(zip(*results, strict=True)):
        check_rule(f"{kind} {index}", a, b, c)


@pytest.mark.light(**LIGHT)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_norm_matches_fp64(backend, kind, shape, dtype):
    cols = (shape[1],)
    _check(
        kind,
        lambda k, x, w, b: _norm(k, x, cols, w, b, _eps(cols)),
        lambda k, x, w, b: _torch_norm(k, x, cols, w, b, _eps(cols)),
        _inputs(*shape, dtype),
    )


@pytest.mark.light(shape=LIGHT["shape"][:3], dtype=LIGHT["dtype"], prenorm=[True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("prenorm", [False, True])
def test_add_norm_matches_fp64(backend, kind, shape, dtype, prenorm):
    cols = (shape[1],)

    def theirs(k, x, residual, w, b):
        z = x + residual
        y = _torch_norm(k, z, cols, w, b, _eps(cols))
        return (y, z) if prenorm else y

    _check(
        kind,
        lambda k, x, r, w, b: _add_norm(k, x, r, cols, w, b, _eps(cols), prenorm=prenorm),
        theirs,
        _inputs(*shape, dtype, count=2),
    )


@pytest.mark.light(shape=[(3, 7), (5, 64)], dtype=LIGHT["dtype"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 7), (5, 64), (6, 1030)])
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_add_norm_with_dropout_matches_fp64(backend, kind, shape, dtype):
    cols, p = (shape[1],), 0.3
    state = torch.get_rng_state()
    seed = random.draw_seed(torch.device("cpu"))
    factor = random.flat_keep_mask(seed, shape, p).double() * random.scale(p)

    def ours(k, x, r, w, b):
        torch.set_rng_state(state)
        return _add_norm(k, x, r, cols, w, b, dropout_p=p, prenorm=True)

    def theirs(k, x, r, w, b):
        z = x * factor.to(x.dtype) + r
        return _torch_norm(k, z, cols, w, b), z

    _check(kind, ours, theirs, _inputs(*shape, dtype, count=2))


def test_add_norm_drops_nan_and_inf_and_ignores_p_in_eval(backend):
    x = torch.full((4, 100), float("nan"))
    residual, ones = torch.randn(4, 100), torch.ones(100)
    y, z = add_layer_norm(x, residual, 100, ones, dropout_p=1.0, prenorm=True)
    assert torch.equal(z, residual)
    assert torch.allclose(y, functional.layer_norm(residual, (100,), ones), atol=1e-6)
    y, z = add_rms_norm(x, residual, 100, dropout_p=0.5, prenorm=True)
    dropped = torch.isfinite(z)
    assert 100 < int(dropped.sum()) < 300
    assert torch.equal(z[dropped], residual[dropped])
    plain = add_layer_norm(residual, residual, 100, dropout_p=0.5, training=False)
    check_same(backend, plain, add_layer_norm(residual, residual, 100))


@pytest.mark.light(p=[0.25], kind=["layer"])
@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("half_first", [True, False])
def test_add_norm_mixes_a_half_input_and_a_float_stream(backend, kind, half, p, half_first):
    """z and y are float32; each gradient has the dtype of its input."""
    shape, cols = (6, 70), (70,)
    x, residual, weight, bias = _inputs(*shape, count=2)
    x, residual = (x.to(half), residual) if half_first else (x, residual.to(half))
    state = torch.get_rng_state()
    seed = random.draw_seed(x.device)
    factor = random.flat_keep_mask(seed, shape, p).double() * random.scale(p)
    inputs = leaves((x, residual, weight, bias))
    torch.set_rng_state(state)
    outputs = _add_norm(kind, *inputs[:2], cols, *inputs[2:], dropout_p=p, prenorm=True)
    plain = leaves((x, residual, weight, bias))
    z = plain[0].float() * factor.float() + plain[1].float()
    expected = (_torch_norm(kind, z, cols, *plain[2:]), z)
    used = slice(None) if kind == "layer" else slice(0, -1)
    for got, want in zip(outputs, expected, strict=True):
        assert got.dtype == torch.float32
        assert torch.allclose(got, want, atol=1e-5)
    for leaf, got, want in zip(
        inputs, gradients(outputs, inputs[used]), gradients(expected, plain[used]), strict=False
    ):
        assert got.dtype == leaf.dtype
        assert torch.allclose(got, want, atol=1e-4 if leaf.dtype == torch.float32 else 3e-2)


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_norm_takes_float_weights_with_a_half_input(backend, kind, half):
    x, weight, bias = _inputs(9, 40)
    inputs = leaves((x.to(half), weight, bias))
    y = _norm(kind, inputs[0], 40, *inputs[1:])
    assert y.dtype == half
    exact = leaves((x.to(half), weight, bias), torch.float64)
    y_exact = _torch_norm(kind, exact[0], (40,), *exact[1:])
    used = slice(None) if kind == "layer" else slice(0, -1)
    for got, leaf, want in zip(
        (y, *gradients((y,), inputs[used])),
        (inputs[0], *inputs),
        (y_exact, *gradients((y_exact,), exact[used])),
        strict=False,
    ):
        assert got.dtype == leaf.dtype
        assert float((got - want).detach().abs().max()) <= 1e-2 * (
            1 + float(want.detach().abs().max())
        )


def _layouts(rows=6, cols=70):
    return {
        "transposed": torch.randn(cols, rows).t(),
        "sliced": torch.randn(rows, cols + 9)[:, 3 : cols + 3],
        "strided": torch.randn(rows, 2 * cols)[:, ::2],
        "expanded rows": torch.randn(1, cols).expand(rows, cols),
        "expanded cols": torch.randn(rows, 1).expand(rows, cols),
        "offset": torch.randn(rows * cols + 1)[1:].view(rows, cols),
        "size-1 strides": torch.randn(cols).as_strided((1, cols), (1, 1)),
        "permuted": torch.randn(3, 2, 5, 70).permute(1, 2, 0, 3),
    }


@pytest.mark.light(layout=["transposed", "strided", "size-1 strides"], dy_layout=["like input"])
@pytest.mark.parametrize("layout", _layouts())
@pytest.mark.parametrize("dy_layout", ["contiguous", "like input", "expanded"])
def test_norm_takes_any_layout(backend, layout, dy_layout):
    x = _layouts()[layout].requires_grad_()
    weight, bias = (torch.randn(140)[::2].requires_grad_() for _ in range(2))
    dy = {
        "contiguous": torch.randn(x.shape),
        "like input": _layouts()[layout],
        "expanded": torch.randn(()).expand(x.shape),
    }[dy_layout]
    inputs = (x, weight, bias)
    plain = leaves(t.contiguous() for t in inputs)
    for run in (
        lambda x, w, b: layer_norm(x, 70, w, b),
        lambda x, w, b: add_layer_norm(x, x, 70, w, b),
    ):
        y, expected = run(*inputs), run(*plain)
        got = (y, *torch.autograd.grad(y, inputs, dy))
        want = (expected, *torch.autograd.grad(expected, plain, dy.contiguous()))
        # torch's own sums depend on the layout; the kernels' do not, but for Triton's, which
        # compiles anew for strides that are multiples of 16. Rows of equal elements have rstd =
        # 316, which scales the difference.
        tolerance = {"reference": 2e-2, "triton": 1e-5}.get(backend, 0.0)
        for a, b in zip(got, want, strict=True):
            assert torch.allclose(a, b, tolerance, tolerance)


@pytest.mark.light(shape=[(4, 2, 3)])
@pytest.mark.parametrize("shape", [(4, 2, 3), (2, 5, 1, 6)])
@pytest.mark.parametrize("affine", ["both", "weight", "bias", "none"])
def test_layer_norm_over_several_dims(backend, shape, affine):
    dims = shape[-2:]
    x = torch.randn(shape).requires_grad_()
    weight = torch.randn(dims).requires_grad_() if affine in ("both", "weight") else None
    bias = torch.randn(dims).requires_grad_() if affine in ("both", "bias") else None
    inputs = [t for t in (x, weight, bias) if t is not None]
    y, expected = (f(x, dims, weight, bias) for f in (layer_norm, functional.layer_norm))
    assert torch.allclose(y, expected, atol=1e-5)
    for a, b in zip(gradients((y,), inputs), gradients((expected,), inputs), strict=True):
        assert torch.allclose(a, b, atol=1e-4)


@pytest.mark.parametrize("shape", [(0, 8), (4, 0), (0, 0), (2, 0, 8)])
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_norm_of_nothing(backend, kind, shape):
    x = torch.randn(shape).requires_grad_()
    weight, bias = (torch.randn(shape[-1]).requires_grad_() for _ in range(2))
    y = _norm(kind, x, shape[-1:], weight, bias)
    assert y.shape == shape
    dx, dweight = torch.autograd.grad(y.sum(), (x, weight))
    assert dx.shape == shape
    assert torch.equal(dweight, torch.zeros(shape[-1]))


def test_norm_keeps_large_offsets_accurate(backend):
    x = torch.randn(4, 256) + 1e4
    exact = functional.layer_norm(x.double(), (256,))
    check_rule("offset", layer_norm(x, 256), functional.layer_norm(x, (256,)), exact)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_default_eps_is_torchs(backend, dtype):
    x = (torch.randn(3, 16) * 1e-4).to(dtype)
    ours, theirs = rms_norm(x, 16), functional.rms_norm(x, (16,))
    check_rule(str(dtype), ours, theirs, functional.rms_norm(x.double(), (16,), eps=None)
               if dtype == torch.float64 else theirs)  # fmt: skip


def test_unit_offset_adds_one_to_the_weight(backend):
    x, weight, bias = _inputs(5, 33)
    inputs, shifted = leaves((x, weight, bias)), leaves((x, weight + 1, bias))
    y = layer_norm(inputs[0], 33, *inputs[1:], unit_offset=True)
    expected = layer_norm(shifted[0], 33, *shifted[1:])
    assert torch.allclose(y, expected, atol=1e-6)
    for a, b in zip(gradients((y,), inputs), gradients((expected,), shifted), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (1, 2), (0, 2)])
def test_norm_gives_only_the_gradients_that_are_wanted(backend, wanted):
    tensors = _inputs(6, 40)
    for index in wanted:
        tensors[index].requires_grad_()
    y = layer_norm(tensors[0], 40, *tensors[1:])
    expected = functional.layer_norm(tensors[0], (40,), *tensors[1:])
    inputs = [tensors[index] for index in wanted]
    for a, b in zip(gradients((y,), inputs), gradients((expected,), inputs), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_prenorm_gradient_through_one_output_only(backend):
    x, residual, weight, bias = leaves(_inputs(6, 40, count=2))
    y, z = add_layer_norm(x, residual, 40, weight, bias, prenorm=True)
    dx, dresidual = torch.autograd.grad(z.sum(), (x, residual), retain_graph=True)
    assert torch.equal(dx, torch.ones(6, 40)) and torch.equal(dresidual, dx)
    expected = functional.layer_norm(x + residual, (40,), weight, bias)
    for a, b in zip(gradients((y,), (x, weight)), gradients((expected,), (x, weight)), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.computes_in(torch.float64)
@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("add", [False, True])
def test_norm_gradients_by_differences(backend, kind, add):
    x, residual, weight, bias = leaves(_inputs(3, 5, torch.float64, count=2))

    def run(x, residual, weight, bias):
        if not add:
            return _norm(kind, x, 5, weight, bias)
        torch.manual_seed(2)  # the same mask at every evaluation
        return _add_norm(kind, x, residual, 5, weight, bias, dropout_p=0.4, prenorm=True)

    inputs = (x, residual if add else None, weight, bias if kind == "layer" else None)
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs, atol=1e-4)


@pytest.mark.computes_in(torch.float64)
def test_second_derivative_does_not_follow_a_weight_back_to_the_input(backend):
    """weight is computed from x: its path must not be counted twice."""
    for norm in (layer_norm, functional.layer_norm):
        torch.manual_seed(1)
        x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
        y = norm(x, (6,), x.mean(0))
        (dx,) = torch.autograd.grad(y.pow(2).sum(), x, create_graph=True)
        (ddx,) = torch.autograd.grad(dx.pow(2).sum(), x)
        if norm is layer_norm:
            ours = ddx
    assert torch.allclose(ours, ddx)


@pytest.mark.without("reference", "torch's own ops promise no bits over thread counts")
@pytest.mark.without("triton", "its programs do not share threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(257, 768), (40, 1031)])
def test_norm_is_the_same_for_any_thread_count(backend, dtype, shape):
    tensors, threads, results = _inputs(*shape, dtype, count=2), torch.get_num_threads(), []
    for count in (1, 2):
        torch.set_num_threads(count)
        torch.manual_seed(4)
        inputs = leaves(tensors)
        y = add_layer_norm(*inputs[:2], shape[1], *inputs[2:], dropout_p=0.1)
        results.append([y, *gradients((y,), inputs)])
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_norm_of_a_row_does_not_depend_on_the_others(backend):
    x, weight, bias = _inputs(11, 100)
    dy = torch.randn(11, 100)

    def run(rows):
        part = x[rows].clone().requires_grad_()
        y = layer_norm(part, 100, weight, bias)
        return y, torch.autograd.grad(y, part, dy[rows])[0]

    y, dx = run(slice(None))
    poisoned = x.clone()
    for rows in (slice(3, 4), slice(2, 9), slice(7, 11)):
        for whole, part in zip((y, dx), run(rows), strict=True):
            check_same(backend, part, whole[rows])
    poisoned[5] = float("nan")
    other = layer_norm(poisoned, 100, weight, bias)
    for rows in (slice(0, 5), slice(6, None)):
        check_same(backend, other[rows], y[rows])
    assert other[5].isnan().all()


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(1, 20), min_size=1, max_size=4),
    dims=st.integers(1, 2),
    kind=st.sampled_from(["layer", "rms"]),
    dtype=st.sampled_from(DTYPES),
)
def test_norm_of_any_shape_matches_fp64(shape, dims, kind, dtype):
    tail = shape[-dims:]
    torch.manual_seed(0)  # an example is its arguments alone
    tensors = [torch.randn(size).to(dtype) for size in (shape, tail, tail)]
    with use_backend("cpu"):
        _check(
            kind,
            lambda k, x, w, b: _norm(k, x, tail, w, b, _eps(tail)),
            lambda k, x, w, b: _torch_norm(k, x, tail, w, b, _eps(tail)),
            tensors,
        )


@pytest.mark.light(x_dtype=[torch.bfloat16], p=[0.2], kind=["layer"])
@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.0, 0.2])
def test_norm_op_check(backend, kind, x_dtype, p):
    x, residual, weight, bias = leaves(_inputs(4, 20, count=2))
    x = x.detach().to(x_dtype).requires_grad_()
    seed = torch.tensor([5]) if p else None
    options = (20, 1e-5, kind == "rms", False, p, True, backend)
    bias = bias if kind == "layer" else None
    torch.library.opcheck(torch.ops.llmkern.norm, (x, residual, weight, bias, seed, *options))
    if not p:
        plain = (x, None, weight.detach().to(x_dtype), None, None, *options[:5], False, backend)
        torch.library.opcheck(torch.ops.llmkern.norm, plain)


@pytest.mark.light(kind=["layer"])
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_norm_compile(backend, kind):
    def run(x, residual, weight, bias):
        y, z = _add_norm(kind, x, residual, (24,), weight, bias, prenorm=True, backend=backend)
        return _norm(kind, y, [24], weight, bias, backend=backend), z

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=True)
    used = slice(None) if kind == "layer" else slice(0, -1)
    for rows in (3, 5):
        tensors = _inputs(rows, 24, count=2)
        results = []
        for function in (run, compiled):
            inputs = leaves(tensors)
            outputs = function(*inputs)
            results.append([*outputs, *gradients(outputs, inputs[used])])
        for eager, traced in zip(*results, strict=True):
            check_same(backend, traced, eager)


def test_norm_under_torch_func(backend):
    x, weight, bias = _inputs(3, 8, torch.float64)
    for transform in (torch.func.grad, torch.func.hessian):
        got, expected = (
            transform(lambda t, f=f: f(t, (8,), weight, bias).pow(2).sum())(x)
            for f in (layer_norm, functional.layer_norm)
        )
        assert torch.allclose(got, expected)
    mapped = torch.vmap(lambda t: layer_norm(t, (8,), weight, bias))(x)
    assert torch.allclose(mapped, functional.layer_norm(x, (8,), weight, bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_under_cpu_autocast_keeps_its_dtype_as_torchs_does(backend, dtype):
    x, weight, bias = _inputs(4, 16)
    with torch.autocast("cpu", torch.bfloat16):
        for ours, theirs in ((layer_norm, functional.layer_norm), (rms_norm, functional.rms_norm)):
            args = (weight, bias) if ours is layer_norm else (weight,)
            assert ours(x.to(dtype), (16,), *args).dtype == theirs(x.to(dtype), (16,), *args).dtype


def test_rows_of_one_column_pass_no_gradient(backend):
    """y is the bias whatever x is; 1 / sqrt(eps) magnifies what a rounded mean leaves over."""
    x, dy = torch.randn(64, 1, requires_grad=True), torch.randn(64, 1)
    (dx,) = torch.autograd.grad(layer_norm(x, (1,)), x, dy)
    assert not dx.any()
