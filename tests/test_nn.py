"""LayerNorm, RMSNorm, Linear, Dropout and activations as modules, and what all modules share."""

import copy
import inspect
import itertools
import pickle

import pytest
import torch
from modules import check_module, replaced
from rule import check_rule
from torch import nn
from torch.nn.utils import parametrize

import llmkern
from llmkern.errors import ArgumentError, ShapeError
from llmkern.nn import REPLACEMENTS

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
LEAVES = {
    "layer_norm": lambda: nn.LayerNorm(24),
    "layer_norm_2d": lambda: nn.LayerNorm((3, 24), eps=1e-3),
    "layer_norm_plain": lambda: nn.LayerNorm(24, elementwise_affine=False),
    "layer_norm_no_bias": lambda: nn.LayerNorm(24, bias=False),
    "rms_norm": lambda: nn.RMSNorm(24),
    "rms_norm_plain": lambda: nn.RMSNorm(24, eps=1e-4, elementwise_affine=False),
    "linear": lambda: nn.Linear(24, 17),
    "linear_no_bias": lambda: nn.Linear(24, 17, bias=False),
    "relu": lambda: nn.ReLU(),
    "gelu": lambda: nn.GELU(),
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "silu": lambda: nn.SiLU(),
    "dropout": lambda: nn.Dropout(0.0),
}


