"""Trains the same model as torch ships it and accelerated, and says whether the curves agree.

The arms advance in turns, one step each, on the same batch, from the same weights, with torch's
generator seeded alike before each step; so their speeds are comparable and their losses too.

Without dropout the arms compute the same function and the losses are compared step by step: each
may differ by STEP_TOLERANCE of its value, which is what rounding in another order grows to in a
run of this length. With dropout the masks differ (torch draws Bernoulli numbers, llmkern Philox
decisions), so there is a third arm, the control: torch as shipped once more with other masks. The
smoothed curves of ours and torch's may lie AGREEMENT_FACTOR times as far apart (root mean square
over the steps) as those two runs of torch, which differ by their masks alone.
"""

from __future__ import annotations

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

CONTROL = "torch eager, other masks"
STEP_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 2e-2}
AGREEMENT_FACTOR = 2.0
FEWEST_STEPS = 12
SMOOTHING = 8  # steps
WARMUP = 10  # steps of linear learning rate warm-up
MASK_SEED_OFFSET = 7919


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
    mask_seed_offset: int = 0
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def make_arm(config: TrainConfig, name: str) -> Arm:
    torch.manual_seed(config.seed)
    model = GPT(config.model).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
    )
    if name == OURS:
        llmkern.accelerate(model)
    return Arm(name, model, optimizer, MASK_SEED_OFFSET if name == CONTROL else 0)


def train_step(config: TrainConfig, arm: Arm, data: Tensor, step: int) -> None:
    """One step of one arm, timed from the batch to the updated weights."""
    inputs, targets = corpus.batch(data, config.batch, config.model.context, config.seed + step)
    torch.manual_seed(config.seed + step + arm.mask_seed_offset)
    for group in arm.optimizer.param_groups:
        group["lr"] = config.learning_rate * min(1.0, (step + 1) / WARMUP)
    autocast = config.dtype == torch.bfloat16
    began = time.perf_counter()
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
        for arm in arms if step % 2 == 0 else reversed(arms):
            train_step(config, arm, data, step)
        on_step(step, arms)
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
    if control is None:
        tolerance = STEP_TOLERANCE[config.dtype]
        worst = max(abs(a - b) / abs(b) for a, b in zip(ours, eager, strict=True))
        return {
            "agrees": worst <= tolerance,
            "statement": f"step by step, largest difference {worst:.1e} of the loss, "
            f"allowed {tolerance:.0e}",
        }
    between = distance(ours, eager)
    masks = distance(control, eager)
    return {
        "agrees": between <= AGREEMENT_FACTOR * masks,
        "statement": f"smoothed curves {between:.4f} apart (rms); two torch runs with different "
        f"masks {masks:.4f}, allowed {AGREEMENT_FACTOR:g} times that",
    }


def distance(a: list[float], b: list[float]) -> float:
    """Root mean square difference of two curves after a moving average over SMOOTHING steps."""
    difference = [x - y for x, y in zip(a, b, strict=True)]
    window = min(SMOOTHING, len(difference))
    smooth = [
        statistics.fmean(difference[i : i + window]) for i in range(len(difference) - window + 1)
    ]
    return statistics.fmean(d * d for d in smooth) ** 0.5


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
