"""Data-sheet rates of named GPUs and the roofline bounds they give. A leaf; nothing is measured.

Dense rates, no sparsity, at boost clock. float32 products count at the TF32 rate, which is the
fastest that a card multiplies float32 at, so that a bound stays one. Sources, read 2026-11-22:

    A100 SXM 80 GB    NVIDIA A100 Tensor Core GPU data sheet
    H100 SXM, H200    NVIDIA H100 and H200 Tensor Core GPU data sheets
    B200              NVIDIA HGX B200 data sheet, 1000 W
    L40S              NVIDIA L40S data sheet; float64 is float32 / 64
    RTX 4090          NVIDIA Ada GPU architecture white paper, 16-bit with float32 accumulation
"""

from typing import NamedTuple

import torch


class Card(NamedTuple):
    name: str
    matrix: dict[torch.dtype, float]  # FLOP/s of products, by the operands' dtype
    vector: float  # FLOP/s of other arithmetic, which is done in float32
    vector64: float  # and in float64
    bytes_per_s: float


class Bound(NamedTuple):
    """The least time a call can take on a card, and what sets it: "compute" or "memory"."""

    card: str
    seconds: float
    kind: str


def _card(name: str, half: float, tf32: float, matrix64: float, vector: float, vector64: float,
          bytes_per_s: float) -> Card:  # fmt: skip
    """Rates in TFLOP/s, bandwidth in GB/s."""
    matrix = {
        torch.bfloat16: half, torch.float16: half, torch.float32: tf32, torch.float64: matrix64,
    }  # fmt: skip
    rates = {dtype: rate * 1e12 for dtype, rate in matrix.items()}
    return Card(name, rates, vector * 1e12, vector64 * 1e12, bytes_per_s * 1e9)


CARDS = (
    _card("A100", 312, 156, 19.5, 19.5, 9.7, 2039),
    _card("H100", 989.4, 494.7, 66.9, 66.9, 33.5, 3350),
    _card("H200", 989.4, 494.7, 66.9, 66.9, 33.5, 4800),
    _card("B200", 2250, 1100, 40, 80, 40, 8000),
    _card("L40S", 362.05, 183, 1.43, 91.6, 1.43, 864),
    _card("RTX 4090", 165.2, 82.6, 1.29, 82.6, 1.29, 1008),
)


def bound(card: Card, flops: int, nbytes: int, dtype: torch.dtype, matrix: bool) -> Bound:
    """max(flops / rate, bytes / bandwidth): Williams, Waterman and Patterson, 2009.

    matrix: the FLOPs are those of matrix products.
    """
    if matrix:
        rate = card.matrix[dtype]
    else:
        rate = card.vector64 if dtype == torch.float64 else card.vector
    compute, memory = flops / rate, nbytes / card.bytes_per_s
    return Bound(card.name, max(compute, memory), "compute" if compute >= memory else "memory")
