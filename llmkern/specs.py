"""What a call is, reduced to what choosing and running a kernel needs; hashable."""

from typing import NamedTuple

import torch


class NormSpec(NamedTuple):
    """One normalisation call over the last dim of [rows, cols]."""

    dtype: torch.dtype  # of residual and output
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
    x_dtype: torch.dtype  # dtype, or 16-bit beside a float32 residual
    keep_statistics: bool = True  # False: forward may give None, and backward gets what it gave


UNBOUNDED = 1 << 62  # of AttentionSpec.left and right: no limit


class AttentionSpec(NamedTuple):
    """One attention call. Axes: q [B, H, S, D], k [B, G, T, D], v [B, G, T, Dv]; the formula is in
    csrc/include/llmkern/attention.h."""

    dtype: torch.dtype
    device: str
    batch: int
    heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    head_dim: int
    value_dim: int
    scale: float
    softcap: float  # 0: off
    shift: int  # query i stands at key i + shift
    left: int  # keys that a query sees before and after that place
    right: int
    dropout_p: float
    bias: bool
    mask: bool
    key_mask: bool
    slopes: bool
    sinks: bool

    def scalars(self) -> tuple[float | int, ...]:
        """The options of torch.ops.llmkern.attention that are numbers, in its order."""
        return (self.scale, self.softcap, self.shift, self.left, self.right, self.dropout_p)

    def length_first(self, q: torch.Tensor) -> bool:
        """Whether out is [S, B, H, Dv] in memory, not [B, S, H, Dv]: where q is, as modules with
        batch_first=False make it; the output projection then reads out without a copy."""
        # The strides first: sizes that a compiler does not know mostly need not be asked then.
        return 0 < q.stride(0) < q.stride(2) and self.batch > 1 and self.q_len > 1

    def new_out(self, q: torch.Tensor) -> torch.Tensor:
        """Memory for out [B, H, S, Dv], which autograd does not take for a view."""
        b, h, s, d = self.batch, self.heads, self.q_len, self.value_dim
        across = (h * d, b * h * d) if self.length_first(q) else (s * h * d, h * d)
        strides = (across[0], d, across[1], 1)
        return torch.empty_strided((b, h, s, d), strides, dtype=self.dtype, device=q.device)


class LinearSpec(NamedTuple):
    """One linear call: [rows, in_features] x [out_features, in_features]^T and its epilogue."""

    dtype: torch.dtype
    device: str
    rows: int
    out_features: int
    in_features: int
    activation: str | None  # "relu", "gelu", "gelu_tanh", "silu"
    gated: bool  # act(x Wg^T + bg) * (x Wu^T + bu)
    bias: bool
    residual: bool
    dropout_p: float
    keep_preact: bool  # backward needs the values that went into the activation
    tf32: bool = False  # on a GPU: float32 products may be computed in TF32 (precision.py)


class DropoutSpec(NamedTuple):
    """One dropout call. p is below 1 or exactly 1, which drops everything."""

    dtype: torch.dtype
    device: str
    elements: int
    p: float


class ActivationSpec(NamedTuple):
    """One element-wise activation call."""

    dtype: torch.dtype
    device: str
    elements: int
    activation: str  # "relu", "gelu", "gelu_tanh", "silu"
