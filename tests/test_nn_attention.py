"""MultiheadAttention against torch.nn.MultiheadAttention."""

import copy
import math
import pickle

import pytest
import torch
from modules import check_module, replaced
from torch import nn

import llmkern
from llmkern.errors import ArgumentError, ModuleDtypeError, ModuleShapeError

E, H, S, T, B = 24, 3, 7, 9, 2

# What makes an attention module: constructor arguments and the widths of key and value.
MODULES = {
    "plain": ({}, E, E),
    "no_bias": ({"bias": False}, E, E),
    "bias_kv": ({"add_bias_kv": True}, E, E),
    "zero": ({"add_zero_attn": True}, E, E),
    "bias_kv_zero": ({"add_bias_kv": True, "add_zero_attn": True}, E, E),
    "kdim_vdim": ({"kdim": 10, "vdim": 14}, 10, 14),
    "vdim_no_bias": ({"vdim": 14, "bias": False}, E, 14),
}
CAUSAL = torch.ones(S, S, dtype=torch.bool).triu(1)


def attention(kind: str = "plain", **options) -> nn.MultiheadAttention:
    module = nn.MultiheadAttention(E, H, **MODULES[kind][0], **options)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return module


def masked(hidden: torch.Tensor, form: str, dtype: torch.dtype) -> torch.Tensor:
    """A mask (True = hidden) as bool, as 0 and -inf, or as arbitrary numbers and -inf."""
    if form == "bool":
        return hidden
    values = torch.linspace(-1, 1, hidden.numel()).view(hidden.shape) if form == "bias" else None
    base = torch.zeros(hidden.shape) if values is None else values
    return base.masked_fill(hidden, -math.inf).to(dtype)


def inputs(kind: str, batch_first: bool, self_attention: bool, batched: bool = True):
    _, kdim, vdim = MODULES[kind]
    shapes = [(S, B, E)] if self_attention else [(S, B, E), (T, B, kdim), (T, B, vdim)]
    tensors = [torch.randn(shape) for shape in shapes]
    if not batched:
        return [t[:, 0] for t in tensors]
    return [t.transpose(0, 1).contiguous() if batch_first else t for t in tensors]


def call(**options):
    """Calls the module on (query, key, value); an option that is callable is told the dtype."""

    def apply(module, query, key, value):
        given = {k: v(query.dtype) if callable(v) else v for k, v in options.items()}
        return module(query, key, value, **given)

    return apply


def self_call(**options):
    return lambda module, x: call(**options)(module, x, x, x)


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("need_weights", [False, True])
def test_cross_attention_matches_torch(kind, batch_first, need_weights):
    theirs = attention(kind, batch_first=batch_first)
    check_module(theirs, call(need_weights=need_weights), *inputs(kind, batch_first, False))


@pytest.mark.parametrize("kind", ["plain", "no_bias", "bias_kv", "zero", "bias_kv_zero"])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("need_weights", [False, True])
def test_self_attention_matches_torch(kind, batch_first, need_weights):
    theirs = attention(kind, batch_first=batch_first)
    check_module(theirs, self_call(need_weights=need_weights), *inputs(kind, batch_first, True))
    check_module(
        theirs.eval(), self_call(need_weights=need_weights), *inputs(kind, batch_first, True)
    )


@pytest.mark.parametrize("batch_first", [False, True])
def test_shared_key_and_value_match_torch(batch_first):
    query, memory, _ = inputs("plain", batch_first, False)

    def apply(module, query, memory):
        return module(query, memory, memory, need_weights=False)

    check_module(attention(batch_first=batch_first), apply, query, memory)


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("kind", ["plain", "bias_kv"])
def test_unbatched_input_matches_torch(kind, average):
    for batch_first in (False, True):
        theirs = attention(kind, batch_first=batch_first)
        options = {"need_weights": True, "average_attn_weights": average}
        check_module(theirs, call(**options), *inputs(kind, batch_first, False, batched=False))
        check_module(
            theirs,
            self_call(
                need_weights=False,
                attn_mask=CAUSAL,
                key_padding_mask=torch.arange(S) > 4,
            ),
            *inputs(kind, batch_first, True, batched=False),
        )


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("kind", ["plain", "bias_kv_zero"])
@pytest.mark.parametrize("padding", [None, "bool", "float", "bias"])
@pytest.mark.parametrize("mask", [None, "bool", "float", "bias"])
@pytest.mark.parametrize("dims", [2, 3])
def test_masks_of_both_kinds_match_torch(mask, padding, dims, kind, need_weights):
    hidden = torch.rand(S, T) < 0.3 if dims == 2 else torch.rand(B * H, S, T) < 0.3
    hidden[..., 0] = False
    padded = torch.zeros(B, T, dtype=torch.bool)
    padded[1, 6:] = True
    options = {"need_weights": need_weights}
    if mask:
        options["attn_mask"] = lambda dtype: masked(hidden, mask, dtype)
    if padding:
        options["key_padding_mask"] = lambda dtype: masked(padded, padding, dtype)
    check_module(attention(kind), call(**options), *inputs(kind, False, False))


