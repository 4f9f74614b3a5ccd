"""Scaled dot-product attention, and its forms on packed projections.

Sources: Vaswani et al., "Attention is all you need", 2017; Dao, "FlashAttention-2", 2023 (the
algorithm of the kernels: scores are never stored whole); Press et al., "Train short, test long:
attention with linear biases" (ALiBi), 2022; Ainslie et al., "GQA", 2023; Gemma 2, 2024 (softcap);
Beltagy et al., "Longformer", 2020 (window); Xiao et al., "Efficient streaming language models with
attention sinks", 2024. Formula and edge cases: csrc/include/llmkern/attention.h.

Whatever the inputs' layout, the output lies in memory as [B, S, H, Dv]: what an output projection
reads.
"""

import torch
from torch import Tensor

from llmkern import dispatch, numerics, random
from llmkern.errors import ShapeError
from llmkern.ops import attention_checks as arguments
from llmkern.ops.library import define, plain_eager, wants_grad
from llmkern.specs import AttentionSpec


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    causal_align: str = "top_left",
    window: tuple[int | None, int | None] | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale * query @ key^T + mask) @ value, with memory that grows with S, not S * T.

    A query that sees no key gets 0, and what a key hidden from a query holds, NaN or Inf
    included, never reaches that query's output or gradients.

    Args:
        query: [*, H, S, D]; float32, bfloat16, float16 or float64, any strides.
        key, value: [*, G, T, D] and [*, G, T, Dv], of query's dtype. G is H, 1, or with enable_gqa
            a divisor of H: query head h reads kv head h // (H // G). Leading dims broadcast;
            2-D tensors are one head.
        attn_mask: broadcasts to [*, H, S, T]. bool: True = visible. float32 or query's dtype: added
            to the scores; it gets a gradient in its own shape. Goes together with is_causal.
        dropout_p: probability of a weight to be dropped, in [0, 1]; always applied, as in torch.
        is_causal: query i sees the keys up to i + shift.
        scale: factor of the scores; None is 1 / sqrt(D).
        causal_align: "top_left" is shift 0, "bottom_right" is shift T - S (the last query stands at
            the last key). is_causal, window and alibi_slopes measure from there.
        window: (left, right): query i sees keys i + shift - left .. i + shift + right; None or -1
            is no limit.
        softcap: scores become softcap * tanh(scores / softcap) before masks are added; 0 is off.
        alibi_slopes: [H] or [*, H]; slope * |i + shift - j| is subtracted from the scores. No
            gradient.
        sinks: [H]; a further logit of each head in the softmax's denominator, with value 0.
        key_padding_mask: bool [*, T], True = visible.
        return_lse: also return log(sum(exp(scores))), [*, H, S] in float32 (float64 for float64),
            -inf where no key is visible; it has a gradient.
        backend: name of the backend that must serve, else the best one does.

    Returns:
        [*, H, S, Dv], a transposed view of [*, S, H, Dv] memory; or (that, lse).

    Raises:
        ShapeError, DtypeError, DeviceError, ArgumentError: before anything is allocated.
    """
    op = "scaled_dot_product_attention"
    dtype = arguments.query_key_value(op, ("query", "key", "value"), (query, key, value))
    size = arguments.sizes(op, query, key, value, enable_gqa)
    options = arguments.options(
        op, size, dropout_p, is_causal, scale, causal_align, window, softcap
    )
    arguments.side_tensors(op, size, query, dtype, attn_mask, alibi_slopes, sinks, key_padding_mask)
    lead = size.lead
    q = arguments.four_dims(arguments.cast(query, dtype), lead, size.heads)
    k = arguments.four_dims(arguments.cast(key, dtype), lead, size.kv_heads)
    v = arguments.four_dims(arguments.cast(value, dtype), lead, size.kv_heads)
    out, lse = _attention(q, k, v, attn_mask, key_padding_mask, alibi_slopes, sinks, lead, options,
                          backend)  # fmt: skip
    if size.dims == 3:
        out, lse = out[0], lse[0]
    elif size.dims == 2:
        out, lse = out[0, 0], lse[0, 0]
    elif size.dims > 4:
        out, lse = out.unflatten(0, lead), lse.unflatten(0, lead)
    return (out, lse) if return_lse else out


def attention_qkvpacked(
    qkv: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    *,
    causal_align: str = "top_left",
    window: tuple[int | None, int | None] | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Self-attention read where a fused projection wrote it; its gradient is one packed tensor.

    Args:
        qkv: [B, S, 3, H, D], any strides.
        Others: as in `scaled_dot_product_attention`.

    Returns:
        [B, S, H, D], contiguous; or (that, lse [B, H, S]).
    """
    op = "attention_qkvpacked"
    dtype = arguments.query_key_value(op, ("qkv",), (qkv,), (5,))
    if qkv.shape[2] != 3:
        raise ShapeError(f"{op}: qkv must be [B, S, 3, H, D], got {list(qkv.shape)}")
    b, s, _, h, d = qkv.shape
    size = arguments.Sizes((b,), h, h, s, s, d, d)
    options = arguments.options(
        op, size, dropout_p, is_causal, scale, causal_align, window, softcap
    )
    arguments.side_tensors(op, size, qkv, dtype, attn_mask, alibi_slopes, sinks, key_padding_mask)
    out, lse = _attention(arguments.cast(qkv, dtype), None, None, attn_mask, key_padding_mask,
                          alibi_slopes, sinks, size.lead, options, backend)  # fmt: skip
    out = out.transpose(1, 2)
    return (out, lse) if return_lse else out


