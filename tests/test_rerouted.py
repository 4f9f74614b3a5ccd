"""accelerate(functional=True): a call of any module of the model is rerouted, whoever else changes
the model before or after."""

import contextlib
import copy
import functools
import inspect
import pickle
import types

import pytest
import torch
import torch.nn.functional as F
from models import NanoGPT
from torch import nn
from torch.nn.utils import parametrizations

import llmkern

E, S = 16, 6
X = torch.randn(2, S, E)


class Tower(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(E, E))

    def forward(self, x):
        return F.gelu(F.linear(x, self.weight))


class Gated(nn.Linear):
    def forward(self, x):
        return F.silu(super().forward(x))


class Clip(nn.Module):
    """Methods beside forward that call modules, as training_step and get_image_features do."""

    def __init__(self):
        super().__init__()
        self.image, self.text = Tower(), nn.Sequential(Tower(), Gated(E, E))

    def forward(self, x):
        return F.layer_norm(self.image(x) + self.text(x), (E,))

    def get_image_features(self, x):
        return self.image(x)

    def training_step(self, x):
        return self(x).square().mean()


@pytest.mark.parametrize(
    ("call", "served"),
    [
        (lambda m: m(X), {"linear": 3, "gelu": 2, "silu": 1, "layer_norm": 1}),
        (lambda m: m.forward(X), {"linear": 3, "gelu": 2, "silu": 1, "layer_norm": 1}),
        (lambda m: m.training_step(X), {"linear": 3, "gelu": 2, "silu": 1, "layer_norm": 1}),
        (lambda m: m.get_image_features(X), {"linear": 1, "gelu": 1}),
        (lambda m: m.image(X), {"linear": 1, "gelu": 1}),
        (lambda m: m.image.forward(X), {"linear": 1, "gelu": 1}),
        (lambda m: m.text(X), {"linear": 2, "gelu": 1, "silu": 1}),
        (lambda m: m.text[1](X), {"linear": 1, "silu": 1}),
        (lambda m: copy.deepcopy(m.text)(X), {}),  # a copy counts for itself
    ],
)
def test_any_call_of_a_module_counts(call, served):
    model = Clip()
    expected = call(model)
    report = llmkern.accelerate(model, functional=True)
    torch.testing.assert_close(call(model), expected, rtol=1e-4, atol=1e-5)
    assert report.rerouting.served == served and not report.rerouting.declined
    assert not report.rerouting.is_on()
    report.undo()
    assert torch.equal(call(model), expected)
    assert [type(m) for m in model.modules()] == [type(m) for m in Clip().modules()]


def test_a_copy_of_a_part_is_rerouted():
    model = Clip()
    report = llmkern.accelerate(model, functional=True)
    for part in (copy.deepcopy(model.image), pickle.loads(pickle.dumps(model.image))):
        part(X)
        assert part.__dict__["_llmkern_rerouting"].served == {"linear": 1, "gelu": 1}
    assert not report.rerouting.served


def test_modules_that_come_later_are_rerouted_by_the_next_call():
    model = Clip()
    first = llmkern.accelerate(model, functional=True)
    model.image = Tower()
    second = llmkern.accelerate(model, functional=True)
    assert second.rerouting is first.rerouting
    model.image(X)
    assert first.rerouting.served["gelu"] == 1
    second.undo()
    assert type(model.image) is Tower and type(model.text[0]) is not Tower


