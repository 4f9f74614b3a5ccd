"""Attention under autograd, torch.compile, fake tensors, torch.func, autocast and subclasses."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import llmkern
from llmkern import dispatch
from llmkern.functional import (
    attention_kvpacked,
    attention_qkvpacked,
    scaled_dot_product_attention,
)
from llmkern.ops import attention as ops
from llmkern.specs import UNBOUNDED

sdpa = scaled_dot_product_attention
PLAIN = (0.3, 0.0, 0, UNBOUNDED, UNBOUNDED, 0.0, None)
RICH = (0.3, 2.0, 1, 5, 2, 0.3, None)

# Under Triton's interpreter these are slow; test_triton_attention.py is its short run.
pytestmark = pytest.mark.light(backend=["reference", "cpu"])


class _Tagged(torch.Tensor):
    """A subclass that adds nothing: calls on it go through the dispatcher."""


def randn(*shape, dtype=torch.float32, grad=True):
    return torch.randn(shape, dtype=dtype, requires_grad=grad)


def op_arguments(kind: str) -> tuple:
    q, k, v = randn(2, 4, 5, 8), randn(2, 2, 7, 8), randn(2, 2, 7, 6)
    if kind == "plain":
        return (q, k, v, None, None, None, None, None, None, *PLAIN)
    if kind == "transposed":
        q, k, v = (randn(2, n, 2, 8).transpose(1, 2) for n in (5, 7, 7))
        return (q, k, v, None, None, None, None, None, None, *PLAIN)
    if kind == "all":
        bias = randn(1, 4, 1, 7)
        masks = (torch.rand(2, 1, 5, 7) > 0.3, torch.rand(2, 7) > 0.3)
        side = (torch.rand(1, 4), randn(4), torch.tensor([3]))
        return (q, k, v, bias, *masks, *side, *RICH)
    if kind == "float64":
        return (*(t.detach().double().requires_grad_() for t in (q, k, v)), *(None,) * 6, *PLAIN)
    if kind == "qkvpacked":
        return (randn(2, 5, 3, 2, 8), None, None, *(None,) * 6, *PLAIN)
    return (randn(2, 5, 4, 8), randn(2, 7, 2, 2, 8), None, *(None,) * 6, *PLAIN)


KINDS = ["plain", "transposed", "all", "float64", "qkvpacked", "kvpacked"]


@pytest.mark.parametrize("kind", KINDS)
def test_attention_opcheck_compile(kind):
    torch.library.opcheck(torch.ops.llmkern.attention, op_arguments(kind))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_attention_fake_has_the_strides_of_the_real(backend, kind, dtype):
    args = [t.detach().to(dtype) if isinstance(t, torch.Tensor) and t.requires_grad else t
            for t in op_arguments(kind)]  # fmt: skip
    bias, sinks = args[3], args[7]
    if bias is not None:
        args[3] = bias.to(torch.float64 if dtype == torch.float64 else torch.float32)
        args[7] = sinks.float()
    real = list(torch.ops.llmkern.attention(*args))
    wants = [True, True, True, bias is not None, sinks is not None]
    back = (torch.ones_like(real[0]), None, *args[:9], *real, *args[9:15], wants, None)
    real += torch.ops.llmkern.attention_backward(*back)
    with FakeTensorMode() as mode:

        def fake_of(t):
            return mode.from_tensor(t) if isinstance(t, torch.Tensor) else t

        fake = list(torch.ops.llmkern.attention(*map(fake_of, args)))
        fake += torch.ops.llmkern.attention_backward(*map(fake_of, back))
    for a, b in zip(real, fake, strict=True):
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)


@pytest.mark.computes_in(torch.float64)
def test_attention_gradcheck(backend):
    q, k, v = (
        randn(2, h, n, d, dtype=torch.float64) for h, n, d in ((4, 5, 6), (2, 7, 6), (2, 7, 3))
    )
    bias = randn(4, 1, 7, dtype=torch.float64)
    padding = torch.rand(2, 7) > 0.2
    slopes, sinks = torch.rand(4), torch.randn(4)

    def call(q, k, v, bias):
        torch.manual_seed(0)
        return sdpa(q, k, v, bias, 0.2, True, enable_gqa=True, causal_align="bottom_right",
                    window=(5, None), softcap=2.0, alibi_slopes=slopes, sinks=sinks,
                    key_padding_mask=padding, return_lse=True)  # fmt: skip

    out, lse = call(q, k, v, bias)
    assert bool(torch.isfinite(lse).all())
    assert torch.autograd.gradcheck(call, (q, k, v, bias), fast_mode=True)


@pytest.mark.computes_in(torch.float64)
def test_attention_gradcheck_packed(backend):
    qkv = randn(2, 5, 3, 2, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda x: attention_qkvpacked(x, is_causal=True), (qkv,), fast_mode=True
    )
    q, kv = randn(2, 5, 4, 3, dtype=torch.float64), randn(2, 6, 2, 2, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(attention_kvpacked, (q, kv), fast_mode=True)


@pytest.mark.computes_in(torch.float64)
def test_attention_second_derivative(backend):
    """create_graph differentiates the reference formula, masks and dropout included."""
    q, k, v = (randn(1, h, n, 3, dtype=torch.float64) for h, n in ((2, 3), (1, 4), (1, 4)))
    bias = randn(2, 3, 1, dtype=torch.float64)
    padding = torch.tensor([[True, True, False, True]])

    def call(q, k, v, bias):
        torch.manual_seed(0)
        return sdpa(q, k, v, bias, 0.2, True, softcap=2.0, window=(1, None), return_lse=True,
                    key_padding_mask=padding, causal_align="bottom_right")  # fmt: skip

    assert torch.autograd.gradgradcheck(call, (q, k, v, bias), fast_mode=True)


@pytest.mark.computes_in(torch.float64)
def test_attention_second_derivative_where_the_first_is_a_constant(backend):
    """The incoming gradient is a constant, but the gradient of q depends on q, k and v."""
    q, k, v = (randn(2, 2, n, 8, dtype=torch.float64) for n in (5, 7, 7))
    results = []
    for function in (sdpa, lambda *t: torch.softmax(t[0] @ t[1].mT / 8**0.5, -1) @ t[2]):
        (grad,) = torch.autograd.grad(function(q, k, v).sum(), q, create_graph=True)
        results.append(torch.autograd.grad(grad.square().sum(), (q, k, v)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_attention_second_derivative_of_a_traced_call_is_an_error(backend):
    q = randn(1, 1, 3, 4)
    given = q.as_subclass(_Tagged)
    (grad,) = torch.autograd.grad(sdpa(given, given, given).sum(), q, create_graph=True)
    with pytest.raises(llmkern.errors.BackendError, match="second derivatives need plain eager"):
        grad.square().sum().backward()


def test_attention_output_may_be_changed_in_place(backend):
    q = randn(1, 2, 3, 4)
    out = sdpa(q, q, q)
    out *= 2.0
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()  # out is needed for the backward pass, and autograd says so
    packed = attention_qkvpacked(randn(1, 3, 3, 2, 4))
    packed += 1.0


def test_attention_saved_inputs_may_not_be_changed(backend):
    q, k = randn(1, 2, 3, 4), randn(1, 2, 3, 4) * 1.0
    out = sdpa(q, k, k)
    k.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


class _Model(torch.nn.Module):
    """Head counts and features as a user's model has them."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind
        self.proj = torch.nn.Linear(16, 48)
        self.sinks = torch.nn.Parameter(torch.randn(2))

    def forward(self, x, mask):
        b, s, _ = x.shape
        qkv = self.proj(x).view(b, s, 3, 2, 8)
        if self.kind == "qkvpacked":
            out = attention_qkvpacked(qkv, mask, is_causal=True, sinks=self.sinks)
        elif self.kind == "kvpacked":
            out = attention_kvpacked(qkv[:, :, 0], qkv[:, :, 1:], mask, window=(3, 1))
        else:
            q, k, v = qkv.transpose(1, 3).unbind(2)
            out = sdpa(q, k, v, mask, is_causal=True, sinks=self.sinks, softcap=3.0)
            out = out.transpose(1, 2)
        return out.reshape(b, s, 16)


