"""What the norms refuse, before anything is allocated."""

import torch
from torch import Tensor

from llmkern import checks
from llmkern.errors import ArgumentError, ShapeError


def check(op, x, residual, normalized_shape, weight, bias, eps, dropout_p) -> int:
    """Raise on bad arguments; return the number of normalised elements of a row."""
    checks.tensor(op, "input", x)
    checks.floating(op, "input", x)
    if isinstance(normalized_shape, int):
        normalized_shape = (normalized_shape,)
    shape = list(normalized_shape)
    if not shape or list(x.shape[-len(shape) :]) != shape:
        raise ShapeError(
            f"{op}: input must end in normalized_shape {shape}, got {list(x.shape)}"
            if shape
            else f"{op}: normalized_shape must have at least one dim, got []"
        )
    if eps is not None and not eps >= 0.0:
        raise ArgumentError(f"{op}: eps must be >= 0, got {eps}")
    checks.probability(op, "dropout_p", dropout_p)
    dtype = _check_residual(op, x, residual) if op.startswith("add_") else x.dtype
    for name, value in (("weight", weight), ("bias", bias)):
        if value is None:
            continue
        checks.tensor(op, name, value)
        checks.shape(op, name, value, shape, "normalized_shape of input")
        checks.same_device(op, name, value, x)
        if value.dtype != dtype:
            half = dtype in (torch.bfloat16, torch.float16)
            allowed = (dtype, torch.float32) if half else (dtype,)
            checks.dtype_in(op, name, value, allowed, "the output's, or float32 with a 16-bit one")
    if weight is not None and bias is not None and weight.dtype != bias.dtype:
        checks.dtype_in(op, "bias", bias, (weight.dtype,), "as weight")
    cols = 1
    for size in shape:
        cols *= size
    return cols


def _check_residual(op: str, x: Tensor, residual: Tensor) -> torch.dtype:
    """The dtype of the sum."""
    checks.tensor(op, "residual", residual)
    checks.floating(op, "residual", residual)
    checks.shape(op, "residual", residual, x.shape, "the shape of input")
    checks.same_device(op, "residual", residual, x)
    if residual.dtype == x.dtype:
        return x.dtype
    half = (torch.bfloat16, torch.float16)
    allowed = (x.dtype, torch.float32) if x.dtype in half else (x.dtype,)
    if x.dtype == torch.float32:
        allowed = (torch.float32, *half)
    checks.dtype_in(op, "residual", residual, allowed, "input's, or float32 beside a 16-bit one")
    return torch.float32
