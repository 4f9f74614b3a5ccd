"""The training runs: without dropout for agreement step by step, with dropout as users train."""

from __future__ import annotations

import torch

from llmkern.bench.workloads.gpt import GPTConfig
from llmkern.bench.workloads.training import TrainConfig


def default(
    dtypes: list[torch.dtype], steps: int | None = None, batch: int = 4
) -> list[TrainConfig]:
    return [
        TrainConfig(
            f"byte GPT, dropout {dropout:g}, {'bf16 autocast' if dtype.itemsize == 2 else 'fp32'}",
            GPTConfig(dropout=dropout),
            steps or 40,
            batch,
            dtype=dtype,
        )
        for dtype in dtypes
        for dropout in (0.0, 0.1)
    ]


def full(dtypes: list[torch.dtype], steps: int | None = None) -> list[TrainConfig]:
    """Longer, and a larger model."""
    large = GPTConfig(layers=6, d_model=512, heads=8, d_ff=2048, context=512, dropout=0.1)
    return [
        *default(dtypes, steps or 200, batch=8),
        TrainConfig("byte GPT 6 x 512, dropout 0.1, fp32", large, steps or 60, batch=4),
    ]