@pytest.mark.parametrize("form", ["bool", "float"])
@pytest.mark.parametrize("kind", ["plain", "bias_kv", "zero"])
@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("need_weights", [False, True])
def test_causal_hint_matches_torch(form, kind, padding, need_weights):
    padded = torch.zeros(B, S, dtype=torch.bool)
    padded[0, 5:] = True
    options = {
        "attn_mask": lambda dtype: masked(CAUSAL, form, dtype),
        "is_causal": True,
        "need_weights": need_weights,
        "key_padding_mask": (lambda dtype: masked(padded, form, dtype)) if padding else None,
    }
    check_module(attention(kind), self_call(**options), *inputs(kind, False, True))


@pytest.mark.parametrize("average", [False, True])
def test_gradients_flow_through_the_weights(average):
    def weights_only(module, query, key, value):
        return module(query, key, value, average_attn_weights=average)[1]

    check_module(attention(), weights_only, *inputs("plain", False, False))


def test_attention_bias_gets_its_gradient():
    query, key, value = inputs("plain", False, False)
    bias = torch.randn(S, T)

    def apply(module, query, key, value, bias):
        return module(query, key, value, attn_mask=bias, need_weights=False)[0]

    check_module(attention(), apply, query, key, value, bias)


def test_causal_bias_that_learns_gets_its_gradient():
    """One that starts at the causal mask is taken for it by the layers, as torch's do."""
    theirs = nn.TransformerEncoder(nn.TransformerEncoderLayer(E, H, 8, 0.0, batch_first=True), 1)
    padding = torch.zeros(B, S, dtype=torch.bool)  # with one, torch uses the mask

    def run(module, x, bias):
        return module(x, bias, src_key_padding_mask=padding)

    check_module(theirs, run, torch.randn(B, S, E), masked(CAUSAL, "float", torch.float32))


@pytest.mark.parametrize("need_weights", [False, True])
def test_query_that_sees_no_key_gets_zero(need_weights):
    ours = replaced(attention(bias=False))
    query, key, value = (t.requires_grad_() for t in inputs("plain", False, False))
    hidden = torch.zeros(S, T, dtype=torch.bool)
    hidden[3] = True
    out, weights = ours(query, key, value, attn_mask=hidden, need_weights=need_weights)
    assert not bool(out[3].any())
    assert weights is None or not bool(weights[:, 3].any())
    gradients = torch.autograd.grad(out.sum(), [query, key, value, *ours.parameters()])
    assert all(bool(g.isfinite().all()) for g in gradients)


@pytest.mark.usefixtures("own_product")
def test_output_does_not_depend_on_need_weights():
    ours = replaced(attention())
    tensors = inputs("plain", False, False)
    assert torch.equal(ours(*tensors, need_weights=False)[0], ours(*tensors, need_weights=True)[0])


@pytest.mark.parametrize("need_weights", [False, True])
def test_dropout_keeps_the_expectation(need_weights):
    """Mean over many draws against the module without dropout; weights are dropped and scaled."""
    theirs = attention(batch_first=True, dropout=0.5)
    ours = replaced(theirs)
    x = torch.randn(1, S, E).expand(4000, S, E)
    with torch.no_grad():
        out, weights = ours(x, x, x, need_weights=need_weights)
        exact, exact_weights = theirs.eval()(x[:1], x[:1], x[:1])
    spread = out.std(0) / math.sqrt(len(x))
    assert ((out.mean(0) - exact[0]).abs() < 6 * spread + 1e-5).all()
    if need_weights:
        assert (weights == 0).any()
        spread = weights.std(0) / math.sqrt(len(x))
        assert ((weights.mean(0) - exact_weights[0]).abs() < 6 * spread + 1e-5).all()


def test_layouts_are_those_of_torch():
    """A caller's .view works on our output where it works on torch's."""
    for batch_first in (False, True):
        for kind in ("plain", "bias_kv"):
            theirs = attention(kind, batch_first=batch_first)
            tensors = inputs(kind, batch_first, True) * 3
            with torch.no_grad():
                got = replaced(theirs)(*tensors)[0]
                expected = theirs(*tensors)[0]
            assert got.shape == expected.shape
            assert got.is_contiguous() or not expected.is_contiguous()


@pytest.mark.parametrize("batch_first", [False, True])
def test_strided_and_expanded_inputs(batch_first):
    x = torch.randn(B, 2 * S, E)[:, ::2] if batch_first else torch.randn(B, S, E).transpose(0, 1)
    check_module(attention(batch_first=batch_first), self_call(need_weights=False), x)
    one = torch.randn(1, E).expand(S, B, E)
    check_module(attention(), lambda m, x: m(one.to(x.dtype) * x, x, x)[0], torch.randn(S, B, E))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("need_weights", [False, True])