def attention_kvpacked(
    q: Tensor,
    kv: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    *,
    causal_align: str = "top_left",
    window: tuple[int | None, int | None] | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention on a packed key and value projection; the gradient of kv is one packed tensor.

    Args:
        q: [B, S, H, D], any strides.
        kv: [B, T, 2, G, D], any strides; G divides H.
        Others: as in `scaled_dot_product_attention`.

    Returns:
        [B, S, H, D], contiguous; or (that, lse [B, H, S]).
    """
    op = "attention_kvpacked"
    dtype = arguments.query_key_value(op, ("q", "kv"), (q, kv), (4, 5))
    b, s, h, d = q.shape
    if kv.shape[0] != b or kv.shape[2] != 2 or kv.shape[4] != d:
        raise ShapeError(f"{op}: kv must be [{b}, T, 2, G, {d}], got {list(kv.shape)}")
    t, g = kv.shape[1], kv.shape[3]
    if (h % g if g else h) != 0:
        raise ShapeError(f"{op}: heads of kv must divide the {h} heads of q, got {g}")
    size = arguments.Sizes((b,), h, g, s, t, d, d)
    options = arguments.options(
        op, size, dropout_p, is_causal, scale, causal_align, window, softcap
    )
    arguments.side_tensors(op, size, q, dtype, attn_mask, alibi_slopes, sinks, key_padding_mask)
    q, kv = arguments.cast(q, dtype), arguments.cast(kv, dtype)
    out, lse = _attention(q, kv, None, attn_mask, key_padding_mask, alibi_slopes, sinks, size.lead,
                          options, backend)  # fmt: skip
    out = out.transpose(1, 2)
    return (out, lse) if return_lse else out


def _attention(q, k, v, attn_mask, key_padding_mask, alibi_slopes, sinks, lead, options, backend):
    """Checked arguments to (out [B, H, S, Dv], lse [B, H, S])."""
    bias, mask = arguments.bias_and_mask(attn_mask, lead, q.dtype)
    key_mask = arguments.key_mask(key_padding_mask, lead)
    slopes = arguments.slopes(alibi_slopes, lead)
    sinks = arguments.cast(sinks, torch.float32)
    seed = random.draw_seed(q.device) if options.dropout_p > 0.0 else None
    args = (q, k, v, bias, mask, key_mask, slopes, sinks, seed, *options, backend)
    if not plain_eager(q, k, v, attn_mask, key_padding_mask, alibi_slopes, sinks):
        return torch.ops.llmkern.attention(*args)
    if wants_grad(q, k, v, bias, sinks):
        return _AttentionFunction.apply(*args)
    return _forward(*args)


def _views(q: Tensor, k: Tensor | None, v: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(q, k, v) as [B, heads, length, dim]. Of the op's arguments q, k, v, packed ones stand
    alone: qkv [B, S, 3, H, D], None, None or q [B, S, H, D], kv [B, T, 2, G, D], None."""
    if k is None:
        q, k, v = q.permute(2, 0, 3, 1, 4).unbind(0)
    elif v is None:
        q = q.transpose(1, 2)
        k, v = k.permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def _spec(q, k, v, bias, mask, key_mask, slopes, sinks, options) -> AttentionSpec:
    b, h, s, d = q.shape
    _, g, t, value_dim = v.shape
    return AttentionSpec(q.dtype, q.device.type, b, h, g, s, t, d, value_dim, *options,
                         bias is not None, mask is not None, key_mask is not None,
                         slopes is not None, sinks is not None)  # fmt: skip


def _forward(q, k, v, bias, mask, key_mask, slopes, sinks, seed, scale, softcap, shift, left, right,
             dropout_p, backend) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out [B, H, S, Dv] in [B, S, H, Dv] memory, lse [B, H, S])."""
    q, k, v = _views(q, k, v)
    options = (scale, softcap, shift, left, right, dropout_p)
    spec = _spec(q, k, v, bias, mask, key_mask, slopes, sinks, options)
    module = dispatch.resolve("attention", spec, backend)
    return module.forward(spec, q, k, v, bias, mask, key_mask, slopes, sinks, seed)


def _backward(dout, dlse, q, k, v, bias, mask, key_mask, slopes, sinks, seed, out, lse, scale,
              softcap, shift, left, right, dropout_p, wants, backend):  # fmt: skip
    """Gradients of (q, k, v, bias, sinks), packed as they were; empty where not wanted."""
    views = _views(q, k, v)
    options = (scale, softcap, shift, left, right, dropout_p)
    spec = _spec(*views, bias, mask, key_mask, slopes, sinks, options)
    module = dispatch.resolve("attention", spec, backend)
    saved = (*views, bias, mask, key_mask, slopes, sinks, seed, out, lse)
    if k is None:
        dqkv = torch.empty_like(q)
        wants = [wants[0]] * 3 + list(wants[3:])
        *_, dbias, dsinks = module.backward(
            spec, dout, dlse, *saved, wants, *_views(dqkv, None, None)
        )
        return dqkv, q.new_empty(0), q.new_empty(0), dbias, dsinks
    if v is None:
        dq, dkv = torch.empty_like(q), torch.empty_like(k)
        wants = [wants[0], wants[1], wants[1], *wants[3:]]
        *_, dbias, dsinks = module.backward(spec, dout, dlse, *saved, wants, *_views(dq, dkv, None))
        return dq, dkv, q.new_empty(0), dbias, dsinks
    return module.backward(spec, dout, dlse, *saved, wants)


class _AttentionFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args):
        out, lse = _forward(*args)
        _setup_context(ctx, args, (out, lse))
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout, dlse):
        return _gradients(ctx, dout, dlse, _backward)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:9], *output)
    ctx.options = inputs[9:15]
    ctx.backend = inputs[15]
    ctx.set_materialize_grads(False)


def _gradients(ctx, dout, dlse, backward):
    """Gradients in the order of the op's arguments, from ctx as `_setup_context` left it."""
    if dout is None and dlse is None:
        return (None,) * 16
    *saved, out, lse = ctx.saved_tensors
    if dout is None:
        dout = torch.zeros_like(out)
    need = ctx.needs_input_grad
    wants = [need[0], need[1], need[2], need[3], need[7]]
    gradients = backward(dout, dlse, *saved, out, lse, *ctx.options, wants, ctx.backend)
    dq, dk, dv, dbias, dsinks = (g if w else None for g, w in zip(gradients, wants, strict=True))
    return (dq, dk, dv, dbias, None, None, None, dsinks, *(None,) * 8)


