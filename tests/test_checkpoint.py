"""torch.utils.checkpoint: a recomputation runs what the forward ran, under override, in models
accelerated with functional=True, under use_backend; both kinds of checkpoint."""

import concurrent.futures
import contextlib
import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

# Bound before llmkern knows anything of it, as user code does.
from torch.utils.checkpoint import (
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
)

import llmkern

E = 16
REENTRANT = pytest.mark.parametrize("reentrant", [True, False])


class Layer(nn.Module):
    def __init__(self, dropout: float = 0.4):
        super().__init__()
        self.up, self.down = nn.Linear(E, 2 * E), nn.Linear(2 * E, E)
        self.scale = nn.Parameter(torch.ones(E))
        self.p = dropout

    def forward(self, x):
        y = F.dropout(F.gelu(self.up(F.layer_norm(x, (E,), self.scale))), self.p, self.training)
        return x + F.dropout(self.down(y), self.p, self.training)


class Model(nn.Module):
    """Checkpoints its layers as Hugging Face's models do; `how` is checkpoint with its options, or
    None for none."""

    def __init__(self, how=None, whole: bool = False):
        super().__init__()
        torch.manual_seed(7)
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.how, self.whole = how, whole

    def body(self, x):
        for layer in self.layers:
            if self.how is not None and not self.whole:
                x = self.how(layer.__call__, x)
            else:
                x = layer(x)
        return F.silu(x)

    def forward(self, x):
        if self.whole and self.how is not None:
            return self.how(self.body, x)
        return self.body(x)


def gradients(model, around=contextlib.nullcontext, backward=contextlib.nullcontext, call=None):
    """[output, gradient of x, gradients of the parameters], forward in `around`."""
    torch.manual_seed(3)
    x = torch.randn(4, 5, E, requires_grad=True)
    weights = torch.randn(4, 5, E)
    for parameter in model.parameters():
        parameter.grad = None
    torch.manual_seed(11)
    with around():
        y = model(x) if call is None else call(model, x)
    with backward():
        (y * weights).sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in model.parameters())]


def check(got, expected):
    for mine, other in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


def of(reentrant: bool, **options):
    return functools.partial(checkpoint, use_reentrant=reentrant, **options)


@REENTRANT
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("backward", [contextlib.nullcontext, llmkern.override])
def test_override(reentrant, whole, backward):
    expected = gradients(Model(), llmkern.override)
    assert not torch.equal(expected[0], gradients(Model())[0])  # other masks without it
    model = Model(of(reentrant), whole)
    check(gradients(model, llmkern.override, backward), expected)
    assert not torch.overrides._get_current_function_mode_stack()


@REENTRANT
def test_backward_inside_the_block(reentrant):
    def run(model):
        with llmkern.override():
            return gradients(model)

    check(run(Model(of(reentrant))), run(Model()))


@REENTRANT
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("where", ["inside", "outside"])
def test_functional_models(reentrant, whole, where):
    reference, model = Model(), Model(of(reentrant) if where == "inside" else None, whole)
    for m in (reference, model):
        llmkern.accelerate(m, functional=True)
    call = (lambda m, x: of(reentrant)(m, x)) if where == "outside" else None
    expected = gradients(reference)
    check(gradients(model, call=call), expected)
    copied = copy.deepcopy(model)
    check(gradients(copied, call=call), expected)


@REENTRANT
@pytest.mark.parametrize("backward", [contextlib.nullcontext, llmkern.override])
def test_what_ran_on_torch_is_recomputed_on_torch(reentrant, backward):
    model = Model(of(reentrant))
    check(gradients(model, backward=backward), gradients(Model()))


@REENTRANT
def test_regions_may_differ(reentrant):
    def call(model, x):
        first, second = model.layers
        with llmkern.override():
            x = model.how(first, x) if model.how else first(x)
        return model.how(second, x) if model.how else second(x)

    expected = gradients(Model(), call=call)
    for backward in (contextlib.nullcontext, llmkern.override):
        check(gradients(Model(of(reentrant)), backward=backward, call=call), expected)


@REENTRANT
@pytest.mark.parametrize("inner", [True, False])
def test_nested(reentrant, inner):
    class Nested(Model):
        def forward(self, x):
            return of(reentrant)(super().forward, x)

    expected = gradients(Model(), llmkern.override)
    check(gradients(Nested(of(inner)), llmkern.override), expected)


@pytest.mark.parametrize("policy", ["list", "function", "nothing"])
@pytest.mark.parametrize("functional", [False, True])
def test_selective(policy, functional):
    ops = [
        torch.ops.llmkern.linear.default,
        torch.ops.aten.mm.default,
        torch.ops.aten.addmm.default,
    ]

    def decide(ctx, op, *args, **kwargs):
        return op in ops

    def contexts():
        what = {"list": ops, "function": decide, "nothing": []}[policy]
        return create_selective_checkpoint_contexts(what)

    reference, model = Model(), Model(of(False, context_fn=contexts))
    around = llmkern.override
    if functional:
        around = contextlib.nullcontext
        for m in (reference, model):
            llmkern.accelerate(m, functional=True)
    check(gradients(model, around), gradients(reference, around))


@REENTRANT
def test_a_context_of_the_user(reentrant):
    if reentrant:
        pytest.skip("context_fn goes with use_reentrant=False only")

    entered = []

    @contextlib.contextmanager
    def noting(name):
        entered.append(name)
        yield

    model = Model(of(False, context_fn=lambda: (noting("forward"), noting("recompute"))))
    check(gradients(model, llmkern.override), gradients(Model(), llmkern.override))
    assert entered == ["forward"] * 2 + ["recompute"] * 2


