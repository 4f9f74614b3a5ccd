"""What the attention functions accept: argument checks, and the one 4-D form that the op takes.

All checks run before anything is allocated. Layout of the op: q [B, H, S, D], k [B, G, T, D],
v [B, G, T, Dv]; masks and biases are 4-D with sizes 1 where they broadcast, never expanded, so that
a bias gradient is as small as the bias.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from llmkern import checks, numerics
from llmkern.errors import ArgumentError, DtypeError, ShapeError
from llmkern.specs import UNBOUNDED

ALIGNMENTS = ("top_left", "bottom_right")


class Sizes(NamedTuple):
    """Sizes of a call; `lead` are the dims in front of the heads, dims the rank of the output."""

    lead: tuple[int, ...]
    heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    head_dim: int
    value_dim: int
    dims: int = 4


class Options(NamedTuple):
    """The scalar arguments of torch.ops.llmkern.attention."""

    scale: float
    softcap: float
    shift: int
    left: int
    right: int
    dropout_p: float


def autocast_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype that autocast gives to query, key and value: float64 is left alone, as in torch."""
    device = tensor.device.type
    if tensor.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return tensor.dtype
    return torch.get_autocast_dtype(device)


def query_key_value(
    op: str, names: Sequence[str], tensors: Sequence[object], dims: Sequence[int] | None = None
) -> torch.dtype:
    """Check what holds for each of the tensors; return the dtype they are computed in."""
    dtype = first = None
    for name, t in zip(names, tensors, strict=True):
        checks.tensor(op, name, t)
        checks.floating(op, name, t)
        if first is None:
            first, dtype = t, autocast_dtype(t)
            continue
        checks.same_device(op, name, t, first, names[0])
        if t.dtype != first.dtype and autocast_dtype(t) != dtype:
            checks.dtype_in(op, name, t, (first.dtype,), f"as {names[0]}")
    for index, (name, t) in enumerate(zip(names, tensors, strict=True)):
        if dims is None and t.dim() < 2:
            raise ShapeError(f"{op}: {name} must have at least 2 dims, got {list(t.shape)}")
        if dims is not None and t.dim() != dims[index]:
            raise ShapeError(f"{op}: {name} must have {dims[index]} dims, got {list(t.shape)}")
    return dtype


def sizes(op: str, q: Tensor, k: Tensor, v: Tensor, enable_gqa: bool) -> Sizes:
    """Sizes of query, key, value [*, H, S, D], [*, G, T, D], [*, G, T, Dv]."""
    if k.shape[-1] != q.shape[-1]:
        raise ShapeError(
            f"{op}: key must have the last dim of query, {q.shape[-1]}, got {list(k.shape)}"
        )
    if v.shape[-2] != k.shape[-2]:
        raise ShapeError(
            f"{op}: value must have the length of key, {k.shape[-2]}, got {list(v.shape)}"
        )
    dims = max(q.dim(), k.dim(), v.dim())
    if enable_gqa and min(q.dim(), k.dim(), v.dim()) < 3:
        raise ShapeError(f"{op}: enable_gqa needs tensors of at least 3 dims, got {list(q.shape)}")
    heads, groups = _heads(op, q, k, v, enable_gqa)
    if q.dim() == 4 and q.shape[0] == k.shape[0] == v.shape[0] and k.dim() == v.dim() == 4:
        lead = (q.shape[0],)
    else:
        lead = _lead(op, q, k, v)
    return Sizes(lead, heads, groups, q.shape[-2], k.shape[-2], q.shape[-1], v.shape[-1], dims)


