"""torch.nn modules as shipped against the same modules after llmkern.accelerate.

Every variant builds its module from the same seed, so all start from the same weights. A training
step is forward and backward of a sum of squares' gradient (a fixed random one), parameter
gradients included, from `.grad = None`. FLOPs count the matrix products of projections and
attention only (causal halves not counted), 2 per multiply-add, backward twice forward (attention
2.5 times). No byte count is defined for a whole module, so a module is held against compute only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import llmkern
from llmkern.bench import baselines
from llmkern.bench.cases.attention import attention_cost
from llmkern.bench.registry import EAGER, OURS, Case, Cost, Maker, Step, Tensors, Variant

WEIGHT_SEED = 20261121
OURS_COMPILED = "llmkern + torch.compile"
ATTENTION_DROPOUT_0 = "torch, attention dropout 0"

Forward = Callable[[nn.Module, Tensors], Tensor]


@dataclass(frozen=True)
class Model:
    """How to build a module and how to call it on the case's tensors."""

    build: Callable[[], nn.Module]
    forward: Forward
    training: bool
    autocast: bool = False

    def step(self, change: Callable[[nn.Module], nn.Module] = lambda module: module):
        """`prepare` of this model after `change`."""

        def prepare(tensors: Tensors) -> Step:
            torch.manual_seed(WEIGHT_SEED)
            module = self.build().to(tensors["dy"].device).train(self.training)
            if any(t.dtype == torch.float64 for t in tensors.values()):
                module = module.double()
            return self._step_of(change(module), module, tensors)

        return prepare

    def _step_of(self, call: nn.Module, module: nn.Module, tensors: Tensors) -> Step:
        leaves = {k: t.detach() for k, t in tensors.items()}
        parameters = list(module.parameters())

        def context() -> AbstractContextManager:
            on = self.autocast and leaves["dy"].dtype != torch.float64
            return torch.autocast("cpu", torch.bfloat16) if on else nullcontext()

        def evaluate() -> tuple[Tensor, ...]:
            with torch.no_grad(), context():
                return (self.forward(call, leaves),)

        def train() -> tuple[Tensor, ...]:
            for parameter in parameters:
                parameter.grad = None
            x = leaves["x"].requires_grad_()
            x.grad = None
            with context():
                out = self.forward(call, leaves | {"x": x})
            out.backward(leaves["dy"].to(out.dtype))
            return (out.detach(), x.grad, *(p.grad for p in parameters))

        return train if self.training else evaluate


def accelerated(module: nn.Module) -> nn.Module:
    llmkern.accelerate(module)
    return module


def compiled(module: nn.Module) -> nn.Module:
    torch.compiler.reset()
    return torch.compile(module, dynamic=False)


def module_case(
    op: str,
    shape: Mapping[str, int],
    dtype: torch.dtype,
    model: Model,
    *,
    make: Callable[[Maker], Tensors],
    cost: Cost,
    label: str,
    random: bool,
    contenders: tuple[Variant, ...] = (),
    compile: bool = False,
    budget_s: float = 8.0,
) -> Case:
    variants = [
        Variant(OURS, model.step(accelerated)),
        Variant(EAGER, model.step()),
        *contenders,
    ]
    if compile:
        both = model.step(lambda module: compiled(accelerated(module)))
        variants.append(Variant(baselines.COMPILED, model.step(compiled), slow_to_prepare=True))
        variants.append(Variant(OURS_COMPILED, both, slow_to_prepare=True))
    ours = model.step(accelerated)
    exact = baselines.on_reference_backend(ours) if random else model.step()
    return Case(
        suite="modules",
        op=op,
        label=label,
        shape=shape,
        dtype=dtype,
        backward=model.training,
        make=make,
        variants=tuple(variants),
        oracle=exact,
        torch_error=exact,
        cost=cost,
        budget_s=budget_s,
        min_rounds=3,
    )


def _label(*words: str) -> str:
    return " ".join(word for word in words if word)


