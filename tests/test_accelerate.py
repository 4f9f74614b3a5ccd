"""accelerate(model): what is replaced, what is left, and that everything else goes on."""

import copy
import gc
import inspect
import io
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from models import MyAttention, MyLinear, NanoGPT
from torch import nn
from torch.nn.utils import parametrizations

import llmkern
from llmkern.errors import ArgumentError
from llmkern.nn import REPLACEMENTS

E, H, S, B = 16, 2, 6, 3


def transformer(**options) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(E, H, 32, dropout=0.0, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 2, nn.LayerNorm(E))


def types(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


def test_every_torch_module_is_replaced_and_comes_back():
    model = nn.Sequential(
        transformer(),
        nn.Linear(E, E),
        nn.GELU(),
        nn.ReLU(),
        nn.SiLU(),
        nn.RMSNorm(E),
        nn.Dropout(0.0),
    )
    x = torch.randn(B, S, E)
    before, expected = types(model), model(x)
    report = llmkern.accelerate(model)
    assert not any(t in REPLACEMENTS for t in types(model))
    assert not report.left
    assert len(report.replaced) == len(before) - 2  # Sequential and ModuleList
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    report.undo()
    assert types(model) == before
    torch.testing.assert_close(model(x), expected)
    report.undo()
    assert types(model) == before


def test_the_model_itself_is_replaced():
    model = nn.Transformer(E, H, 1, 1, 32)
    report = llmkern.accelerate(model)
    assert type(model) is llmkern.nn.Transformer
    assert report.replaced[0] == ("", nn.Transformer, llmkern.nn.Transformer)


def test_report_is_a_context_manager():
    model = transformer()
    before = types(model)
    with pytest.raises(KeyError), llmkern.accelerate(model) as report:
        assert report.replaced and types(model) != before
        raise KeyError
    assert types(model) == before


def test_twice_is_as_once():
    model = transformer()
    before = types(model)
    first = llmkern.accelerate(model)
    accelerated = types(model)
    second = llmkern.accelerate(model)
    assert not second.replaced and not second.left
    second.undo()
    assert types(model) == accelerated
    first.undo()
    assert types(model) == before


def test_shared_modules_are_replaced_once():
    shared = nn.Linear(E, E)
    model = nn.ModuleList([shared, nn.Sequential(shared, nn.ReLU()), shared])
    report = llmkern.accelerate(model)
    assert [r.name for r in report.replaced] == ["0", "1.1"]
    assert type(model[1][0]) is llmkern.nn.Linear
    report.undo()
    assert type(shared) is nn.Linear


def test_unknown_classes_are_left_alone_with_the_reason():
    model = nn.ModuleDict(
        {
            "attention": MyAttention(E, H),
            "linear": MyLinear(E, E),
            "lazy": nn.LazyLinear(E),
            "embedding": nn.Embedding(5, E),
            "parametrized": parametrizations.weight_norm(nn.Linear(E, E)),
            "scripted": torch.jit.script(nn.Linear(E, E)),
            "gpt": NanoGPT(),
        }
    )
    patched = nn.Linear(E, E)
    patched.forward = lambda x: x
    model["patched"] = patched
    before = {name: type(module) for name, module in model.items()}
    report = llmkern.accelerate(model)
    assert {name: type(module) for name, module in model.items()} == before
    reasons = {left.name: left.reason for left in report.left}
    assert reasons["attention"] == (
        "a subclass of torch.nn.MultiheadAttention, with its own forward"
    )
    assert reasons["linear"] == "a subclass of torch.nn.Linear, not known here"
    assert reasons["lazy"].startswith("a subclass of torch.nn.Linear")
    assert reasons["embedding"] == "no kernel for it"
    assert reasons["parametrized"] == "parametrized"
    assert reasons["scripted"] == "compiled by torch.jit"
    assert reasons["patched"] == "its forward is set on the instance"
    assert reasons["gpt"] == "runs its own forward"
    assert "1 x MyAttention left: a subclass of torch.nn.MultiheadAttention" in str(report)


def test_weights_with_rules_of_their_own_are_left_alone():
    class Quantised(torch.Tensor):
        pass

    linear = nn.Linear(E, E)
    weight = linear.weight.detach().as_subclass(Quantised)
    linear.weight = nn.Parameter(weight)
    report = llmkern.accelerate(linear)
    assert type(linear) is nn.Linear
    assert report.left[0].reason == "its weight is a Quantised"


def test_exclusion_by_name_and_by_type():
    model = transformer()
    report = llmkern.accelerate(model, exclude=["layers.1", nn.LayerNorm])
    assert type(model.layers[0].linear1) is llmkern.nn.Linear
    assert type(model.layers[1]) is nn.TransformerEncoderLayer
    assert type(model.layers[1].linear1) is nn.Linear
    assert type(model.norm) is nn.LayerNorm
    assert {left.reason for left in report.left} == {"excluded"}


def test_parameters_mode_hooks_and_state_stay():
    model = transformer().eval()
    calls = []
    model.layers[0].linear1.register_forward_hook(lambda *_: calls.append("hook"))
    parameters = dict(model.named_parameters())
    keys = list(model.state_dict())
    llmkern.accelerate(model)
    assert not any(module.training for module in model.modules())
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert list(model.state_dict()) == keys
    model(torch.randn(B, S, E))
    assert calls == ["hook"]
    model.to(torch.float64)
    assert model(torch.randn(B, S, E).double()).dtype == torch.float64


@pytest.mark.parametrize("norm_first", [False, True])
def test_optimizer_made_before_trains_the_accelerated_model(norm_first):
    torch.manual_seed(0)
    theirs = transformer(norm_first=norm_first)
    ours = copy.deepcopy(theirs)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-3, eps=1e-4) for m in (theirs, ours)]
    llmkern.accelerate(ours)
    x = torch.randn(B, S, E)
    for _ in range(4):
        losses = []
        for model, optimizer in zip((theirs, ours), optimizers, strict=True):
            optimizer.zero_grad()
            losses.append((model(x) - x).square().mean())
            losses[-1].backward()
            optimizer.step()
        torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-6)
    for p, q in zip(theirs.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("functional", [False, True])
def test_copies_pickles_and_saves(functional):
    model = NanoGPT()
    llmkern.accelerate(model, functional=functional)
    idx = torch.randint(0, 50, (2, S))
    expected = model(idx)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies = (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(buffer, weights_only=False),
    )
    for copied in copies:
        assert types(copied) == types(model)
        torch.testing.assert_close(copied(idx), expected)
    fresh = NanoGPT()
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(fresh(idx), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("functional", [False, True])
def test_exclusion_of_one_name_or_type(functional):
    model = nn.Sequential(nn.ModuleDict({"head": nn.Linear(E, E)}), nn.GELU(), nn.Linear(E, E))
    model.tied = model[2]  # "2", which a walk over modules names first, is it too
    for exclude, left in (("0.head", {"0.head"}), ("tied", {"2"}), (nn.Linear, {"0.head", "2"})):
        with llmkern.accelerate(model, functional=functional, exclude=exclude) as report:
            assert {entry.name for entry in report.left} == left
            assert all(type(model.get_submodule(name)) is nn.Linear for name in left)
            assert type(model[1]) is llmkern.nn.GELU


@pytest.mark.parametrize(
    ("exclude", "message"),
    [
        ("layers.0.linaer1", r"no module is named 'layers.0.linaer1'; near it: layers.0.linear1"),
        (["norm", "linear2"], r"named 'linear2'; near it: .*layers.0.linear2"),
        ("LayerNorm", "named 'LayerNorm'; .* give the class itself, torch.nn.LayerNorm"),
        ("qqq", "named 'qqq'$"),
        ([3], "must hold names of modules and module classes, got a int: 3"),
    ],
)
def test_an_exclusion_of_nothing_is_an_error(exclude, message):
    model = transformer()
    before = types(model)
    with pytest.raises(ArgumentError, match=message):
        llmkern.accelerate(model, exclude=exclude)
    assert types(model) == before


def test_names_for_exclusion_are_those_of_the_model_that_is_compiled():
    model = transformer()
    with llmkern.accelerate(torch.compile(model), exclude=["layers.1", "_orig_mod.norm"]):
        assert type(model.layers[1].linear1) is nn.Linear and type(model.norm) is nn.LayerNorm
        assert type(model.layers[0].linear1) is llmkern.nn.Linear


def test_functional_reroutes_while_forward_runs():
    model = NanoGPT()
    idx = torch.randint(0, 50, (2, S))
    expected = model(idx)
    report = llmkern.accelerate(model, functional=True)
    assert isinstance(model, NanoGPT) and type(model).__name__ == "NanoGPT"
    assert inspect.signature(model.forward) == inspect.signature(NanoGPT().forward)
    torch.testing.assert_close(model(idx), expected, rtol=1e-4, atol=1e-5)
    served = dict(report.rerouting.served)
    assert served == {"layer_norm": 5, "scaled_dot_product_attention": 2, "gelu": 2, "linear": 1}
    F.layer_norm(torch.randn(3, 4), (4,))
    assert dict(report.rerouting.served) == served
    again = llmkern.accelerate(model, functional=True)
    assert again.rerouting is report.rerouting
    again.undo()
    model(idx)
    assert report.rerouting.served["gelu"] == 4
    assert "rerouted: 10 x layer_norm" in str(report)
    report.undo()
    assert type(model) is NanoGPT and "_llmkern_rerouting" not in model.__dict__
    torch.testing.assert_close(model(idx), expected)


@pytest.mark.parametrize("first_undone", [0, 1])
def test_reports_are_undone_in_any_order(first_undone):
    model = transformer()
    before = types(model)
    reports = [llmkern.accelerate(model), llmkern.accelerate(model, functional=True)]
    reports.pop(first_undone).undo()
    assert types(model) != before
    reports.pop().undo()
    assert types(model) == before


def test_undo_leaves_what_somebody_else_has_changed():
    model = transformer()
    report = llmkern.accelerate(model)
    parametrizations.weight_norm(model.layers[0].linear1)
    changed = type(model.layers[0].linear1)
    report.undo()
    assert type(model.layers[0].linear1) is changed
    assert type(model.layers[1].linear1) is nn.Linear


def test_report_does_not_keep_the_model():
    model = transformer()
    report = llmkern.accelerate(model, functional=True)
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None
    report.undo()


@pytest.mark.parametrize("functional", [False, True])
def test_compiles_whole(functional):
    model = NanoGPT()
    idx = torch.randint(0, 50, (2, S))
    expected = model(idx)
    report = llmkern.accelerate(model, functional=functional)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    got = compiled(idx)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    got.square().mean().backward()
    if functional:
        assert {"layer_norm", "scaled_dot_product_attention", "gelu"} <= set(
            report.rerouting.served
        )
        counts = dict(report.rerouting.served)
        compiled(idx)
        assert counts == dict(report.rerouting.served)  # not traced again
    report.undo()
    torch.testing.assert_close(compiled(idx), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mask", [None, torch.zeros(8, S, S)], ids=["no mask", "mask of a head"])
def test_modules_of_torch_compile_whole_in_a_rerouted_model(mask):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            layer = nn.TransformerDecoderLayer(E, 4, 16, dropout=0.0, batch_first=True)
            self.decoder = nn.TransformerDecoder(layer, 1)

        def forward(self, x):
            y = F.scaled_dot_product_attention(*[x[None, :, None]] * 3)[0, :, 0]
            return F.silu(self.decoder(x, y, tgt_mask=mask))

    model, x = Model(), torch.randn(2, S, E)
    expected = model(x)
    llmkern.accelerate(model, functional=True)
    got = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_compiled_model_is_accelerated():
    model = NanoGPT()
    idx = torch.randint(0, 50, (2, S))
    compiled = torch.compile(model, backend="aot_eager")
    expected = compiled(idx)
    with llmkern.accelerate(compiled, functional=True) as report:
        torch.testing.assert_close(compiled(idx), expected, rtol=1e-4, atol=1e-5)
        assert report.rerouting.served["layer_norm"]
    torch.testing.assert_close(compiled(idx), expected)
