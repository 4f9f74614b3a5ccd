"""Dropout in plain torch; formula: csrc/include/llmkern/elementwise.h."""

import torch
from torch import Tensor

from llmkern import numerics, random
from llmkern.specs import DropoutSpec


def supports(spec: DropoutSpec) -> str | None:
    return None


def forward(spec: DropoutSpec, x: Tensor, seed: Tensor, inplace: bool) -> Tensor:
    """x with dropped elements 0 and kept ones scaled; x itself where inplace."""
    keep = random.flat_keep_mask(seed, tuple(x.shape), spec.p)
    kept = x.to(numerics.compute_dtype(spec.dtype)) * random.scale(spec.p)
    y = torch.where(keep, kept, 0.0).to(spec.dtype)
    return x.copy_(y) if inplace else y


def backward(spec: DropoutSpec, dy: Tensor, seed: Tensor) -> Tensor:
    return forward(spec, dy, seed, False)
