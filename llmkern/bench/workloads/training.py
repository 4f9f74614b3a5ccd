"""Trains the same model as torch ships it and accelerated, and says whether the curves agree.

The arms advance in turns, one step each, on the same batch, from the same weights, with torch's
generator seeded alike before each step; so their speeds are comparable and their losses too.

Without dropout the arms compute the same function. With dropout they do not: torch draws Bernoulli
numbers, llmkern Philox decisions. There a third arm, the control, is the accelerated model over the
reference backend: plain torch operations with the masks that ours has, for the first CONTROL_STEPS.

Either way the losses are compared step by step, ours with torch's or with the control's: each may
differ by STEP_TOLERANCE of its value, which is what rounding in another order grows to in a run of
this length. (Curves under different masks can only be compared statistically, and the differences
within one run depend on one another too much for that to decide anything.)
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import llmkern
from llmkern.bench import memory, timers
from llmkern.bench.registry import DTYPE_NAMES, EAGER, OURS
from llmkern.bench.workloads import corpus
from llmkern.bench.workloads.gpt import GPT, GPTConfig

CONTROL = "plain torch, our masks"
STEP_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 2e-2}
FEWEST_STEPS = 12
CONTROL_STEPS = 6  # its float64 takes five times as long as ours
WARMUP = 10  # steps of linear learning rate warm-up


@dataclass(frozen=True)
class TrainConfig:
    """One comparison. `steps` of AdamW on batches of batch x context bytes."""

    name: str
    model: GPTConfig
    steps: int
    batch: int = 8
    learning_rate: float = 1e-3
    weight_decay: float = 0.1
    clip: float = 1.0
    dtype: torch.dtype = torch.float32  # bfloat16: autocast over fp32 weights
    seed: int = 1234

    @property
    def tokens(self) -> int:
        return self.batch * self.model.context


@dataclass
class Arm:
    """One run of the comparison: its model, its optimizer and what it did so far."""

    name: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def make_arm(config: TrainConfig, name: str) -> Arm:
    torch.manual_seed(config.seed)
    model = GPT(config.model).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
    )
    if name != EAGER:
        llmkern.accelerate(model)
    return Arm(name, model, optimizer)


def train_step(config: TrainConfig, arm: Arm, data: Tensor, step: int) -> None:
    """One step of one arm, timed from the batch to the updated weights."""
    inputs, targets = corpus.batch(data, config.batch, config.model.context, config.seed + step)
    torch.manual_seed(config.seed + step)
    for group in arm.optimizer.param_groups:
        group["lr"] = config.learning_rate * min(1.0, (step + 1) / WARMUP)
    autocast = config.dtype == torch.bfloat16
    backend = llmkern.use_backend("reference") if arm.name == CONTROL else nullcontext()
    began = time.perf_counter()
    with backend:
        with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
            logits = arm.model(inputs)
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
        arm.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(arm.model.parameters(), config.clip)
        arm.optimizer.step()
    arm.seconds.append(time.perf_counter() - began)
    arm.losses.append(loss.item())


def compare(
    config: TrainConfig,
    *,
    on_step: Callable[[int, list[Arm]], None] = lambda step, arms: None,
    measure_memory: bool = True,
    deadline: float = float("inf"),
) -> dict[str, Any]:
    """Train all arms and return what the report shows. Past `deadline` (of time.monotonic) no
    further step begins, once FEWEST_STEPS are done; the report says how many were."""
    names = [EAGER, OURS, *([CONTROL] if config.model.dropout else [])]
    arms = [make_arm(config, name) for name in names]
    data = corpus.load()
    for step in range(config.steps):
        running = [arm for arm in arms if arm.name != CONTROL or step < CONTROL_STEPS]
        for arm in running if step % 2 == 0 else reversed(running):
            train_step(config, arm, data, step)
        on_step(step, running)
        if step + 1 >= FEWEST_STEPS and time.monotonic() > deadline:
            break
    eager = _median_step(arms[0])
    results = []
    for arm in arms:
        timing = timers.summarize([s * 1e9 for s in arm.seconds[1:]], 1)
        peak = None
        if measure_memory and arm.name != CONTROL:
            peak = peak_memory(config, arm.name).peak_bytes
        results.append(
            {
                "name": arm.name,
                "losses": arm.losses,
                "tokens_per_s": config.tokens / _median_step(arm),
                "spread": timing.spread,
                "speedup": eager / _median_step(arm),
                "peak_bytes": peak,
            }
        )
    return {
        "name": config.name,
        "steps": len(arms[0].losses),
        "batch": config.batch,
        "dtype": DTYPE_NAMES[config.dtype],
        "threads": torch.get_num_threads(),
        "parameters": sum(p.numel() for p in arms[0].model.parameters()),
        "model": asdict(config.model),
        "arms": results,
        "agreement": agreement(config, *(arm.losses for arm in arms)),
    }


def _median_step(arm: Arm) -> float:
    return statistics.median(arm.seconds[1:] or arm.seconds)  # the first step warms up


def agreement(
    config: TrainConfig, eager: list[float], ours: list[float], control: list[float] | None = None
) -> dict[str, Any]:
    """Whether the curves agree by the rule above, and the figures that say so."""
    tolerance = STEP_TOLERANCE[config.dtype]
    other = eager if control is None else control
    differences = [abs(a - b) / abs(b) for a, b in zip(ours, other, strict=control is None)]
    worst = max(differences, key=lambda d: (math.isnan(d), d))
    versus = "" if control is None else f"the first {len(control)} with {CONTROL}, "
    return {
        "agrees": worst <= tolerance,  # NaN on either side is no agreement
        "statement": f"step by step, {versus}largest difference {worst:.1e} of the loss, "
        f"allowed {tolerance:.0e}",
    }


def prepared_step(config: TrainConfig, name: str) -> Callable[[], None]:
    """A training step whose optimizer state exists already; importable, for a child process."""
    arm = make_arm(config, name)
    data = corpus.load(2**20)
    train_step(config, arm, data, 0)
    return lambda: train_step(config, arm, data, 1)


def peak_memory(config: TrainConfig, name: str) -> memory.ChildPeak:
    """Peak memory of a step over weights and optimizer state, in a fresh process."""
    args = (config, name)
    return memory.peak_in_child(prepared_step, args, args, threads=torch.get_num_threads())
