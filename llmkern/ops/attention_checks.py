"""What the attention functions accept: argument checks, and the one 4-D form that the op takes.

All checks run before anything is allocated. Layout of the op: q [B, H, S, D], k [B, G, T, D],
v [B, G, T, Dv]; masks and biases are 4-D with sizes 1 where they broadcast, never expanded, so that
a bias gradient is as small as the bias.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from llmkern import checks, numerics
from llmkern.errors import ArgumentError, DtypeError, ShapeError
from llmkern.specs import UNBOUNDED

ALIGNMENTS = ("top_left", "bottom_right")


# What q, k, v are: [*, H, S, D], [*, G, T, D], [*, G, T, Dv], or packed ones, then k or v are None.
SEPARATE = "scaled_dot_product_attention"
QKVPACKED = "attention_qkvpacked"  # q is [B, S, 3, H, D]
KVPACKED = "attention_kvpacked"  # q is [B, S, H, D], k is [B, T, 2, G, D]

NAMES = {SEPARATE: ("query", "key", "value"), QKVPACKED: ("qkv",), KVPACKED: ("q", "kv")}


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


def query_key_value(op: str, q: object, k: object, v: object) -> torch.dtype:
    """Check what holds for each of the tensors; return the dtype they are computed in."""
    names = NAMES[op]
    tensors = (q, k, v)[: len(names)]
    for name, t in zip(names, tensors, strict=True):
        checks.tensor(op, name, t)
        checks.floating(op, name, t)
        checks.same_device(op, name, t, q, names[0])
        if t.dtype != q.dtype and autocast_dtype(t) != autocast_dtype(q):
            checks.dtype_in(op, name, t, (q.dtype,), f"as {names[0]}")
    return autocast_dtype(q)


def sizes(op: str, q: Tensor, k: Tensor | None, v: Tensor | None, enable_gqa: bool) -> Sizes:
    if op == SEPARATE:
        return _separate(op, q, k, v, enable_gqa)
    if op == QKVPACKED:
        if q.dim() != 5 or q.shape[2] != 3:
            raise ShapeError(f"{op}: qkv must be [B, S, 3, H, D], got {list(q.shape)}")
        b, s, _, h, d = q.shape
        return Sizes((b,), h, h, s, s, d, d)
    if q.dim() != 4:
        raise ShapeError(f"{op}: q must be [B, S, H, D], got {list(q.shape)}")
    b, s, h, d = q.shape
    if k.dim() != 5 or k.shape[0] != b or k.shape[2] != 2 or k.shape[4] != d:
        raise ShapeError(f"{op}: kv must be [{b}, T, 2, G, {d}], got {list(k.shape)}")
    t, g = k.shape[1], k.shape[3]
    if (h % g if g else h) != 0:
        raise ShapeError(f"{op}: heads of kv must divide the {h} heads of q, got {g}")
    return Sizes((b,), h, g, s, t, d, d)


def _separate(op: str, q: Tensor, k: Tensor, v: Tensor, enable_gqa: bool) -> Sizes:
    for name, t in (("query", q), ("key", k), ("value", v)):
        if t.dim() < 2:
            raise ShapeError(f"{op}: {name} must have at least 2 dims, got {list(t.shape)}")
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
                # The bound keeps place + limit inside the kernels' 64 bits.
                limits.append(UNBOUNDED if limit in (None, -1) else min(limit, UNBOUNDED))
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


def product(sizes: tuple[int, ...]) -> int:
    count = 1
    for size in sizes:
        count *= size
    return count


def cast(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return t if t is None or t.dtype == dtype else t.to(dtype)


def four_dim_sides(
    attn_mask: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    key_padding_mask: Tensor | None,
    size: Sizes,
    dtype: torch.dtype,
) -> tuple[Tensor | None, ...]:
    """(bias, mask, key_mask, slopes, sinks) as the op takes them: bias (in the compute dtype) and
    mask 4-D, sizes 1 where they broadcast; key_mask [B, T]; slopes float32 [B or 1, H]; sinks
    float32 [H]."""
    lead, bias, mask = size.lead, None, attn_mask
    if mask is not None:
        if mask.dim() != 4 or len(lead) != 1:
            mask = _mask_of_four_dims(mask, lead)
        if mask.dtype != torch.bool:
            bias, mask = cast(mask, numerics.compute_dtype(dtype)), None
    if key_padding_mask is not None and len(lead) != 1:
        key_padding_mask = _flat_lead(key_padding_mask, lead)
    if alibi_slopes is not None:
        alibi_slopes = cast(alibi_slopes.detach(), torch.float32)
        one = alibi_slopes.dim() == 1
        alibi_slopes = alibi_slopes[None] if one else _flat_lead(alibi_slopes, lead)
    return bias, mask, key_padding_mask, alibi_slopes, cast(sinks, torch.float32)


def _flat_lead(t: Tensor, lead: tuple[int, ...]) -> Tensor:
    """[*lead, N] as [B, N]."""
    return t.flatten(0, len(lead) - 1) if lead else t[None]


def _mask_of_four_dims(mask: Tensor, lead: tuple[int, ...]) -> Tensor:
    if mask.dim() < 4:
        return mask[(None,) * (4 - mask.dim())]
    if all(n == 1 for n in mask.shape[:-3]):
        return mask.reshape(1, *mask.shape[-3:])
    return mask.expand(*lead, *mask.shape[-3:]).flatten(0, len(lead) - 1)


def own_dims(out: Tensor, lse: Tensor, size: Sizes) -> tuple[Tensor, Tensor]:
    """4-D results with the caller's leading dims."""
    if size.dims == 2:
        return out[0, 0], lse[0, 0]
    if size.dims == 3:
        return out[0], lse[0]
    return torch.unflatten(out, 0, size.lead), torch.unflatten(lse, 0, size.lead)
