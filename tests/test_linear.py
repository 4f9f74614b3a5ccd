"""Linear layers with epilogues: accuracy rule, layouts, dropout contract, errors, compile."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from rule import check_rule, check_same, gradients, leaves

from llmkern import errors, random
from llmkern.functional import linear, linear_gated

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
ACTIVATIONS = [None, "relu", "gelu", "gelu_tanh", "silu"]
# M, N, K around the register tiles (6x16, 14x32), cache blocks, primes, a real layer, few rows.
SIZES = [
    (1, 1, 1),
    (5, 15, 7),
    (6, 16, 8),
    (7, 17, 9),
    (13, 31, 64),
    (14, 32, 65),
    (15, 33, 127),
    (64, 96, 128),
    (97, 101, 103),
    (1, 257, 300),
    (4, 64, 513),
    (130, 48, 770),
]
LIGHT_SIZES = [(1, 1, 1), (15, 33, 127), (97, 101, 103), (1, 257, 300)]
LIGHT_DTYPES = [torch.float32, torch.bfloat16]


def _activate(z, activation):
    if activation is None:
        return z
    if activation == "gelu_tanh":
        return F.gelu(z, approximate="tanh")
    return getattr(F, activation)(z)


def _torch_linear(x, w, b=None, r=None, activation=None):
    y = _activate(F.linear(x, w, b), activation)
    return y if r is None else y + r


def _torch_gated(x, wg, wu, bg, bu, activation):
    return _activate(F.linear(x, wg, bg), activation) * F.linear(x, wu, bu)


def _inputs(m, n, k, dtype, gated=False):
    shapes = [(m, k), (n, k), (n, k), (n,), (n,)] if gated else [(m, k), (n, k), (n,), (m, n)]
    scale = k**-0.5
    base = [torch.randn(s, dtype=torch.float64) * (scale if len(s) == 2 else 1) for s in shapes]
    return [t.to(dtype) for t in base]


def _compare(ours, theirs, tensors, dtype, name):
    mine, torchs, exact = leaves(tensors), leaves(tensors), leaves(tensors, torch.float64)
    results = [f(*t) for f, t in ((ours, mine), (theirs, torchs), (theirs, exact))]
    check_rule(name, *results)
    grads = [gradients([y], t) for y, t in zip(results, (mine, torchs, exact), strict=True)]
    for index, triple in enumerate(zip(*grads, strict=True)):
        check_rule(f"{name}, gradient {index}", *triple)


@pytest.mark.light(size=LIGHT_SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_linear_matches_fp64(backend, dtype, size):
    tensors = _inputs(*size, dtype)
    _compare(
        lambda x, w, b, r: linear(x, w, b, residual=r), _torch_linear, tensors, dtype, "linear"
    )


@pytest.mark.parametrize("k", [2040, 8192])  # a weight gradient's k are the tokens
def test_long_sums_match_fp64(backend, k):
    x, w = torch.randn(12, k), torch.randn(16, k)
    check_rule("y", linear(x, w), F.linear(x, w), F.linear(x.double(), w.double()))


@pytest.mark.light(size=[(33, 70, 40)], dtype=LIGHT_DTYPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS[1:])
@pytest.mark.parametrize("size", [(3, 5, 4), (33, 70, 40)], ids=str)
def test_linear_activation_matches_fp64(backend, dtype, activation, size):
    tensors = _inputs(*size, dtype)

    def ours(x, w, b, r):
        return linear(x, w, b, activation=activation, residual=r)

    def theirs(x, w, b, r):
        return _torch_linear(x, w, b, r, activation)

    _compare(ours, theirs, tensors, dtype, activation)


@pytest.mark.light(size=[(29, 66, 40)], dtype=LIGHT_DTYPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS[1:])
@pytest.mark.parametrize("size", [(3, 5, 4), (29, 66, 40), (2, 64, 130)], ids=str)
def test_gated_matches_fp64(backend, dtype, activation, size):
    tensors = _inputs(*size, dtype, gated=True)

    def ours(x, wg, wu, bg, bu):
        return linear_gated(x, wg, wu, bg, bu, activation=activation)

    def theirs(x, wg, wu, bg, bu):
        return _torch_gated(x, wg, wu, bg, bu, activation)

    _compare(ours, theirs, tensors, dtype, f"gated {activation}")


@pytest.mark.computes_in(torch.float64)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(backend, activation):
    tensors = leaves(_inputs(5, 7, 6, torch.float64))
    assert torch.autograd.gradcheck(
        lambda x, w, b, r: linear(x, w, b, activation=activation, residual=r), tensors
    )


@pytest.mark.computes_in(torch.float64)
def test_gated_gradcheck_and_second_derivative(backend):
    tensors = leaves(_inputs(4, 5, 6, torch.float64, gated=True))
    assert torch.autograd.gradcheck(linear_gated, tensors)
    assert torch.autograd.gradgradcheck(linear_gated, tensors)


def _layouts():
    torch.manual_seed(11)  # the same at collection and in a test
    yield "contiguous", torch.randn(24, 40)
    yield "transposed", torch.randn(40, 24).T
    yield "sliced", torch.randn(48, 80)[::2, ::2]
    yield "row slice", torch.randn(24, 64)[:, 10:50]
    yield "offset", torch.randn(24 * 40 + 3)[3:].view(24, 40)
    yield "expanded rows", torch.randn(1, 40).expand(24, 40)
    yield "expanded columns", torch.randn(24, 1).expand(24, 40)
    yield "size-1 stride", torch.randn(24, 40).as_strided((24, 40), (40, 1))
    yield "three dims", torch.randn(4, 6, 40)
    yield "permuted three dims", torch.randn(6, 4, 40).permute(1, 0, 2)


@pytest.mark.light(name=["transposed", "expanded columns", "permuted three dims"])
@pytest.mark.parametrize("name,x", list(_layouts()), ids=lambda v: v if isinstance(v, str) else "")
def test_layouts(backend, name, x):
    for weight_name, w in _layouts():
        if w.dim() != 2:
            continue
        mine, plain, exact = leaves([x, w]), leaves([x, w]), leaves([x, w], torch.float64)
        # leaves() makes contiguous copies, so the views are taken again inside the graph.
        got = linear(x, w, activation="gelu")
        want = F.gelu(F.linear(x.double(), w.double()))
        check_rule(f"{name} x {weight_name}", got, F.gelu(F.linear(x, w)), want)
        dy = torch.randn(got.shape).transpose(0, -1).contiguous().transpose(0, -1)
        ours = torch.autograd.grad(linear(*mine), mine, dy)
        theirs = torch.autograd.grad(F.linear(*plain), plain, dy)
        truth = torch.autograd.grad(F.linear(*exact), exact, dy.double())
        for a, b, c in zip(ours, theirs, truth, strict=True):
            check_rule(f"{name} x {weight_name} gradient", a, b, c)


@pytest.mark.parametrize("shape", [(0, 8, 4), (3, 0, 4), (3, 8, 0), (0, 0, 0)], ids=str)
def test_empty_sizes(backend, shape):
    m, n, k = shape
    x, w, b = leaves([torch.randn(m, k), torch.randn(n, k), torch.randn(n)])
    y = linear(x, w, b, activation="gelu")
    torch.testing.assert_close(y, F.gelu(F.linear(x, w, b)))
    dx, dw, db = torch.autograd.grad(y.sum(), (x, w, b))
    assert (dx.shape, dw.shape, db.shape) == (x.shape, w.shape, b.shape)
    assert not dx.isnan().any() and not dw.isnan().any() and not db.isnan().any()


def test_views_to_be_negated(backend):
    """z.conj().imag is one: the numbers in its memory have the other sign."""
    x, weight = (torch.randn(m, 24, dtype=torch.complex64).conj().imag for m in (5, 7))
    assert x.is_neg() and weight.is_neg()
    plain, expected = weight.resolve_neg(), F.linear(x, weight)
    torch.testing.assert_close(linear(x, plain), expected)
    torch.testing.assert_close(linear(x.resolve_neg(), weight), expected)
    leaf, pairs = torch.randn(5, 24, requires_grad=True), torch.randn(5, 7, 2)

    def loss(function):  # its gradient comes to `function` as such a view
        z = torch.complex(pairs[..., 0], function(leaf, plain)).conj().resolve_conj()
        return (torch.view_as_real(z) * pairs).sum()

    found, expected = (torch.autograd.grad(loss(f), leaf)[0] for f in (linear, F.linear))
    torch.testing.assert_close(found, expected)


def test_vector_input_and_vector_weight(backend):
    x, w, v = torch.randn(12), torch.randn(5, 12), torch.randn(12)
    torch.testing.assert_close(linear(x, w), F.linear(x, w))
    torch.testing.assert_close(linear(x, v), F.linear(x, v))
    batch = torch.randn(3, 12)
    torch.testing.assert_close(linear(batch, v, torch.tensor(2.0)), F.linear(batch, v) + 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(33, 70, 24), (8, 16, 8)], ids=str)
def test_dropout_takes_the_flat_stream(backend, dtype, size):
    tensors = _inputs(*size, dtype)
    torch.manual_seed(5)
    keep = random.flat_keep_mask(random.draw_seed(torch.device("cpu")), size[:2], 0.3)

    def ours(x, w, b, r):
        torch.manual_seed(5)
        return linear(x, w, b, activation="silu", residual=r, dropout_p=0.3)

    def theirs(x, w, b, r):
        y = F.silu(F.linear(x, w, b)) * random.scale(0.3)
        return torch.where(keep, y, 0.0) + r

    _compare(ours, theirs, tensors, dtype, "dropout")
    residual = tensors[3]
    assert torch.equal(ours(*tensors)[~keep], residual[~keep])


@pytest.mark.usefixtures("own_product")
def test_dropout_is_off_outside_training(backend):
    x, w = torch.randn(4, 8), torch.randn(6, 8)
    check_same(backend, linear(x, w, dropout_p=0.5, training=False), linear(x, w))
    assert torch.equal(linear(x, w, dropout_p=1.0), torch.zeros(4, 6))


@pytest.mark.usefixtures("own_product")
@pytest.mark.parametrize("activation", [None, "relu"])
def test_a_probability_that_rounds_to_no_decision_drops_nothing(backend, activation):
    x, w = torch.randn(4, 8).requires_grad_(), torch.randn(6, 8).requires_grad_()
    plain, rare = (linear(x, w, activation=activation, dropout_p=p) for p in (0.0, 2.0**-18))
    check_same(backend, rare, plain)
    for got, want in zip(*(gradients([y], (x, w)) for y in (rare, plain)), strict=True):
        check_same(backend, got, want)


def test_no_gradient_where_none_is_asked(backend):
    x, w, b = torch.randn(4, 8), torch.randn(6, 8, requires_grad=True), torch.randn(6)
    linear(x, w, b, activation="relu").sum().backward()
    assert w.grad is not None and x.grad is None and b.grad is None


@pytest.mark.parametrize("residual_dtype", [torch.float32, torch.bfloat16])
def test_autocast_computes_as_torch_does(backend, residual_dtype):
    x, w, b, r = leaves(_inputs(12, 20, 16, torch.float32))
    r = r.to(residual_dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = linear(x, w, b, residual=r), F.linear(x, w, b) + r
    assert ours.dtype == theirs.dtype
    exact = F.linear(x.double(), w.double(), b.double()) + r.double()
    check_rule("autocast", ours.bfloat16(), theirs.bfloat16(), exact)
    grads = torch.autograd.grad(ours.float().sum(), (x, w, b))
    assert [g.dtype for g in grads] == [torch.float32] * 3


@settings(max_examples=40, deadline=None)
@given(m=st.integers(0, 40), n=st.integers(1, 70), k=st.integers(1, 70), data=st.data())
def test_any_shape(m, n, k, data):
    activation = data.draw(st.sampled_from(ACTIVATIONS))
    torch.manual_seed(0)  # an example is its arguments alone
    x, w, b, _ = _inputs(m, n, k, torch.float32)
    got = linear(x, w, b, activation=activation, backend="cpu")
    want = _torch_linear(x.double(), w.double(), b.double(), None, activation)
    theirs = _torch_linear(x, w, b, None, activation)
    check_rule(f"{m}x{n}x{k} {activation}", got, theirs, want)


def test_opcheck(backend):
    x, w, b, r = leaves(_inputs(6, 10, 8, torch.float32))
    seed = torch.tensor([7])
    cases = [
        (x, w, None, b, None, r, None, None, 0.0, False, backend),
        (x, w, None, b, None, r, seed, "gelu", 0.3, True, backend),
        (x, w, w.detach().clone(), b, b, None, None, "silu", 0.0, True, backend),
    ]
    for case in cases:
        torch.library.opcheck(torch.ops.llmkern.linear.default, case)


def test_compile_fullgraph(backend):
    def step(x, w, b, r):
        return linear(x, w, b, activation="gelu", residual=r, backend=backend)

    x, w, b, r = leaves(_inputs(6, 10, 8, torch.float32))
    eager, compiled = step(x, w, b, r), torch.compile(step, fullgraph=True)(x, w, b, r)
    torch.testing.assert_close(compiled, eager)
    for a, e in zip(
        gradients([compiled], (x, w, b, r)), gradients([eager], (x, w, b, r)), strict=True
    ):
        torch.testing.assert_close(a, e)


def test_errors_name_op_tensor_rule_and_value():
    x, w = torch.randn(2, 3, 8), torch.randn(6, 8)
    cases = [
        (
            (x, torch.randn(6, 7)),
            {},
            r"linear: input's last dim must be 7 .*\[6, 7\]",
        ),
        ((x, torch.randn(2, 6, 8)), {}, r"linear: weight must have 2 dims, got \[2, 6, 8\]"),
        ((x, w, torch.randn(5)), {}, r"linear: bias must be \[6\].* got \[5\]"),
        ((x, w.double()), {}, r"linear: weight must be float32 \(as input\), got float64"),
        ((x.int(), w), {}, r"linear: input must be one of .* got int32"),
        ((x, w), {"activation": "tanh"}, r"linear: activation must be one of .* got 'tanh'"),
        ((x, w), {"dropout_p": 1.5}, r"linear: dropout_p must be in \[0, 1\], got 1.5"),
        ((x, w), {"residual": torch.randn(2, 6)}, r"linear: residual must be \[2, 3, 6\]"),
        ((torch.tensor(1.0), w), {}, r"linear: input must have at least 1 dim"),
        ((x, "w"), {}, r"linear: weight must be a Tensor, got str"),
        ((x, w.to("meta")), {}, r"linear: weight must be on cpu as input, got meta"),
    ]
    for arguments, options, message in cases:
        with pytest.raises((RuntimeError, TypeError), match=message) as caught:
            linear(*arguments, **options)
        assert isinstance(caught.value, errors.LlmkernError)
    with pytest.raises(errors.ShapeError, match="linear_gated: up_weight must have 6 rows"):
        linear_gated(x, w, torch.randn(5, 8))
    with pytest.raises(errors.ShapeError, match=r"up_weight must be \[6, 8\] as gate_weight"):
        linear_gated(x, w, torch.randn(6, 7))
    with pytest.raises(errors.ShapeError, match="both or neither"):
        linear_gated(x, w, w, torch.randn(6))