def _heads(op: str, q: Tensor, k: Tensor, v: Tensor, enable_gqa: bool) -> tuple[int, int]:
    """(H, G). Key and value with different head counts meet at H: see `four_dims`."""
    heads, k_heads, v_heads = (1 if t.dim() < 3 else t.shape[-3] for t in (q, k, v))
    if enable_gqa:
        for name, count in (("key", k_heads), ("value", v_heads)):
            if (heads % count if count else heads) != 0:
                raise ShapeError(
                    f"{op}: heads of {name} must divide the {heads} heads of query, got {count}"
                )
    else:
        widest = max(k_heads, v_heads) if 0 not in (k_heads, v_heads) else 0
        for name, count in (("key", k_heads), ("value", v_heads)):
            if count not in (1, widest if heads == 1 else heads):
                raise ShapeError(
                    f"{op}: {name} must have the {heads} heads of query (or enable_gqa=True), "
                    f"got {count}"
                )
        heads = widest if heads == 1 else heads
    return heads, k_heads if k_heads == v_heads else heads


def _lead(op: str, q: Tensor, k: Tensor, v: Tensor) -> tuple[int, ...]:
    """The dims in front of the heads, broadcast."""
    leads = [tuple(t.shape[:-3]) for t in (q, k, v)]
    lead: tuple[int, ...] = ()
    for name, other in zip(("query", "key", "value"), leads, strict=True):
        short, long = sorted((lead, other), key=len)
        padded = (1,) * (len(long) - len(short)) + short
        if any(a != b and a != 1 and b != 1 for a, b in zip(padded, long, strict=True)):
            raise ShapeError(
                f"{op}: leading dims of {name} must broadcast with {list(lead)}, got {list(other)}"
            )
        lead = tuple(b if a == 1 else a for a, b in zip(padded, long, strict=True))
    return lead


