"""Attention: csrc/cpu/attention_fwd.cpp, attention_bwd.cpp."""

import torch
from torch import Tensor

from llmkern import numerics, random
from llmkern.backends.cpu import _ext
from llmkern.backends.cpu._ext import DTYPE_CODES
from llmkern.specs import AttentionSpec


def supports(spec: AttentionSpec) -> str | None:
    return _ext.unavailable(spec.device)


def _shape(spec: AttentionSpec, seed: Tensor | None) -> tuple:
    """What bindings_attention.cpp calls shape."""
    threshold = random.threshold(spec.dropout_p) if spec.dropout_p else 0
    return (DTYPE_CODES[spec.dtype], spec.batch, spec.heads, spec.kv_heads, spec.q_len, spec.kv_len,
            spec.head_dim, spec.value_dim, spec.scale, spec.softcap, spec.shift, spec.left,
            spec.right, threshold, seed)  # fmt: skip


def _rows(t: Tensor) -> Tensor:
    """[B, heads, length, dim] with a last stride of 1: what the kernels read in place."""
    return t if t.stride(3) == 1 or t.shape[3] <= 1 else t.contiguous()


def _broadcast(t: Tensor | None, spec: AttentionSpec) -> tuple[Tensor | None, tuple[int, ...]]:
    """A tensor and its strides over [B, H, S, T], 0 where `t` has one element."""
    if t is None:
        return None, (0, 0, 0, 0)
    sizes = (spec.batch, spec.heads, spec.q_len, spec.kv_len)
    return t, t.expand(sizes).stride()


def _inputs(
    spec: AttentionSpec,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    key_mask: Tensor | None,
    slopes: Tensor | None,
    sinks: Tensor | None,
) -> tuple:
    """What bindings_attention.cpp calls inputs."""
    q, k, v = _rows(q), _rows(k), _rows(v)
    if key_mask is not None:
        key_mask = key_mask.expand(spec.batch, spec.kv_len).contiguous()
    slopes_stride = (0, 0)
    if slopes is not None:
        slopes_stride = slopes.expand(spec.batch, spec.heads).stride()
    if sinks is not None:
        sinks = sinks.contiguous()
    if bias is not None:
        bias = bias.resolve_neg()  # z.conj().imag is a strided view to be negated
    return (
        *(q, q.stride()[:3]),
        *(k, k.stride()[:3]),
        *(v, v.stride()[:3]),
        *_broadcast(bias, spec),
        *_broadcast(mask, spec),
        key_mask,
        *(slopes, slopes_stride),
        sinks,
    )


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
    module = _ext.load().module
    shape = _shape(spec, seed)
    inputs = _inputs(spec, q, k, v, bias, mask, key_mask, slopes, sinks)
    b, h, s = spec.batch, spec.heads, spec.q_len
    out = spec.new_out(q)
    lse = torch.empty(b, h, s, dtype=numerics.compute_dtype(spec.dtype), device="cpu")
    scratch = torch.empty(
        module.attention_fwd_scratch_bytes(shape) // 4, dtype=torch.float32, device="cpu"
    )
    module.attention_fwd(
        shape,
        inputs,
        out,
        out.stride()[:3],
        lse,
        scratch,
    )
    return out, lse


def _gradient(wanted: bool, like: Tensor, into: Tensor | None) -> tuple[Tensor | None, Tensor]:
    """(what the kernel writes or None, what is returned): one tensor if its last stride is 1."""
    if not wanted:
        return None, like.new_empty(0)
    result = torch.empty_like(like) if into is None else into
    if result.stride(3) == 1 or result.shape[3] <= 1:
        return result, result
    return torch.empty(result.shape, dtype=result.dtype, device="cpu"), result


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
    module = _ext.load().module
    shape = _shape(spec, seed)
    inputs = _inputs(spec, q, k, v, bias, mask, key_mask, slopes, sinks)
    dout, out, lse = _rows(dout), _rows(out), lse.contiguous()
    dlse = None if dlse is None else dlse.contiguous()
    pairs = [_gradient(*of) for of in zip(wants[:3], (q, k, v), (dq, dk, dv), strict=True)]
    dbias = torch.zeros(bias.shape, dtype=bias.dtype, device="cpu") if wants[3] else None
    dsinks = torch.empty(spec.heads, dtype=torch.float32, device="cpu") if wants[4] else None
    codes = []
    for rows, _ in pairs:
        codes += (None, (0, 0, 0)) if rows is None else (rows, rows.stride()[:3])
    scratch = torch.empty(
        module.attention_bwd_scratch_bytes(shape) // 4, dtype=torch.float32, device="cpu"
    )
    module.attention_bwd(
        shape,
        inputs,
        (out, out.stride()[:3], dout, dout.stride()[:3]),
        lse,
        dlse,
        (*codes, *_broadcast(dbias, spec)),
        dsinks,
        scratch,
    )
    for rows, result in pairs:
        if rows is not None and rows is not result:
            result.copy_(rows)
    empty = q.new_empty(0)
    return (*(result for _, result in pairs), empty if dbias is None else dbias,
            empty if dsinks is None else dsinks)  # fmt: skip
