"""Encoder, decoder and whole Transformer against torch.nn's."""

import copy
import functools
import pickle

import pytest
import torch
import torch.nn.functional as F
from modules import check_module, replaced
from torch import nn
from torch.nn.utils import parametrizations

import llmkern

E, H, FF, S, T, B = 16, 2, 40, 6, 5, 3
CAUSAL = nn.Transformer.generate_square_subsequent_mask(S)
PADDING = torch.arange(S) >= torch.tensor([[4], [6], [5]])


def encoder_layer(**options) -> nn.TransformerEncoderLayer:
    options = {"dropout": 0.0, "batch_first": True} | options
    return randomised(nn.TransformerEncoderLayer(E, H, FF, **options))


def decoder_layer(**options) -> nn.TransformerDecoderLayer:
    options = {"dropout": 0.0, "batch_first": True} | options
    return randomised(nn.TransformerDecoderLayer(E, H, FF, **options))


def randomised(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return module


def forward(**options):
    """module(*tensors, **options), float options in the dtype of the run."""

    def apply(module, *tensors):
        given = {
            k: v.to(tensors[0].dtype)
            if isinstance(v, torch.Tensor) and v.is_floating_point()
            else v
            for k, v in options.items()
        }
        return module(*tensors, **given)

    return apply


class Doubled(nn.Module):
    """A submodule of a user's own."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return 2 * self.inner(x)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_encoder_layer_matches_torch(norm_first, batch_first, bias, activation):
    theirs = encoder_layer(
        norm_first=norm_first, batch_first=batch_first, bias=bias, activation=activation
    )
    x = torch.randn(B, S, E) if batch_first else torch.randn(S, B, E)
    check_module(theirs, forward(), x)
    check_module(theirs, forward(src_mask=CAUSAL, src_key_padding_mask=PADDING), x)
    check_module(theirs, forward(src_mask=CAUSAL, is_causal=True), x)
    check_module(theirs, forward(), torch.randn(S, E))
    check_module(theirs.eval(), forward(src_mask=CAUSAL < 0), x)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_decoder_layer_matches_torch(norm_first, batch_first):
    theirs = decoder_layer(norm_first=norm_first, batch_first=batch_first)
    x, memory = torch.randn(B, S, E), torch.randn(B, T, E)
    if not batch_first:
        x, memory = x.transpose(0, 1).contiguous(), memory.transpose(0, 1)
    check_module(theirs, forward(), x, memory)
    options = {
        "tgt_mask": CAUSAL,
        "memory_mask": torch.rand(S, T) < 0.2,
        "tgt_key_padding_mask": PADDING,
        "memory_key_padding_mask": PADDING[:, 1:],
        "tgt_is_causal": True,
    }
    check_module(theirs, forward(**options), x, memory)
    check_module(theirs, forward(), torch.randn(S, E), torch.randn(T, E))


@pytest.mark.parametrize(
    "activation",
    [
        F.silu,
        torch.relu,
        nn.SiLU(),
        nn.GELU(approximate="tanh"),
        functools.partial(F.gelu, approximate="tanh"),
        torch.tanh,
        nn.LeakyReLU(0.2),
        lambda x: x.square(),
    ],
    ids=lambda a: getattr(a, "__name__", type(a).__name__),
)
def test_activations_match_torch(activation):
    x, memory = torch.randn(B, S, E), torch.randn(B, T, E)
    check_module(encoder_layer(activation=activation), forward(), x)
    check_module(decoder_layer(activation=activation), forward(), x, memory)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize(
    "name", ["norm1", "norm2", "linear1", "linear2", "dropout", "dropout1", "dropout2", "self_attn"]
)
def test_hooked_submodules_are_called(name, norm_first):
    theirs = encoder_layer(norm_first=norm_first)
    ours = replaced(theirs)
    calls = []
    for model in (theirs, ours):
        model.get_submodule(name).register_forward_pre_hook(lambda m, args: calls.append("pre"))
        model.get_submodule(name).register_forward_hook(
            lambda m, args, out: (out[0] * 2, out[1]) if isinstance(out, tuple) else out * 2
        )
    x = torch.randn(B, S, E)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)
    assert calls == ["pre", "pre"]


def test_backward_and_global_hooks_fire():
    ours = replaced(encoder_layer())
    x = torch.randn(B, S, E, requires_grad=True)
    seen = []
    handle = ours.linear1.register_full_backward_hook(lambda *_: seen.append("backward"))
    ours(x).sum().backward()
    handle.remove()
    assert seen == ["backward"]
    called = set()
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: called.add(m))
    ours(x)
    handle.remove()
    assert called == set(ours.modules()) - {ours.self_attn.out_proj}


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("name", ["norm1", "norm2", "linear1", "linear2", "dropout1", "dropout"])
def test_foreign_submodules_are_called(name, norm_first):
    theirs = encoder_layer(norm_first=norm_first)
    setattr(theirs, name, Doubled(getattr(theirs, name)))
    if name == "norm1":
        theirs.norm1.eps = 1e-5  # torch's layer reads it
    check_module(theirs, forward(), torch.randn(B, S, E))


def test_rms_norm_in_a_layer_is_fused_and_right():
    for norm_first in (False, True):
        theirs = encoder_layer(norm_first=norm_first)
        theirs.norm1, theirs.norm2 = nn.RMSNorm(E, eps=1e-6), nn.RMSNorm(E)
        check_module(theirs, forward(), torch.randn(B, S, E))


def test_parametrized_linear_is_called():
    theirs = encoder_layer()
    parametrizations.weight_norm(theirs.linear1)
    check_module(theirs, forward(), torch.randn(B, S, E))
    ours = replaced(encoder_layer())
    parametrizations.orthogonal(ours.linear2)
    weight = ours.linear2.weight
    torch.testing.assert_close(weight @ weight.T, torch.eye(E), rtol=1e-4, atol=1e-4)
    assert ours(torch.randn(B, S, E)).shape == (B, S, E)


def test_forward_set_on_an_instance_is_called():
    ours = replaced(encoder_layer())
    ours.linear1.forward = lambda x: torch.zeros(*x.shape[:-1], FF)
    ours.linear2.forward = lambda h: torch.full((*h.shape[:-1], E), float(h.abs().sum()))
    x = torch.randn(B, S, E)
    expected = ours.norm2(ours.norm1(x + ours.self_attn(x, x, x)[0]))
    torch.testing.assert_close(ours(x), expected)


def test_subclass_with_its_own_block_keeps_it():
    class Layer(llmkern.nn.TransformerEncoderLayer):
        def _ff_block(self, x):
            return torch.zeros_like(x)

    layer = Layer(E, H, FF, dropout=0.0, batch_first=True)
    x = torch.randn(B, S, E)
    expected = layer.norm2(layer.norm1(x + layer.self_attn(x, x, x)[0]))
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("block", ["_sa_block", "_mha_block", "_ff_block"])
@pytest.mark.parametrize("patched", ["instance", "class"])
def test_patched_block_is_called(block, patched, monkeypatch):
    """People patch a block, e.g. to have it keep the attention weights."""
    theirs = nn.TransformerDecoderLayer(E, H, FF, dropout=0.0, batch_first=True)
    if block != "_mha_block":
        theirs = encoder_layer()
    ours = replaced(theirs)
    x = [torch.randn(B, S, E)] * (2 if block == "_mha_block" else 1)
    before = ours(*x)
    for target in (ours, theirs) if patched == "instance" else (type(theirs),):
        monkeypatch.setattr(target, block, lambda *_, **__: torch.zeros(B, S, E))
    torch.testing.assert_close(ours(*x), theirs(*x))
    assert not torch.allclose(ours(*x), before)


@pytest.mark.parametrize("norm_first", [False, True])
def test_dropout_keeps_the_expectation(norm_first):
    """Mean of many draws of a layer's first residual block against torch's own mean of draws."""
    theirs = encoder_layer(norm_first=norm_first, dropout=0.2)
    ours = replaced(theirs)
    x = torch.randn(1, S, E).expand(6000, S, E)
    with torch.no_grad():
        got, expected = ours(x), theirs(x)
    spread = ((got.var(0) + expected.var(0)) / len(x)).sqrt()
    assert ((got.mean(0) - expected.mean(0)).abs() < 6 * spread).all()
    torch.testing.assert_close(got.std(0), expected.std(0), rtol=0.2, atol=0.02)


@pytest.mark.usefixtures("own_product")
def test_dropout_follows_the_mode_of_each_module():
    ours = replaced(encoder_layer(dropout=0.9))
    x = torch.randn(B, S, E)
    assert not torch.equal(ours(x), ours(x))
    for module in ours.modules():
        if isinstance(module, nn.Dropout | nn.MultiheadAttention):
            module.eval()
    assert ours.training
    assert torch.equal(ours(x), ours(x))


def encoder(
    norm_first: bool = False, norm: bool = True, activation: str = "relu", **options
) -> nn.TransformerEncoder:
    layer = encoder_layer(norm_first=norm_first, activation=activation)
    options = {"enable_nested_tensor": not norm_first} | options
    return nn.TransformerEncoder(layer, 2, nn.LayerNorm(E) if norm else None, **options)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize(
    "mask", [None, CAUSAL, CAUSAL < 0, torch.rand(S, S)], ids=["none", "float", "bool", "bias"]
)
@pytest.mark.parametrize("padding", [None, PADDING])
def test_encoder_matches_torch(norm_first, mask, padding):
    theirs = encoder(norm_first)
    x = torch.randn(B, S, E)
    check_module(theirs, forward(mask=mask, src_key_padding_mask=padding), x)
    if mask is CAUSAL:
        check_module(theirs, forward(mask=mask, is_causal=True), x)
        check_module(theirs, forward(mask=mask), x[0])


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("padding", [PADDING, PADDING.flip(1)], ids=["right", "left"])
@pytest.mark.parametrize("form", [torch.bool, torch.float32])
@pytest.mark.parametrize("options", [{}, {"enable_nested_tensor": False}, {"mask_check": False}])
def test_evaluation_with_padding_matches_the_fast_path(norm, padding, form, options):
    if "mask_check" in options and padding[0, 0]:
        pytest.skip("torch asks for padding on the right if it must not check")
    theirs = encoder(norm=norm, **options).eval()
    ours = replaced(theirs)
    x = torch.randn(B, S, E)
    if form.is_floating_point:
        padding = torch.zeros(B, S).masked_fill(padding, -torch.inf)
    with torch.no_grad():
        expected, got = (m(x, src_key_padding_mask=padding) for m in (theirs, ours))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    got, expected = (m(x, src_key_padding_mask=padding) for m in (ours, theirs))  # with gradients
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_evaluation_without_gradients_matches_the_fast_path():
    theirs = encoder().eval()
    x = torch.randn(B, S, E)
    with torch.inference_mode():
        torch.testing.assert_close(replaced(theirs)(x), theirs(x), rtol=1e-4, atol=1e-5)


def test_nested_input_takes_the_path_of_torch():
    theirs = encoder_layer().eval()
    x = torch.nested.nested_tensor([torch.randn(3, E), torch.randn(5, E)])
    with torch.no_grad():
        got, expected = (m(x).to_padded_tensor(0.0) for m in (replaced(theirs), theirs))
    torch.testing.assert_close(got, expected)


def test_encoder_with_a_foreign_layer_is_torch_around_it():
    class Layer(nn.TransformerEncoderLayer):
        def forward(self, src, *args, **kwargs):
            return super().forward(src, *args, **kwargs) + 1

    theirs = encoder()
    theirs.layers[1].__class__ = Layer
    x = torch.randn(B, S, E)
    check_module(theirs, forward(mask=CAUSAL, src_key_padding_mask=PADDING), x)
    ours = replaced(theirs)
    with torch.no_grad():
        padded = [m.eval()(x, src_key_padding_mask=PADDING) for m in (ours, theirs)]
    torch.testing.assert_close(*padded, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm_first", [False, True])
def test_decoder_matches_torch(norm_first):
    theirs = nn.TransformerDecoder(decoder_layer(norm_first=norm_first), 2, nn.LayerNorm(E))
    x, memory = torch.randn(B, S, E), torch.randn(B, T, E)
    check_module(theirs, forward(tgt_mask=CAUSAL), x, memory)
    options = {"tgt_key_padding_mask": PADDING, "memory_key_padding_mask": PADDING[:, 1:]}
    check_module(theirs, forward(**options), x, memory)


@pytest.mark.parametrize("batch_first", [False, True])
def test_transformer_matches_torch(batch_first):
    theirs = nn.Transformer(E, H, 2, 2, FF, dropout=0.0, batch_first=batch_first)
    src, tgt = torch.randn(B, T, E), torch.randn(B, S, E)
    if not batch_first:
        src, tgt = src.transpose(0, 1), tgt.transpose(0, 1)
    options = {"tgt_mask": CAUSAL, "src_key_padding_mask": PADDING[:, 1:]}
    options["memory_key_padding_mask"] = options["src_key_padding_mask"]
    check_module(theirs, forward(**options), src, tgt)
    check_module(theirs, forward(tgt_mask=CAUSAL, tgt_is_causal=True), src, tgt)


@pytest.mark.parametrize("norm_first", [False, True])
def test_bfloat16_and_autocast(norm_first):
    theirs = encoder(norm_first, activation="gelu")  # relu flips signs near 0: no smooth error
    x = torch.randn(B, S, E)
    check_module(theirs, forward(mask=CAUSAL), x, dtype=torch.bfloat16)
    ours = replaced(theirs)
    results = {}
    for name, model in (("ours", ours), ("theirs", theirs)):
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x, mask=CAUSAL)
        gradients = torch.autograd.grad(y.square().sum(), list(model.parameters()))
        results[name] = [y, *gradients]
    for got, expected in zip(*results.values(), strict=True):
        assert got.dtype == expected.dtype
        assert (got - expected).norm() <= 0.05 * expected.norm() + 0.05


@pytest.mark.parametrize("norm_first", [False, True])
def test_encoder_compiles_whole(norm_first):
    ours = replaced(encoder(norm_first))
    x = torch.randn(B, S, E, requires_grad=True)
    options = {"mask": CAUSAL, "src_key_padding_mask": PADDING, "is_causal": True}
    compare_compiled(ours, [x], options)
    compare_compiled(ours, [x], {"mask": CAUSAL}, "inductor" if norm_first else "aot_eager")


def test_transformer_compiles_whole():
    ours = replaced(nn.Transformer(E, H, 1, 1, FF, dropout=0.0, batch_first=True))
    tensors = [torch.randn(B, T, E), torch.randn(B, S, E)]
    compare_compiled(ours, tensors, {"tgt_mask": CAUSAL, "tgt_is_causal": True})


def compare_compiled(module, tensors, options, backend="aot_eager"):
    expected = module(*tensors, **options)
    got = torch.compile(module, fullgraph=True, backend=backend)(*tensors, **options)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    parameters = list(module.parameters())
    torch.testing.assert_close(
        torch.autograd.grad(got.square().sum(), parameters),
        torch.autograd.grad(expected.square().sum(), parameters),
        rtol=1e-3,
        atol=1e-4,
    )


@pytest.mark.usefixtures("own_product")
def test_copies_and_pickles():
    ours = replaced(encoder())
    x = torch.randn(B, S, E)
    for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert [type(m) for m in copied.modules()] == [type(m) for m in ours.modules()]
        assert torch.equal(copied(x), ours(x))
