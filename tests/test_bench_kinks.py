"""The correctness gate over a ReLU: rounding may choose the branch of a unit at 0, nothing else."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import llmkern.functional as LF
from llmkern.backends.cpu import linear as cpu_linear
from llmkern.bench import gate, kinks, registry
from llmkern.bench.cases.kernel import kernel_case
from llmkern.bench.cases.modules import WEIGHT_SEED, Model, module_case, transformer
from llmkern.bench.cases.pointwise import activation
from llmkern.bench.registry import Cost

ROWS, IN, OUT = 33, 64, 72
ROW, UNIT = 5, 7  # where a pre-activation is put next to 0
CPU = torch.device("cpu")


def verdict_of(case):
    return gate.check(case, registry.inputs_of(case, CPU))


def linear_relu(ours, *, at, dtype=torch.float32):
    """relu(x W^T + b), whose pre-activation of (ROW, UNIT) is `at` in any dtype."""

    def make(m):
        tensors = {
            "x": m.normal(ROWS, IN),
            "weight": m.weight(OUT, IN),
            "bias": m.normal(OUT, scale=0.1),
            "dy": m.normal(ROWS, OUT),
        }
        tensors["x"][ROW] = 0
        tensors["x"][ROW, 0] = at
        tensors["weight"][UNIT, 0] = 1
        tensors["bias"][UNIT] = 0
        return tensors

    return kernel_case(
        "linear relu",
        {"M": ROWS, "K": IN, "N": OUT},
        dtype,
        make=make,
        ours=ours,
        torch_=lambda t: F.relu(F.linear(t["x"], t["weight"], t["bias"])),
        wanted=("x", "weight", "bias"),
        cost=Cost(1.0, 1.0),
    )


def below(amount):
    """Our kernel with the pre-activations of UNIT lowered by `amount`."""

    def ours(t):
        lowered = torch.zeros_like(t["bias"])
        lowered[UNIT] = amount
        return LF.linear(t["x"], t["weight"], t["bias"] - lowered, activation="relu")

    return ours


def derivative_of(positive):
    """relu(x W^T + b) in plain torch with `positive(z)` in place of z > 0 in the derivative."""

    class Relu(torch.autograd.Function):
        @staticmethod
        def forward(ctx, z):
            ctx.save_for_backward(z)
            return F.relu(z)

        @staticmethod
        def backward(ctx, dy):
            (z,) = ctx.saved_tensors
            return dy * positive(z)

    return lambda t: Relu.apply(F.linear(t["x"], t["weight"], t["bias"]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_unit_that_rounding_puts_across_0_passes(dtype):
    assert verdict_of(linear_relu(below(0.0), at=1e-9, dtype=dtype)).passed
    verdict = verdict_of(linear_relu(below(2e-9), at=1e-9, dtype=dtype))
    assert verdict.passed, verdict.reason


@pytest.mark.parametrize(
    "positive",
    [
        lambda z: torch.ones_like(z),
        lambda z: torch.zeros_like(z),
        lambda z: (z < 0).to(z.dtype),
        lambda z: (z > 3e-5).to(z.dtype),  # wrong at one unit of all
        lambda z: (z > 0) * 1.001,
    ],
)
def test_a_wrong_relu_gradient_is_caught(positive):
    """At a unit that is ten times further from 0 than rounding goes."""
    assert verdict_of(linear_relu(derivative_of(lambda z: (z > 0).to(z.dtype)), at=2e-5)).passed
    assert not verdict_of(linear_relu(derivative_of(positive), at=2e-5)).passed


def test_a_branch_that_differs_from_the_kernels_own_pre_activation_is_caught():
    """The oracle follows what a run computed, not what it then does."""
    ours = derivative_of(lambda z: (z > 2e-9).to(z.dtype))
    assert not verdict_of(linear_relu(ours, at=1e-9)).passed


def test_an_input_is_exact_and_keeps_its_branch():
    case = activation("relu", 3, 5, torch.float32)
    tensors = registry.inputs_of(case, CPU)
    tensors["x"][0, 0] = 1e-9
    assert gate.check(case, tensors).passed

    def lowered(t):
        return F.relu(t["x"] - 2e-9)

    (variant, *_) = case.variants
    wrong = registry.Variant(variant.name, registry.functional(lowered, wanted=("x",)))
    object.__setattr__(case, "variants", (wrong,))
    assert not gate.check(case, tensors).passed


# ---- whole modules


def small_transformer(bias=None):
    """nn.Transformer whose last ReLU has `bias`, if given."""

    def build():
        module = nn.Transformer(64, 4, 1, 1, 128, 0.0, batch_first=True)
        if bias is not None:
            with torch.no_grad():
                module.decoder.layers[0].linear1.bias.copy_(bias)
        return module

    def make(m):
        return {name: m.normal(2, 16, 64) for name in ("x", "source", "dy")}

    model = Model(build, lambda module, t: module(t["source"], t["x"]), training=True)
    return module_case(
        "nn.Transformer", {"d": 64}, torch.float32, model, make=make,
        cost=Cost(1.0, 0.0), label="", random=False,
    )  # fmt: skip


def transformer_with_a_unit_at_0():
    """(case, pre-activation in float64 of the last ReLU's first unit)."""
    seen = []
    case = small_transformer()
    wide = registry.to_float64(registry.inputs_of(case, CPU))
    step = case.oracle(wide)
    with kinks.Watch(lambda number, preact: seen.append(preact.flatten()[0].item())):
        step()
    torch.manual_seed(WEIGHT_SEED)
    module = nn.Transformer(64, 4, 1, 1, 128, 0.0, batch_first=True)
    bias = module.decoder.layers[0].linear1.bias.detach().clone()
    bias[0] = bias[0].double() - seen[-1]
    case = small_transformer(bias)
    with kinks.Watch(lambda number, preact: seen.append(preact.flatten()[0].item())):
        case.oracle(wide)()
    return case, seen[-1]


def test_a_unit_of_a_transformer_that_rounding_puts_across_0_passes(monkeypatch):
    case, exact = transformer_with_a_unit_at_0()
    assert abs(exact) < 1e-7  # float32 can give the bias no better
    moved = []
    forward = cpu_linear.forward

    def other_side(spec, *operands):
        result = forward(spec, *operands)
        _, preact, _ = result
        if preact.numel() and abs(preact.flatten()[0]) < 1e-6:
            preact.view(-1)[0] = -1e-9 if exact > 0 else 1e-9
            moved.append(spec)
        return result

    monkeypatch.setattr(cpu_linear, "forward", other_side)
    verdict = verdict_of(case)
    assert moved
    assert verdict.passed, verdict.reason
    assert verdict.error_ours < 1e-5


def wrong_relu(spec, dy, x, weight, up_weight, preact, *rest):
    return preact.abs() + 1 if spec.activation == "relu" else preact


def wrong_at_the_largest_unit(spec, dy, x, weight, up_weight, preact, *rest):
    if spec.activation == "relu":
        preact = preact.clone()
        preact.view(-1)[preact.argmax()] *= -1
    return preact


@pytest.mark.parametrize("change", [wrong_relu, wrong_at_the_largest_unit])
def test_a_wrong_relu_gradient_in_a_transformer_is_caught(monkeypatch, change):
    backward = cpu_linear.backward

    def wrong(spec, dy, x, weight, up_weight, preact, *rest):
        preact = change(spec, dy, x, weight, up_weight, preact, *rest)
        return backward(spec, dy, x, weight, up_weight, preact, *rest)

    case, _ = transformer_with_a_unit_at_0()
    monkeypatch.setattr(cpu_linear, "backward", wrong)
    assert not verdict_of(case).passed


def test_a_wrong_weight_gradient_in_a_transformer_is_caught(monkeypatch):
    backward = cpu_linear.backward

    def wrong(spec, *operands):
        dx, dweight, *rest = backward(spec, *operands)
        return dx, dweight * 1.0001 if spec.activation == "relu" else dweight, *rest

    case, _ = transformer_with_a_unit_at_0()
    monkeypatch.setattr(cpu_linear, "backward", wrong)
    assert not verdict_of(case).passed


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kinks_leave_no_error_of_their_own_in_a_transformer(dtype, dropout):
    """Many units of a bfloat16 run are across 0, and the rule holds without their share."""
    case = transformer(dtype, b=1, s=17, t=16, d=64, h=4, ff=136, dropout=dropout)
    verdict = verdict_of(case)
    assert verdict.passed, verdict.reason
    assert verdict.error_torch < {torch.float32: 2e-6, torch.bfloat16: 1e-2}[dtype]