@pytest.mark.parametrize("what", ["model", "image"])
def test_parts_and_models_compile_whole(what):
    model = Clip()
    report = llmkern.accelerate(model, functional=True)
    part = model if what == "model" else model.image
    expected = part(X)
    counted = sum(report.rerouting.served.values())
    got = torch.compile(part, fullgraph=True, backend="aot_eager")(X)
    torch.testing.assert_close(got, expected)
    assert sum(report.rerouting.served.values()) == 2 * counted
    part.compile(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(part(X), expected)


def test_many_parts_compile_without_reaching_a_limit():
    classes = [type(f"Tower{i}", (Tower,), {}) for i in range(12)]
    model = nn.Sequential(*(cls() for cls in classes))
    llmkern.accelerate(model, functional=True)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for part in model:
            torch.compile(part, fullgraph=True, backend="aot_eager")(X)


# What Hugging Face's Accelerator.prepare(mixed_precision="bf16") does to a model, and its
# extract_model_from_parallel(keep_fp32_wrapper=False).
def prepare(model: nn.Module) -> None:
    def converted(function):
        @functools.wraps(function)
        def forward(*args, **kwargs):
            return function(*args, **kwargs).float()

        return forward

    model._original_forward = model.forward
    autocast = torch.autocast("cpu", torch.bfloat16)(model.forward.__func__)
    model.forward = types.MethodType(autocast, model)
    model.forward = types.MethodType(converted(model.forward.__func__), model)


def extract(model: nn.Module) -> None:
    forward = model.forward
    original = model.__dict__.pop("_original_forward")
    while hasattr(forward, "__wrapped__"):
        forward = forward.__wrapped__
        if forward == original:
            break
    model.forward = types.MethodType(forward, model)


def check_close(got, expected):
    torch.testing.assert_close(got, expected, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("first", ["prepare", "accelerate"])
def test_a_prepared_model_is_accelerated_and_undone(first, copied):
    model = Clip()
    expected = model(X)
    if first == "prepare":
        prepare(model)
    report = llmkern.accelerate(model, functional=True)
    assert {left.name for left in report.left} <= {"", "image", "text.0", "text.1"}
    if first == "accelerate":
        prepare(model)
    if copied:
        twin = copy.deepcopy(model)
        check_close(twin(X), expected)
        assert twin.__dict__["_llmkern_rerouting"].served["layer_norm"] == 1
    assert not report.rerouting.served
    check_close(model(X), expected)
    assert report.rerouting.served == {"linear": 3, "gelu": 2, "silu": 1, "layer_norm": 1}
    report.undo()
    check_close(model(X), expected)
    assert report.rerouting.served["layer_norm"] == 1 and type(model) is Clip
    again = llmkern.accelerate(model, functional=True)
    extract(model)
    torch.testing.assert_close(model(X), expected, rtol=1e-4, atol=1e-5)
    assert again.rerouting.served["layer_norm"] == 1
    again.undo()
    assert torch.equal(model(X), expected)


ROOTS = {
    "linear": lambda: nn.Linear(E, E),
    "attention": lambda: nn.MultiheadAttention(E, 2, batch_first=True),
    "encoder layer": lambda: nn.TransformerEncoderLayer(E, 2, 32, 0.0, batch_first=True),
    "decoder layer": lambda: nn.TransformerDecoderLayer(E, 2, 32, 0.0, batch_first=True),
    "encoder": lambda: nn.TransformerEncoder(
        nn.TransformerEncoderLayer(E, 2, 32, 0.0, batch_first=True), 1, enable_nested_tensor=False
    ),
    "decoder": lambda: nn.TransformerDecoder(
        nn.TransformerDecoderLayer(E, 2, 32, 0.0, batch_first=True), 1
    ),
    "transformer": lambda: nn.Transformer(E, 2, 1, 1, 32, 0.0, batch_first=True),
    "layer norm": lambda: nn.LayerNorm(E),
    "rms norm": lambda: nn.RMSNorm(E),
    "gelu": lambda: nn.GELU(),
    "dropout": lambda: nn.Dropout(0.0),
    "out projection": lambda: nn.modules.linear.NonDynamicallyQuantizableLinear(E, E),
}


@pytest.mark.parametrize("functional", [False, True])
@pytest.mark.parametrize("name", ROOTS)
def test_a_forward_kept_by_others_works_after_undo(name, functional):
    model = ROOTS[name]()
    count = {"attention": 3, "decoder layer": 2, "decoder": 2, "transformer": 2}.get(name, 1)
    expected = model(*[X] * count)
    before = [type(module) for module in model.modules()]
    report = llmkern.accelerate(model, functional=functional)
    model.forward = types.MethodType(model.forward.__func__, model)
    torch.testing.assert_close(model(*[X] * count), expected, rtol=1e-4, atol=1e-5)
    report.undo()
    assert [type(module) for module in model.modules()] == before
    torch.testing.assert_close(model(*[X] * count), expected, rtol=1e-4, atol=1e-5)
    odd = (X.double(),) * count  # what a kernel does not take together with float32 weights
    with contextlib.suppress(RuntimeError):
        model(*odd)


def test_a_forward_set_on_the_instance_is_rerouted():
    model = NanoGPT()
    model.forward = functools.partial(NanoGPT.forward, model)
    idx = torch.randint(0, 50, (2, S))
    expected = model(idx)
    report = llmkern.accelerate(model, functional=True)
    torch.testing.assert_close(model(idx), expected, rtol=1e-4, atol=1e-5)
    assert report.rerouting.served["linear"] == 1


def test_classes_that_keep_a_register_are_not_told():
    class Registered(nn.Module):
        known: dict = {}

        def __init_subclass__(cls, *, key, **options):
            super().__init_subclass__(**options)
            Registered.known[key] = cls

    class Mine(Registered, key="mine"):
        def forward(self, x):
            return F.gelu(x)

    model = Mine()
    report = llmkern.accelerate(model, functional=True)
    model(X)
    assert report.rerouting.served == {"gelu": 1} and Registered.known == {"mine": Mine}
    report.undo()
    assert type(model) is Mine


def test_what_cannot_be_rerouted_is_listed():
    scripted = torch.jit.script(nn.Linear(E, E))
    parametrized = parametrizations.weight_norm(Gated(E, E))

    class Final(type):
        def __new__(cls, name, bases, body):
            if any(isinstance(b, Final) for b in bases):
                raise TypeError("no more")
            return super().__new__(cls, name, bases, body)

    class Alone(nn.Module, metaclass=Final):
        def forward(self, x):
            return F.relu(x)

    traced = torch.fx.symbolic_trace(Tower())
    model = nn.Sequential(scripted, parametrized, Alone(), traced)
    report = llmkern.accelerate(model, functional=True)
    reasons = [left.reason for left in report.left if "not rerouted" in left.reason]
    assert reasons == [
        "calls in it are not rerouted: compiled by torch.jit",
        "calls in it are not rerouted: parametrized",
        "calls in it are not rerouted: its class has no subclass: no more",
        "calls in it are not rerouted: torch.fx writes its class anew; "
        "with llmkern.override() around a call they are",
    ]
    traced.recompile()
    model(X)
    assert (
        report.rerouting.served["relu"] == report.rerouting.served["gelu"] == 1
    )  # inside the model it is


def test_undo_after_another_change_of_class_reroutes_no_more():
    model = Clip()
    report = llmkern.accelerate(model, functional=True)
    parametrizations.weight_norm(model.image)
    report.undo()
    model.image(X)
    assert not report.rerouting.served


def test_signatures_stay():
    model = Clip()
    llmkern.accelerate(model, functional=True)
    for ours, theirs in zip(model.modules(), Clip().modules(), strict=True):
        assert inspect.signature(ours.forward) == inspect.signature(theirs.forward)
        assert inspect.signature(ours) == inspect.signature(theirs)
        assert type(ours).__name__ == type(theirs).__name__ and isinstance(ours, nn.Module)
