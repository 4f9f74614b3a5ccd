"""Attention in plain torch, with the whole score matrix in memory; formula:
csrc/include/llmkern/attention.h. autograd and torch.func can differentiate `forward`: no NaN
hides behind a `where`, and no step depends on the data.

Arguments of every backend's attention module, all 4-D tensors with any strides:

    q [B, H, S, D], k [B, G, T, D], v [B, G, T, Dv]
    bias        compute dtype, [B or 1, H or 1, S or 1, T or 1], added to the scores
    mask        bool, sizes as bias, True = visible;  key_mask  bool [B, T], True = visible
    slopes      float32 [B or 1, H], ALiBi;           sinks     float32 [H]
    seed        int64 [1] with dropout, else None

`out` is a [B, H, S, Dv] tensor in [B, S, H, Dv] memory, `lse` is [B, H, S] in the compute dtype.
`backward` gives dq, dk, dv, dbias (compute dtype, bias's shape), dsinks; the five `wants` say which
are needed, the others are empty. dq, dk, dv are written into the tensors passed, if any, else into
new ones with the layout of q, k, v.
"""

import torch
from torch import Tensor

from llmkern import numerics, random
from llmkern.specs import AttentionSpec


def supports(spec: AttentionSpec) -> str | None:
    return None


def forward(
    spec: AttentionSpec,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    key_mask: Tensor | None,
    slopes: Tensor | None,
    sinks: Tensor | None,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    length_first = spec.length_first(q)
    with torch.autocast(spec.device, enabled=False):
        q, k, v = _computed(spec, q, k, v)
        visible = _visible(spec, q.device, bias, mask, key_mask)
        # Rows that meet no one: NaN in them would come back in autograd's products with 0.
        q = torch.where(visible.any(3)[..., None], q, 0.0)
        k = torch.where(visible.any(2)[..., None], k, 0.0)
        scores, _ = _scores(spec, q, k, bias, slopes, visible)
        lse = _log_sum_exp(scores, visible, sinks)
        p = _probabilities(scores, lse, visible)
        exact = _weighted_sum(_dropped(spec, p, seed), visible, v)
    # Not new_out and copy_, which vmap refuses; transpose_, since autograd forbids in-place changes
    # to views made in a Function.
    if length_first:
        rows = exact.permute(2, 0, 1, 3).to(spec.dtype)
        rows = rows.clone(memory_format=torch.contiguous_format).transpose_(0, 1)
    else:
        rows = exact.transpose(1, 2).to(spec.dtype).clone(memory_format=torch.contiguous_format)
    return rows.transpose_(1, 2), lse


def backward(
    spec: AttentionSpec,
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    key_mask: Tensor | None,
    slopes: Tensor | None,
    sinks: Tensor | None,
    seed: Tensor | None,
    out: Tensor,
    lse: Tensor,
    wants: list[bool],
    dq: Tensor | None = None,
    dk: Tensor | None = None,
    dv: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    with torch.autocast(spec.device, enabled=False):
        q_, k_, v_ = _computed(spec, q, k, v)
        do = dout.to(q_.dtype)
        visible = _visible(spec, q.device, bias, mask, key_mask)
        scores, slope = _scores(spec, q_, k_, bias, slopes, visible)
        p = _probabilities(scores, lse, visible)
        dp = torch.where(visible, _dropped(spec, do @ v_.mT, seed), 0.0)
        # sum_j p_ij dp_ij = <dout_i, out_i>, without the rounding of out to 16 bits.
        pull = -(p * dp).sum(-1) if dlse is None else dlse - (p * dp).sum(-1)
        ds = torch.where(visible, p * (dp + pull[..., None]), 0.0)
        draw = spec.scale * (ds if slope is None else ds * slope)
        empty = q.new_empty(0)
        seen = visible.mT
        dq = _store(_weighted_sum(draw, visible, k_), q, dq) if wants[0] else empty
        dk = _store(_grouped(spec, _weighted_sum(draw.mT, seen, q_)), k, dk) if wants[1] else empty
        weights = _dropped(spec, p, seed).mT
        dv = _store(_grouped(spec, _weighted_sum(weights, seen, do)), v, dv) if wants[2] else empty
        dbias = ds.sum_to_size(bias.shape) if wants[3] else empty
        dsinks = _sinks_gradient(sinks, lse, pull) if wants[4] else empty
    return dq, dk, dv, dbias, dsinks


def _computed(spec: AttentionSpec, *tensors: Tensor) -> list[Tensor]:
    """In the compute dtype, with H heads each."""
    dtype = numerics.compute_dtype(spec.dtype)
    return [
        t.to(dtype)
        if t.shape[1] == spec.heads
        else t.to(dtype).repeat_interleave(spec.heads // spec.kv_heads, 1)
        for t in tensors
    ]


def _grouped(spec: AttentionSpec, gradient: Tensor) -> Tensor:
    """[B, H, T, *] summed to [B, G, T, *]."""
    if spec.heads == spec.kv_heads:
        return gradient
    b, _, t, d = gradient.shape
    return gradient.reshape(b, spec.kv_heads, spec.heads // spec.kv_heads, t, d).sum(2)


def _distance(spec: AttentionSpec, device: torch.device) -> Tensor:
    """[S, T]: j - (i + shift)."""
    i = torch.arange(spec.q_len, device=device)
    return torch.arange(spec.kv_len, device=device) - (i + spec.shift)[:, None]


def _visible(
    spec: AttentionSpec,
    device: torch.device,
    bias: Tensor | None,
    mask: Tensor | None,
    key_mask: Tensor | None,
) -> Tensor:
    """bool [B, H, S, T]."""
    distance = _distance(spec, device)
    visible = (distance >= -spec.left) & (distance <= spec.right)
    if bias is not None:
        visible = visible & (bias != -torch.inf)
    if mask is not None:
        visible = visible & mask
    if key_mask is not None:
        visible = visible & key_mask[:, None, None, :]
    return visible.expand(spec.batch, spec.heads, spec.q_len, spec.kv_len)


def _scores(
    spec: AttentionSpec,
    q: Tensor,
    k: Tensor,
    bias: Tensor | None,
    slopes: Tensor | None,
    visible: Tensor,
) -> tuple[Tensor, Tensor | None]:
    """The scores, -inf where hidden, and the derivative of softcap (None without)."""
    scores, derivative = (q @ k.mT) * spec.scale, None
    if spec.softcap > 0.0:
        capped = torch.tanh(scores / spec.softcap)
        derivative = torch.where(visible, 1.0 - capped.square(), 0.0)
        scores = spec.softcap * capped
    if bias is not None:
        scores = scores + bias
    if slopes is not None:
        scores = scores - slopes.to(q.dtype)[:, :, None, None] * _distance(spec, q.device).abs()
    return torch.where(visible, scores, -torch.inf), derivative


def _log_sum_exp(scores: Tensor, visible: Tensor, sinks: Tensor | None) -> Tensor:
    """[B, H, S]; -inf where there is nothing to sum."""
    if sinks is not None:
        b, h, s, _ = scores.shape
        sink = sinks.to(scores.dtype)[:, None, None].expand(b, h, s, 1)
        scores = torch.cat((scores, sink), -1)
        visible = torch.cat((visible, sink > -torch.inf), -1)
    some = visible.any(-1)
    sums = torch.logsumexp(torch.where(some[..., None], scores, 0.0), -1)
    return torch.where(some, sums, -torch.inf)


def _probabilities(scores: Tensor, lse: Tensor, visible: Tensor) -> Tensor:
    known = torch.where(lse == -torch.inf, 0.0, lse)[..., None]
    return torch.where(visible, torch.exp(scores - known), 0.0)


def _dropped(spec: AttentionSpec, values: Tensor, seed: Tensor | None) -> Tensor:
    if spec.dropout_p == 0.0:
        return values
    keep = random.attention_keep_mask(seed, tuple(values.shape), spec.dropout_p)
    return torch.where(keep, values * random.scale(spec.dropout_p), 0.0)


def _weighted_sum(weights: Tensor, visible: Tensor, rows: Tensor) -> Tensor:
    """[.., M, E]: weights [.., M, N] @ rows [.., N, E], where row n never meets an m that does not
    see it: its weight is 0, but 0 * NaN is NaN."""
    dtype = rows.dtype
    total = weights @ torch.where(torch.isfinite(rows), rows, 0.0)
    signed = torch.cat((weights > 0.0, weights < 0.0), -1).to(dtype)
    plus, minus = (rows == torch.inf).to(dtype), (rows == -torch.inf).to(dtype)
    up, down = signed @ torch.cat((plus, minus), -2), signed @ torch.cat((minus, plus), -2)
    total = torch.where(up > 0.0, total + torch.inf, total)
    total = torch.where(down > 0.0, total - torch.inf, total)
    nan = visible.to(dtype) @ torch.isnan(rows).to(dtype) > 0.0
    return torch.where(nan, torch.nan, total)


def _sinks_gradient(sinks: Tensor, lse: Tensor, pull: Tensor) -> Tensor:
    """The sink is a key with score sinks[h] and value 0: ds = p (dlse - sum_j p_j dp_j)."""
    p = torch.exp(sinks.to(lse.dtype)[:, None] - lse)
    return torch.where(lse == -torch.inf, 0.0, p * pull).sum((0, 2)).to(sinks.dtype)


def _store(exact: Tensor, like: Tensor, into: Tensor | None) -> Tensor:
    return (torch.empty_like(like) if into is None else into).copy_(exact)