@REENTRANT
def test_without_the_generator_state(reentrant):
    """Without dropout: with it, torch does not promise the same masks either."""
    how = of(reentrant, preserve_rng_state=False)
    models = Model(), Model(how)
    for model in models:
        for layer in model.layers:
            layer.p = 0.0
    check(gradients(models[1], llmkern.override), gradients(models[0], llmkern.override))


@REENTRANT
def test_sequential(reentrant):
    layers = nn.Sequential(*(Layer() for _ in range(3)))
    expected = gradients(layers, llmkern.override)

    def call(model, x):
        return checkpoint_sequential(model, 2, x, use_reentrant=reentrant)

    check(gradients(layers, llmkern.override, call=call), expected)


@REENTRANT
def test_an_override_inside_the_region(reentrant):
    def inside(layer, x):
        with llmkern.override():
            return layer(x)

    def call(model, x):
        for layer in model.layers:
            region = functools.partial(inside, layer)
            x = model.how(region, x) if model.how else region(x)
        return x

    check(gradients(Model(of(reentrant)), call=call), gradients(Model(), call=call))


@REENTRANT
def test_backward_in_another_thread(reentrant):
    def run(model):
        torch.manual_seed(3)
        x = torch.randn(4, 5, E, requires_grad=True)
        torch.manual_seed(11)
        with llmkern.override():
            loss = model(x).square().sum()
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            pool.submit(loss.backward).result()
        return [x.grad, *(p.grad for p in model.parameters())]

    check(run(Model(of(reentrant))), run(Model()))


@REENTRANT
def test_an_error_in_the_recomputation_leaves_no_mode(reentrant):
    def failing(x):
        calls.append(1)
        if len(calls) > 1:
            raise KeyError("second time")
        return F.gelu(x)

    calls = []
    with llmkern.override():
        y = of(reentrant)(failing, torch.randn(3, E, requires_grad=True))
    with pytest.raises(KeyError, match="second time"):
        y.sum().backward()
    assert not torch.overrides._get_current_function_mode_stack()
    calls.clear()
    with llmkern.override():
        y = of(reentrant)(failing, torch.randn(3, E, requires_grad=True))
    with llmkern.override(), pytest.raises(KeyError, match="second time"):
        y.sum().backward()
    assert not torch.overrides._get_current_function_mode_stack()


@REENTRANT
def test_other_modes_stay(reentrant):
    class Names(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            names.append(getattr(func, "__name__", str(func)))
            return func(*args, **(kwargs or {}))

    names = []
    with llmkern.override():
        y = of(reentrant)(lambda x: F.gelu(x).softmax(-1), torch.randn(3, E, requires_grad=True))
    with Names():
        assert len(torch.overrides._get_current_function_mode_stack()) == 1
        torch.autograd.backward(y.sum())
        assert len(torch.overrides._get_current_function_mode_stack()) == 1


@REENTRANT
def test_the_backend_that_was_named(reentrant):
    model = llmkern.nn.TransformerEncoderLayer(E, 2, 32, 0.3, batch_first=True)
    reference = functools.partial(llmkern.use_backend, "reference")
    expected = gradients(model, reference, reference)
    with llmkern.dispatch.recording() as records:
        got = gradients(model, reference, call=lambda m, x: of(reentrant)(m, x))
    check(got, expected)
    forwards = [op for op, spec, decision in records if decision.backend == "reference"]
    assert len(forwards) >= 2 * len([op for op in forwards if op == "attention"]) > 0


@REENTRANT
def test_a_default_device_stays(reentrant):
    def around():
        stack = contextlib.ExitStack()
        stack.enter_context(torch.device("cpu"))
        stack.enter_context(llmkern.override())
        return stack

    check(gradients(Model(of(reentrant)), around), gradients(Model(), around))


def test_regions_of_composable_checkpoint():
    composable = pytest.importorskip("torch.distributed._composable")
    model = Model()
    for layer in model.layers:
        composable.checkpoint(layer)
    check(gradients(model, llmkern.override), gradients(Model(), llmkern.override))


@pytest.mark.parametrize("functional", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_compiles(functional, whole):
    def run(model, call=None):
        if functional:
            llmkern.accelerate(model, functional=True)
        around = contextlib.nullcontext if functional else llmkern.override
        return gradients(model, around, call=call)

    def models():
        for how in (None, of(False)):
            model = Model(how, whole)
            for layer in model.layers:
                layer.p = 0.0
            yield model

    plain, model = models()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    check(run(model, call=lambda _, x: compiled(x)), run(plain))


@REENTRANT
def test_compiled_inside_a_region(reentrant):
    model = Model()
    llmkern.accelerate(model, functional=True)
    for layer in model.layers:
        layer.p = 0.0
    expected = gradients(model)
    for layer in model.layers:
        layer.compile(backend="aot_eager")
    model.how = of(reentrant)
    check(gradients(model), expected)


@pytest.mark.parametrize("enter", [llmkern.override, lambda: llmkern.use_backend("reference")])
def test_an_unknown_checkpoint_is_warned_of(enter, monkeypatch):
    monkeypatch.setattr(llmkern.recompute, "checkpoint_known", False)
    with pytest.warns(RuntimeWarning, match="recomputation runs outside it"):
        with enter():
            pass
