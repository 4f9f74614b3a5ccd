"""Dropout: csrc/cpu/elementwise.cpp."""

import torch
from torch import Tensor

from llmkern import random
from llmkern.backends.cpu import _ext
from llmkern.backends.cpu._ext import DTYPE_CODES, plane_of
from llmkern.specs import DropoutSpec


def supports(spec: DropoutSpec) -> str | None:
    return _ext.unavailable(spec.device)


def forward(spec: DropoutSpec, x: Tensor, seed: Tensor, inplace: bool) -> Tensor:
    """x with dropped elements 0 and kept ones scaled; x itself where inplace."""
    flat, rows, cols, stride = plane_of(x)
    if not inplace:
        out, out_stride = torch.empty(x.shape, dtype=x.dtype, device="cpu"), cols
    else:
        out, out_stride = flat, stride
    _ext.load().module.dropout(
        DTYPE_CODES[spec.dtype],
        rows,
        cols,
        flat,
        stride,
        out,
        out_stride,
        random.threshold(spec.p),
        seed,
    )
    if inplace and out.data_ptr() != x.data_ptr():
        return x.copy_(out.view(x.shape))
    return x if inplace else out


def backward(spec: DropoutSpec, dy: Tensor, seed: Tensor) -> Tensor:
    return forward(spec, dy, seed, False)