def four_dims(t: Tensor, lead: tuple[int, ...], heads: int) -> Tensor:
    """[*lead or less, heads or less, N, E] as [B, heads, N, E]: a view wherever one exists."""
    if t.dim() < 3:
        t = t[None]
    if t.shape[-3] != heads:
        *front, own, n, e = t.shape
        t = t.expand(*front, heads, n, e) if own == 1 else t.repeat_interleave(heads // own, -3)
    if len(lead) == 1:
        return t if t.dim() == 4 and t.shape[0] == lead[0] else t.expand(*lead, *t.shape[-3:])
    t = t.expand(*lead, *t.shape[-3:])
    return t[None] if not lead else t.flatten(0, len(lead) - 1)


def options(
    op: str,
    size: Sizes,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    causal_align: str,
    window: tuple[int | None, int | None] | None,
    softcap: float,
) -> Options:
    checks.probability(op, "dropout_p", dropout_p)
    checks.one_of(op, "causal_align", causal_align, ALIGNMENTS)
    if not 0.0 <= softcap < math.inf:
        raise ArgumentError(f"{op}: softcap must be >= 0 and finite, got {softcap}")
    left, right = UNBOUNDED, UNBOUNDED
    if window is not None:
        left, right = _window(op, window)
    if is_causal:
        right = min(right, 0)
    if scale is None:
        scale = 1.0 / math.sqrt(size.head_dim) if size.head_dim else 1.0
    shift = size.kv_len - size.q_len if causal_align == "bottom_right" else 0
    return Options(float(scale), float(softcap), shift, left, right, float(dropout_p))


def _window(op: str, window: object) -> list[int]:
    limits = []
    if isinstance(window, (tuple, list)) and len(window) == 2:
        for limit in window:
            if limit is None or (isinstance(limit, int) and limit >= -1):
                limits.append(UNBOUNDED if limit is None or limit == -1 else limit)
    if len(limits) != 2:
        raise ArgumentError(
            f"{op}: window must be (left, right): >= 0, or None or -1 (no limit), got {window!r}"
        )
    return limits


def _attn_mask(op: str, mask: object, size: Sizes, q: Tensor, dtype: torch.dtype) -> None:
    """bool, or float32 or query's dtype; broadcasts to [*lead, H, S, T]."""
    if not isinstance(mask, Tensor):
        raise DtypeError(f"{op}: attn_mask must be a Tensor or None, got {type(mask).__name__}")
    checks.same_device(op, "attn_mask", mask, q, "query")
    if mask.dtype not in (torch.bool, torch.float32, dtype, q.dtype):
        checks.dtype_in(op, "attn_mask", mask, (torch.bool, torch.float32, dtype), "or query's")
    full = (*size.lead, size.heads, size.q_len, size.kv_len)[-max(size.dims, 2) :]
    tail = full[len(full) - mask.dim() :] if mask.dim() <= len(full) else ()
    if mask.dim() < 2 or len(tail) != mask.dim() or any(
        n != 1 and n != want for n, want in zip(mask.shape, tail, strict=True)
    ):  # fmt: skip
        raise ShapeError(
            f"{op}: attn_mask must have 2 to {len(full)} dims that broadcast to {list(full)}, "
            f"got {list(mask.shape)}"
        )


def side_tensors(
    op: str,
    size: Sizes,
    q: Tensor,
    dtype: torch.dtype,
    attn_mask: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    key_padding_mask: Tensor | None,
) -> None:
    """Check everything that goes with query, key and value of `size`, computed in `dtype`."""
    lead, heads = size.lead, size.heads
    if attn_mask is not None:
        _attn_mask(op, attn_mask, size, q, dtype)
    if alibi_slopes is not None:
        _per_head(op, "alibi_slopes", alibi_slopes, q)
        if tuple(alibi_slopes.shape) not in ((heads,), (*lead, heads)):
            checks.shape(op, "alibi_slopes", alibi_slopes, (heads,), "heads, or batch and heads")
        if alibi_slopes.requires_grad and torch.is_grad_enabled():
            raise ArgumentError(f"{op}: alibi_slopes get no gradient, got requires_grad=True")
    if sinks is not None:
        _per_head(op, "sinks", sinks, q)
        checks.shape(op, "sinks", sinks, (heads,), "heads of query")
    if key_padding_mask is not None:
        checks.tensor(op, "key_padding_mask", key_padding_mask)
        checks.dtype_in(op, "key_padding_mask", key_padding_mask, (torch.bool,), "True = keep")
        checks.same_device(op, "key_padding_mask", key_padding_mask, q, "query")
        checks.shape(op, "key_padding_mask", key_padding_mask, (*lead, size.kv_len), "batch, keys")


def _per_head(op: str, name: str, value: object, q: Tensor) -> None:
    checks.tensor(op, name, value)
    checks.floating(op, name, value)
    checks.same_device(op, name, value, q, "query")


def bias_and_mask(mask: Tensor | None, lead: tuple[int, ...], dtype: torch.dtype):
    """attn_mask as (bias, mask): 4-D, sizes 1 where it broadcasts; a bias in the compute dtype."""
    if mask is None:
        return None, None
    if mask.dim() > 4 or (mask.dim() == 4 and len(lead) != 1):
        mask = _flat_lead(mask, lead)
    while mask.dim() < 4:
        mask = mask[None]
    if mask.dtype == torch.bool:
        return None, mask
    compute = numerics.compute_dtype(dtype)
    return (mask if mask.dtype == compute else mask.to(compute)), None


def _flat_lead(mask: Tensor, lead: tuple[int, ...]) -> Tensor:
    own = mask.shape[:-3]
    if all(n == 1 for n in own):
        return mask.reshape(1, *mask.shape[-3:])
    return mask.expand(*lead, *mask.shape[-3:]).flatten(0, len(lead) - 1)


def cast(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return t if t is None or t.dtype == dtype else t.to(dtype)


def key_mask(mask: Tensor | None, lead: tuple[int, ...]) -> Tensor | None:
    """[*lead, T] as [B, T]."""
    if mask is None or len(lead) == 1:
        return mask
    return mask[None] if not lead else mask.flatten(0, len(lead) - 1)


def slopes(values: Tensor | None, lead: tuple[int, ...]) -> Tensor | None:
    """float32 [1, H] or [B, H]."""
    if values is None:
        return None
    values = cast(values.detach(), torch.float32)
    return values[None] if values.dim() == 1 else values.flatten(0, len(lead) - 1)
