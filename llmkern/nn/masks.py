"""What torch's layers do to masks on the way to attention."""

import math

import torch
from torch import Tensor


def float_mask(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A bool mask (True = hidden) as 0 and -inf; anything else as it is."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)


def sequence_length(x: Tensor, batch_first: bool) -> int:
    """S of [S, E], [B, S, E] or, not batch_first, [S, B, E]."""
    return x.shape[-2 if batch_first or x.dim() == 2 else 0]


def detect_causal(mask: Tensor | None, size: int) -> bool:
    """True if `mask` is the causal mask of `size` positions.

    Under torch.compile the answer, which depends on data, is not asked for: False.
    """
    if mask is None or mask.shape != (size, size) or torch.compiler.is_compiling():
        return False
    causal = torch.ones(size, size, dtype=torch.bool, device=mask.device).triu(1)
    return torch.equal(mask, causal if mask.dtype == torch.bool else float_mask(causal, mask.dtype))