def test_other_dtypes_keep_the_rule(dtype, need_weights):
    theirs = attention(batch_first=True)
    check_module(theirs, self_call(need_weights=need_weights), torch.randn(B, S, E), dtype=dtype)


@pytest.mark.parametrize("need_weights", [False, True])
def test_autocast_gives_the_dtypes_of_torch(need_weights):
    theirs = attention(batch_first=True)
    x = torch.randn(B, S, E)
    mask = masked(CAUSAL, "float", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = replaced(theirs)(x, x, x, attn_mask=mask, need_weights=need_weights)
        expected = theirs(x, x, x, attn_mask=mask, need_weights=need_weights)
    for g, e in zip(got, expected, strict=True):
        assert (g is None) == (e is None)
        if g is not None:
            assert g.dtype == e.dtype
            torch.testing.assert_close(g, e, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("length", [0, 1, 2])
def test_short_and_empty_sequences(length):
    theirs = attention(batch_first=True)
    x, memory = torch.randn(B, length, E), torch.randn(B, T, E)
    check_module(theirs, lambda m, x: m(x, memory.to(x.dtype), memory.to(x.dtype))[0], x)
    if length:
        check_module(theirs, self_call(need_weights=False), x)
    assert replaced(theirs)(x[:0], x[:0], x[:0], need_weights=False)[0].shape == (0, length, E)


def test_nested_tensors_take_the_path_of_torch():
    theirs = nn.MultiheadAttention(E, 4, batch_first=True).eval()
    x = torch.nested.nested_tensor([torch.randn(3, E), torch.randn(5, E)])
    with torch.no_grad():
        got = replaced(theirs)(x, x, x, need_weights=False)[0]
        expected = theirs(x, x, x, need_weights=False)[0]
    torch.testing.assert_close(got.to_padded_tensor(0.0), expected.to_padded_tensor(0.0))


@pytest.mark.parametrize("kind", ["plain", "bias_kv_zero", "kdim_vdim"])
@pytest.mark.parametrize("need_weights", [False, True])
def test_compiles_whole(kind, need_weights):
    ours = replaced(attention(kind))
    tensors = inputs(kind, False, False)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    padding = torch.zeros(B, T, dtype=torch.bool)
    padding[0, 5:] = True
    options = {"key_padding_mask": padding, "need_weights": need_weights}
    got, expected = compiled(*tensors, **options), ours(*tensors, **options)
    for g, e in zip(got, expected, strict=True):
        if g is not None:
            torch.testing.assert_close(g, e)
    parameters = [p for p in ours.parameters()]
    torch.testing.assert_close(
        torch.autograd.grad(got[0].sum(), parameters),
        torch.autograd.grad(expected[0].sum(), parameters),
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.usefixtures("own_product")
def test_copies_and_pickles():
    ours = replaced(attention("bias_kv"))
    tensors = inputs("bias_kv", False, False)
    for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(copied) is llmkern.nn.MultiheadAttention
        assert torch.equal(copied(*tensors)[0], ours(*tensors)[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": (S, B, E + 1)}, rf"query must be \[{S}, {B}, {E}\], got \[{S}, {B}, {E + 1}\]"),
        ({"key": (T, B + 1, E)}, r"key must be \[9, 2, 24\], got \[9, 3, 24\]"),
        ({"value": (T + 1, B, E)}, r"value must be \[9, 2, 24\], got \[10, 2, 24\]"),
        ({"query": (1, S, B, E)}, r"query must have 2 or 3 dims, got \[1, 7, 2, 24\]"),
        ({"attn_mask": (S, T + 1)}, r"attn_mask must be \[7, 9\], got \[7, 10\]"),
        ({"attn_mask": (B, S, T)}, r"attn_mask must be \[6, 7, 9\], got \[2, 7, 9\]"),
        ({"key_padding_mask": (T, B)}, r"key_padding_mask must be \[2, 9\], got \[9, 2\]"),
    ],
)
def test_wrong_shapes_are_named(change, message):
    shapes = {"query": (S, B, E), "key": (T, B, E), "value": (T, B, E)} | change
    tensors = {name: torch.zeros(shape) for name, shape in shapes.items()}
    with pytest.raises(ModuleShapeError, match=f"MultiheadAttention: {message}"):
        replaced(attention())(**tensors)
    assert issubclass(ModuleShapeError, AssertionError | ValueError)


def test_wrong_masks_are_named():
    ours = replaced(attention())
    x = torch.randn(S, B, E)
    with pytest.raises(ModuleDtypeError, match="attn_mask must be bool or floating point, got"):
        ours(x, x, x, attn_mask=torch.zeros(S, S, dtype=torch.int32))
    with pytest.raises(ArgumentError, match="attn_mask must be given with is_causal=True"):
        ours(x, x, x, is_causal=True)