def _autograd(ctx, dout, dlse):
    return _gradients(ctx, dout, dlse, torch.ops.llmkern.attention_backward)


def _fake(q, k, v, *_):
    q, k, v = _views(q, k, v)
    (b, h, s, _), value_dim = q.shape, v.shape[3]
    strides = (s * h * value_dim, value_dim, h * value_dim, 1)
    lse = q.new_empty((b, h, s), dtype=numerics.compute_dtype(q.dtype))
    return q.new_empty_strided((b, h, s, value_dim), strides), lse


def _fake_backward(dout, dlse, q, k, v, bias, mask, key_mask, slopes, sinks, seed, out, lse, scale,
                   softcap, shift, left, right, dropout_p, wants, backend):  # fmt: skip
    return tuple(
        torch.empty_like(t) if wanted and t is not None else q.new_empty(0)
        for t, wanted in zip((q, k, v, bias, sinks), wants, strict=True)
    )


_TENSORS = (
    "Tensor q, Tensor? k, Tensor? v, Tensor? bias, Tensor? mask, Tensor? key_mask, Tensor? slopes, "
    "Tensor? sinks, Tensor? seed, "
)
_OPTIONS = "float scale, float softcap, SymInt shift, SymInt left, SymInt right, float dropout_p, "
define(
    "attention",
    f"({_TENSORS}{_OPTIONS}str? backend) -> (Tensor, Tensor)",
    _forward,
    _fake,
    _autograd,
    _setup_context,
)
define(
    "attention_backward",
    f"(Tensor dout, Tensor? dlse, {_TENSORS}Tensor out, Tensor lse, {_OPTIONS}bool[] wants, "
    "str? backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)
