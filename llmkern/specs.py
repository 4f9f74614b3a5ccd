"""What a call is, reduced to what choosing and running a kernel needs; hashable."""

from typing import NamedTuple

import torch


class NormSpec(NamedTuple):
    """One normalisation call over the last dim of [rows, cols]."""

    dtype: torch.dtype
    weight_dtype: torch.dtype | None  # None: neither weight nor bias
    device: str
    rows: int
    cols: int
    eps: float
    rms: bool
    unit_offset: bool
    add: bool  # a residual is added first
    dropout_p: float
    keep_z: bool  # the normalised input itself is wanted (prenorm, or saved for backward)