def randomised(module: nn.Module) -> nn.Module:
    """Parameters away from their initial ones and zeros, which hide mistakes."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return module


@pytest.mark.parametrize("name", LEAVES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_leaf_module_matches_torch(name, dtype):
    theirs = randomised(LEAVES[name]())
    x = torch.randn(5, 3, 24)
    check_module(theirs, lambda m, x: m(x), x, dtype=dtype)
    check_module(theirs.eval(), lambda m, x: m(x), x, dtype=dtype)


@pytest.mark.parametrize("name", LEAVES)
def test_leaf_module_compiles_whole(name):
    ours = replaced(randomised(LEAVES[name]()))
    x = torch.randn(2, 3, 24, requires_grad=True)
    y = torch.compile(ours, fullgraph=True, backend="aot_eager")(x)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    (expected,) = torch.autograd.grad(ours(x).sum(), x)
    torch.testing.assert_close(y, ours(x))
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("theirs", REPLACEMENTS, ids=lambda t: t.__name__)
def test_replacement_has_the_constructor_of_torch(theirs):
    ours = REPLACEMENTS[theirs]
    assert issubclass(ours, theirs)
    expected = inspect.signature(theirs).parameters
    got = inspect.signature(ours).parameters
    assert list(got)[: len(expected)] == list(expected)
    added = list(got.values())[len(expected) :]
    assert all(p.kind is p.KEYWORD_ONLY and p.default is not p.empty for p in added)
    assert [p.default for p in expected.values()] == [got[k].default for k in expected]


@pytest.mark.parametrize(
    "make",
    [
        lambda n: n.Linear(8, 4),
        lambda n: n.LayerNorm(8),
        lambda n: n.RMSNorm(8),
        lambda n: n.MultiheadAttention(8, 2, add_bias_kv=True),
        lambda n: n.MultiheadAttention(8, 2, kdim=5, vdim=6),
        lambda n: n.TransformerEncoderLayer(8, 2, 16),
        lambda n: n.TransformerDecoderLayer(8, 2, 16),
        lambda n: n.TransformerEncoder(n.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2),
        lambda n: n.Transformer(8, 2, 1, 1, 16),
    ],
)
def test_state_dict_goes_both_ways(make):
    theirs, ours = make(nn), make(llmkern.nn)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value)
    make(nn).load_state_dict(ours.state_dict())


@pytest.mark.parametrize("cls", list(REPLACEMENTS.values()), ids=lambda t: t.__name__)
def test_replacement_adds_no_state(cls):
    """What makes a change of __class__ enough, in both directions."""
    assert cls.__setstate__ is cls.__mro__[1].__setstate__
    assert "__slots__" not in cls.__dict__


def test_constructed_modules_hold_llmkern_submodules():
    model = llmkern.nn.Transformer(8, 2, 1, 1, 16)
    left = [type(m) for m in model.modules() if type(m) in REPLACEMENTS]
    assert not left


def test_custom_encoder_of_transformer_stays_as_given():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 1)
    model = llmkern.nn.Transformer(8, 2, 1, 1, 16, custom_encoder=encoder)
    assert model.encoder is encoder
    assert type(encoder) is nn.TransformerEncoder
    assert type(encoder.layers[0].linear1) is nn.Linear
    assert type(model.decoder) is llmkern.nn.TransformerDecoder


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu"])
def test_linear_with_fused_activation(activation):
    ours = llmkern.nn.Linear(24, 17, activation=activation)
    functions = {
        "relu": nn.ReLU(),
        "gelu": nn.GELU(),
        "gelu_tanh": nn.GELU("tanh"),
        "silu": nn.SiLU(),
    }
    plain = nn.Linear(24, 17)
    plain.load_state_dict(ours.state_dict())
    theirs = nn.Sequential(plain, functions[activation])
    x = torch.randn(6, 24)
    y, gradients = ours(x), torch.autograd.grad(ours(x).sum(), [ours.weight, ours.bias])
    exact = copy.deepcopy(theirs).double()
    check_rule("output", y, theirs(x), exact(x.double()))
    wanted = torch.autograd.grad(theirs(x).sum(), list(theirs.parameters()))
    best = torch.autograd.grad(exact(x.double()).sum(), list(exact.parameters()))
    for got, reference, true in zip(gradients, wanted, best, strict=True):
        check_rule("gradient", got, reference, true)
    assert f"activation={activation}" in repr(ours)
    assert pickle.loads(pickle.dumps(ours)).fused_activation == activation
    sparse = torch.randn(6, 24).relu().to_sparse()
    torch.testing.assert_close(ours(sparse), theirs(sparse))


def test_linear_names_an_unknown_activation():
    with pytest.raises(ArgumentError, match="activation must be None or one of .*, got 'tanhh'"):
        llmkern.nn.Linear(4, 4, activation="tanhh")


def test_dropout_drops_and_scales():
    dropout = llmkern.nn.Dropout(0.25)
    x = torch.ones(64, 257, requires_grad=True)
    y = dropout(x)
    kept = y != 0
    assert abs(kept.float().mean().item() - 0.75) < 0.02
    torch.testing.assert_close(y[kept], torch.full_like(y[kept], 4 / 3))
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(gradient, y.detach())
    torch.manual_seed(3)
    first = dropout(x)
    torch.manual_seed(3)
    assert torch.equal(first, dropout(x))
    assert dropout.eval()(x) is x


def test_inplace_modules_write_in_place():
    for theirs in (nn.ReLU(inplace=True), nn.SiLU(inplace=True), nn.Dropout(1.0, inplace=True)):
        x = torch.randn(9, 7)
        y = replaced(theirs)(x)
        assert y.data_ptr() == x.data_ptr()
        assert torch.equal(x, y)


@pytest.mark.parametrize(
    "x",
    [
        torch.arange(-3, 3),
        torch.randn(4, 5).to_sparse(),
        torch.nested.nested_tensor([torch.randn(2, 5), torch.randn(3, 5)], layout=torch.jagged),
        torch.randn(4, 5, device="meta"),
    ],
    ids=["integers", "sparse", "nested", "meta"],
)
def test_tensors_without_a_kernel_go_to_torch(x):
    y, expected = replaced(nn.ReLU())(x), nn.ReLU()(x)
    assert type(y) is type(expected) and y.layout == expected.layout and y.device == x.device


@pytest.mark.parametrize("dtypes", itertools.product(DTYPES, DTYPES), ids=str)
def test_norms_take_the_dtypes_that_torchs_take(dtypes):
    for theirs in (nn.LayerNorm(8), nn.RMSNorm(8)):
        x = torch.randn(3, 8).to(dtypes[0])
        theirs.to(dtypes[1])
        try:
            expected = theirs(x)
        except RuntimeError:
            continue
        torch.testing.assert_close(replaced(theirs)(x), expected)


@pytest.mark.parametrize("theirs", [nn.Linear(8, 8), nn.LayerNorm(8), nn.RMSNorm(8)])
def test_a_parametrized_weight_is_computed_once_a_call(theirs):
    """Some do more than compute: spectral_norm takes a step of its iteration."""

    class Counted(nn.Module):
        calls = 0

        def forward(self, weight):
            self.calls += 1
            return 2 * weight

    ours = replaced(theirs)
    counted = Counted()
    parametrize.register_parametrization(ours, "weight", counted)
    before = counted.calls
    ours(torch.randn(3, 8))
    assert counted.calls == before + 1


def test_modules_trace_to_torch_operators():
    ours = replaced(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.GELU()))
    x = torch.randn(3, 4)
    traced = torch.jit.trace(ours, x)
    assert "llmkern::" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(2 * x), ours(2 * x))


def test_autocast_gives_the_dtypes_of_torch():
    for theirs in (nn.Linear(8, 8), nn.LayerNorm(8), nn.RMSNorm(8), nn.GELU(), nn.Dropout(0.5)):
        x = torch.randn(3, 8)
        with torch.autocast("cpu", torch.bfloat16):
            expected, got = theirs(x), replaced(theirs)(x)
            expected_half = theirs(x.bfloat16()) if not list(theirs.parameters()) else None
            got_half = replaced(theirs)(x.bfloat16()) if expected_half is not None else None
        assert got.dtype == expected.dtype, theirs
        assert expected_half is None or got_half.dtype == expected_half.dtype, theirs
        if not isinstance(theirs, nn.Dropout):
            torch.testing.assert_close(got.float(), expected.float(), rtol=2e-2, atol=2e-2)


def test_linear_blames_its_input():
    module = nn.Sequential(llmkern.nn.Linear(3, 4))
    with pytest.raises(ShapeError, match=r"input's last dim must be 3 .* got \[2, 5\]"):
        module(torch.randn(2, 5))
