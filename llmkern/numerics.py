"""Precision rules: what each dtype is computed in, and how close a result must be.

Rule (DESIGN of tests and docs/numerics.md): with the error of a result measured against float64,

    error(ours) <= FACTOR * error(torch, same dtype and inputs) + floor[dtype]

error(x) = max |x - exact| / (1 + max |exact|): relative for large tensors, absolute for small ones.
"""

import torch
from torch import Tensor

FACTOR = 2.0

FLOOR = {
    torch.float64: 1e-12,
    torch.float32: 1e-6,
    torch.bfloat16: 4e-3,
    torch.float16: 5e-4,
}


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that arithmetic and saved statistics use: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def error(result: Tensor, exact: Tensor) -> float:
    """max |result - exact| / (1 + max |exact|); inf where exactly one of them is not finite."""
    if exact.numel() == 0:
        return 0.0
    result, exact = result.detach().double(), exact.detach().double()
    special = ~torch.isfinite(exact)
    if not torch.equal(result[special], exact[special]) and not bool(
        (torch.isnan(result[special]) & torch.isnan(exact[special])).all()
    ):
        return float("inf")
    difference = (result - exact)[~special]
    if difference.numel() == 0:
        return 0.0
    worst = float(difference.abs().max())
    return worst / (1.0 + float(exact[~special].abs().max())) if worst == worst else float("inf")


def allowed(torch_error: float, dtype: torch.dtype) -> float:
    """The error bound of the rule."""
    return FACTOR * torch_error + FLOOR[dtype]