def encoder_flops(layers: int, b: int, s: int, d: int, h: int, ff: int, *, causal: bool,
                  training: bool) -> float:  # fmt: skip
    products = 2.0 * b * s * (4 * d * d + 2 * d * ff) * (3 if training else 1)
    attention = attention_cost(b, h, h, s, s, d // h, 4, causal, training).flops
    return layers * (products + attention)


def encoder(
    dtype: torch.dtype,
    *,
    layers: int = 2,
    b: int = 4,
    s: int = 512,
    d: int = 768,
    h: int = 12,
    ff: int = 3072,
    dropout: float = 0.1,
    training: bool = True,
    causal: bool = True,
    compile: bool = False,
    budget_s: float = 8.0,
) -> Case:
    """nn.TransformerEncoder, pre-norm, gelu, batch first. bfloat16 is autocast over fp32 weights;
    the best torch baseline includes attention dropout 0, which lets torch use flash attention."""

    def built(attention_dropout: float) -> Callable[[], nn.Module]:
        def build() -> nn.Module:
            layer = nn.TransformerEncoderLayer(
                d, h, ff, dropout, activation="gelu", batch_first=True, norm_first=True
            )
            layer.self_attn.dropout = attention_dropout
            return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)

        return build

    def forward(module: nn.Module, t: Tensors) -> Tensor:
        if causal:
            return module(t["x"], mask=t["mask"], is_causal=True)
        return module(t["x"])

    def make(m: Maker) -> Tensors:
        tensors = {"x": m.normal(b, s, d).float(), "dy": m.normal(b, s, d).float()}
        if causal:
            hidden = torch.full((s, s), float("-inf"), device=m.device).triu(1)
            tensors["mask"] = hidden
        return tensors

    autocast = dtype == torch.bfloat16
    model = Model(built(dropout), forward, training, autocast)
    random = training and dropout > 0.0
    contenders: tuple[Variant, ...] = ()
    if random:
        flash = Model(built(0.0), forward, training, autocast)
        note = "leaves dropout out of attention, so torch uses flash attention"
        contenders = (Variant(ATTENTION_DROPOUT_0, flash.step(), note=note),)
    return module_case(
        "nn.TransformerEncoder",
        {"L": layers, "B": b, "S": s, "d": d, "H": h, "ff": ff},
        dtype,
        model,
        make=make,
        cost=Cost(encoder_flops(layers, b, s, d, h, ff, causal=causal, training=training), 0.0),
        label=_label(
            "causal" if causal else "",
            f"dropout {dropout:g}" if training else "eval",
            "autocast" if autocast else "",
        ),
        random=random,
        contenders=contenders,
        compile=compile,
        budget_s=budget_s,
    )


def transformer(
    dtype: torch.dtype,
    *,
    layers: int = 2,
    b: int = 4,
    s: int = 128,
    t: int = 128,
    d: int = 512,
    h: int = 8,
    ff: int = 2048,
    dropout: float = 0.1,
    compile: bool = False,
    budget_s: float = 6.0,
) -> Case:
    """nn.Transformer with its own defaults (post-norm, relu): T source and S target positions,
    causal target, a training step."""

    def build() -> nn.Module:
        return nn.Transformer(d, h, layers, layers, ff, dropout, batch_first=True)

    def forward(module: nn.Module, x: Tensors) -> Tensor:
        return module(x["source"], x["x"], tgt_mask=x["mask"], tgt_is_causal=True)

    def make(m: Maker) -> Tensors:
        return {
            "x": m.normal(b, s, d).float(),
            "source": m.normal(b, t, d).float(),
            "dy": m.normal(b, s, d).float(),
            "mask": torch.full((s, s), float("-inf"), device=m.device).triu(1),
        }

    encoder_part = encoder_flops(layers, b, t, d, h, ff, causal=False, training=True)
    decoder_part = encoder_flops(layers, b, s, d, h, ff, causal=True, training=True)
    cross = layers * (
        3 * 2.0 * b * d * d * (2 * s + 2 * t)
        + attention_cost(b, h, h, s, t, d // h, 4, False, True).flops
    )
    return module_case(
        "nn.Transformer",
        {"L": layers, "B": b, "T": t, "S": s, "d": d, "H": h, "ff": ff},
        dtype,
        Model(build, forward, True, dtype == torch.bfloat16),
        make=make,
        cost=Cost(encoder_part + decoder_part + cross, 0.0),
        label=_label(f"dropout {dropout:g}", "autocast" if dtype == torch.bfloat16 else ""),
        random=dropout > 0.0,
        compile=compile,
        budget_s=budget_s,
    )


def multihead_attention(
    dtype: torch.dtype,
    *,
    b: int = 4,
    s: int = 512,
    d: int = 768,
    h: int = 12,
    dropout: float = 0.0,
    compile: bool = False,
    budget_s: float = 4.0,
) -> Case:
    """nn.MultiheadAttention as its constructor and call default, so with averaged weights returned
    (need_weights=True); ours must return them too. The best torch baseline turns that off."""

    def build() -> nn.Module:
        return nn.MultiheadAttention(d, h, dropout, batch_first=True)

    def forward(need_weights: bool) -> Forward:
        def call(module: nn.Module, t: Tensors) -> Tensor:
            return module(t["x"], t["x"], t["x"], need_weights=need_weights)[0]

        return call

    def make(m: Maker) -> Tensors:
        return {"x": m.normal(b, s, d).float(), "dy": m.normal(b, s, d).float()}

    autocast = dtype == torch.bfloat16
    fast = Model(build, forward(False), True, autocast)
    without = Variant("torch need_weights=False", fast.step(), note="returns no attention weights")
    also = Variant(
        "llmkern need_weights=False", fast.step(accelerated), note="returns no attention weights"
    )
    flops = (
        3 * 2.0 * b * s * 4 * d * d + attention_cost(b, h, h, s, s, d // h, 4, False, True).flops
    )
    return module_case(
        "nn.MultiheadAttention",
        {"B": b, "S": s, "d": d, "H": h},
        dtype,
        Model(build, forward(True), True, autocast),
        make=make,
        cost=Cost(flops, 0.0),
        label=_label("need_weights", f"dropout {dropout:g}", "autocast" if autocast else ""),
        random=dropout > 0.0,
        contenders=(without, also),
        compile=compile,
        budget_s=budget_s,
    )