@pytest.mark.parametrize(
    "kind, dynamic, compiler",
    [
        ("separate", False, "inductor"),
        ("qkvpacked", True, "inductor"),
        ("separate", True, "aot_eager"),
        ("qkvpacked", False, "aot_eager"),
        ("kvpacked", True, "aot_eager"),
    ],
)
def test_attention_compile_fullgraph(kind, dynamic, compiler):
    torch._dynamo.reset()
    model = _Model(kind)
    compiled = torch.compile(model, backend=compiler, fullgraph=True, dynamic=dynamic or None)
    for s in (5, 9) if dynamic else (5,):
        x, mask = torch.randn(2, s, 16, requires_grad=True), torch.randn(s, s, requires_grad=True)
        parameters = [x, mask, *model.parameters()]
        results = []
        for call in (model, compiled):
            out = call(x, mask)
            grads = torch.autograd.grad(out.square().sum(), parameters, allow_unused=True)
            results.append([out, *grads])
        for a, b in zip(*results, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b)


def test_attention_compile_dropout_and_autocast():
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def call(q, k, v):
        with torch.autocast("cpu", torch.bfloat16):
            return sdpa(q, k, v, dropout_p=0.5, return_lse=True)

    q, k, v = randn(2, 2, 30, 8), randn(2, 2, 30, 8), torch.eye(30).expand(2, 2, 30, 30)
    first, lse = call(q, k, v)
    second, _ = call(q, k, v)
    assert first.dtype == torch.bfloat16 and lse.dtype == torch.float32
    assert 0.4 < float((first == 0).float().mean()) < 0.6
    assert not torch.equal(first == 0, second == 0)
    first.float().square().sum().backward()
    assert bool(torch.isfinite(q.grad).all())


def test_attention_func_transforms(backend):
    """torch.func runs the reference formula: gradients, batches of them, Hessians, tangents."""
    q, k, v = (torch.randn(3, 2, n, 8) for n in (5, 7, 7))
    padding = torch.ones(7, dtype=torch.bool)

    def loss(q, k, v):
        return sdpa(q, k, v, is_causal=True, key_padding_mask=padding[None]).square().sum()

    leaf = q.clone().requires_grad_()
    sdpa(leaf, k, v, is_causal=True).square().sum().backward()
    per_sample = torch.func.vmap(torch.func.grad(loss))
    torch.testing.assert_close(per_sample(q[:, None], k[:, None], v[:, None])[:, 0], leaf.grad)
    torch.testing.assert_close(torch.func.vmap(sdpa)(q, k, v), sdpa(q, k, v))
    small = (q[:1, :1, :2], k[:1], v[:1])
    assert torch.func.hessian(loss)(*small).shape == small[0].shape * 2
    tangent = torch.func.jvp(lambda q: sdpa(q, k, v), (q,), (torch.ones_like(q),))[1]
    step = (sdpa(q + 1e-3, k, v) - sdpa(q - 1e-3, k, v)) / 2e-3
    torch.testing.assert_close(tangent, step, atol=1e-3, rtol=1e-3)


def test_attention_takes_tensor_subclasses(backend):
    q, k, v = (torch.randn(2, 2, n, 8) for n in (5, 7, 7))
    out = sdpa(q.as_subclass(_Tagged), k, v)
    torch.testing.assert_close(out.as_subclass(torch.Tensor), sdpa(q, k, v))


class _Names(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.__name__.split(".")[0])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["qkvpacked", "kvpacked"])
def test_attention_packed_moves_no_activations(kind):
    """Between the packed projection and the output, forward and backward, no copy is made."""
    qkv, q, kv = randn(2, 5, 3, 2, 8), randn(2, 5, 4, 8), randn(2, 6, 2, 2, 8)
    with _Names() as mode, dispatch.use_backend("cpu"):
        out = attention_qkvpacked(qkv) if kind == "qkvpacked" else attention_kvpacked(q, kv)
        out.backward(torch.randn_like(out))
    moved = {"cat", "stack", "copy_", "clone", "contiguous", "_to_copy", "zeros", "add", "add_"}
    assert not moved & set(mode.names), mode.names


AUTOCAST = {torch.float32: torch.bfloat16, torch.float16: torch.bfloat16,
            torch.bfloat16: torch.bfloat16, torch.float64: torch.float64}  # fmt: skip


@pytest.mark.parametrize("dtype", AUTOCAST, ids=str)
def test_attention_autocast_casts_as_torch(backend, dtype):
    q, k, v = (randn(2, 2, n, 8, dtype=dtype) for n in (5, 7, 7))
    mask = torch.randn(5, 7, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = sdpa(q, k, v, mask)
        assert out.dtype == F.scaled_dot_product_attention(q, k, v).dtype == AUTOCAST[dtype]
        with torch.autocast("cpu", enabled=False):
            assert sdpa(q, k, v, mask).dtype == dtype
    want = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), mask.double())
    torch.testing.assert_close(out.double(), want, atol=0.03, rtol=0.03)
    out.float().sum().backward()
    assert q.grad.dtype == dtype and mask.grad.dtype == torch.float32


def test_attention_autocast_joins_dtypes(backend):
    q, k, v = randn(2, 5, 8), randn(2, 7, 8, dtype=torch.bfloat16), randn(2, 7, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert sdpa(q, k, v).dtype == torch.bfloat16
        assert attention_qkvpacked(randn(1, 5, 3, 2, 8)).dtype == torch.bfloat16
        with pytest.raises(llmkern.errors.DtypeError):
            sdpa(q, k, v.double())


def test_attention_no_grad_records_nothing(backend):
    q = randn(1, 2, 5, 8)
    with torch.no_grad():
        assert sdpa(q, q, q).grad_fn is None
    with torch.inference_mode():
        assert sdpa(q, q, q).is_inference()
    assert isinstance(sdpa(q, q, q).grad_fn, ops._AttentionFunction._backward_cls)


def test_attention_names_the_backend_that_runs():
    q = randn(1, 2, 5, 8, grad=False)
    for name in ("reference", "cpu"):
        torch.testing.assert_close(sdpa(q, q, q, backend=name), sdpa(q, q, q))
    with pytest.raises(llmkern.errors.BackendError, match="attention: no backend serves"):
        sdpa(q, q, q, backend="cuda")


def test_a_batch_of_unknown_size_compiles():
    def chosen(x, mask):
        return attention_qkvpacked(x[mask.nonzero().squeeze(1)])

    x, mask = torch.randn(5, 6, 3, 2, 8), torch.tensor([1, 0, 1, 1, 0])
    torch._dynamo.reset()
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(chosen, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x, mask), chosen(x, mask))
