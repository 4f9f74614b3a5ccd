"""Scaled dot-product attention, and its forms on packed projections.

Sources: Vaswani et al., "Attention is all you need", 2017; Dao, "FlashAttention-2", 2023 (the
algorithm of the kernels: scores are never stored whole); Press et al., "Train short, test long:
attention with linear biases" (ALiBi), 2022; Ainslie et al., "GQA", 2023; Gemma 2, 2024 (softcap);
Beltagy et al., "Longformer", 2020 (window); Xiao et al., "Efficient streaming language models with
attention sinks", 2024. Formula and edge cases: csrc/include/llmkern/attention.h.

Whatever the inputs' layout, the output lies in memory as [B, S, H, Dv]: what an output projection
reads.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from llmkern import dispatch, numerics, random
from llmkern.backends.reference import attention as reference
from llmkern.ops import attention_checks as arguments
from llmkern.ops.library import (
    Plans,
    define,
    direct,
    direct_apply,
    in_transform,
    no_second_derivative,
    signature,
    untraced,
    wants_grad,
)
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
        [*, H, S, Dv], a transposed view of [*, S, H, Dv] memory ([S, *, H, Dv] where query is a
        view of such); or (that, lse).

    Raises:
        ShapeError, DtypeError, DeviceError, ArgumentError: before anything is allocated.
    """
    side = (attn_mask, alibi_slopes, sinks, key_padding_mask)
    options = (dropout_p, is_causal, scale, causal_align, window, softcap)
    out, lse = _attention(arguments.SEPARATE, query, key, value, side, enable_gqa, options, backend)
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
        [B, S, H, D], contiguous, or in [S, B, H, D] memory where the queries are; or (that, lse
        [B, H, S]).
    """
    side = (attn_mask, alibi_slopes, sinks, key_padding_mask)
    options = (dropout_p, is_causal, scale, causal_align, window, softcap)
    out, lse = _attention(arguments.QKVPACKED, qkv, None, None, side, False, options, backend)
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
        [B, S, H, D], contiguous, or in [S, B, H, D] memory where the queries are; or (that, lse
        [B, H, S]).
    """
    side = (attn_mask, alibi_slopes, sinks, key_padding_mask)
    options = (dropout_p, is_causal, scale, causal_align, window, softcap)
    out, lse = _attention(arguments.KVPACKED, q, kv, None, side, True, options, backend)
    return (out, lse) if return_lse else out


class _Plan(NamedTuple):
    """Everything about a call that follows from its signature and options."""

    spec: AttentionSpec
    size: arguments.Sizes
    dtype: torch.dtype  # that autocast gives
    grad: bool
    straight: bool  # query, key and value are 4-D and broadcast nothing


_plans = Plans()


def _attention(op, q, k, v, side, enable_gqa, options, backend):
    """Any of the functions: `op` says what q, k, v are."""
    dropout_p, is_causal, scale, causal_align, window, softcap = options
    if type(window) is list or (scale is not None and type(scale) is not float):
        window, scale = tuple(window) if type(window) is list else window, float(scale)
        options = (dropout_p, is_causal, scale, causal_align, window, softcap)
    tensors = signature(q, k, v, *side)
    plan = None
    if tensors is not None:
        key = (op, tensors, arguments.autocast_dtype(q), enable_gqa, options)
        plan = _plans.get(key)
    if plan is None:
        plan = _plan(op, q, k, v, side, enable_gqa, options)
        if tensors is not None:
            _plans.remember(key, plan)
    size, dtype = plan.size, plan.dtype
    q, k, v = arguments.cast(q, dtype), arguments.cast(k, dtype), arguments.cast(v, dtype)
    if not plan.straight:
        q = arguments.four_dims(q, size.lead, size.heads)
        k = arguments.four_dims(k, size.lead, size.kv_heads)
        v = arguments.four_dims(v, size.lead, size.kv_heads)
    side = arguments.four_dim_sides(*side, size, dtype)
    seed = random.draw_seed(q.device) if plan.spec.dropout_p > 0.0 else None
    out, lse = _run(plan, tensors is None, q, k, v, *side, seed, backend)
    if op != arguments.SEPARATE:
        return out.transpose(1, 2), lse
    return (out, lse) if size.dims == 4 else arguments.own_dims(out, lse, size)


def _plan(op, q, k, v, side, enable_gqa, options) -> _Plan:
    """Check every argument, then describe the call."""
    attn_mask, slopes, sinks, key_mask = side
    dtype = arguments.query_key_value(op, q, k, v)
    size = arguments.sizes(op, q, k, v, enable_gqa)
    scalars = arguments.options(op, size, *options)
    arguments.side_tensors(op, size, q, dtype, *side)
    floating = attn_mask is not None and attn_mask.dtype != torch.bool
    spec = AttentionSpec(
        dtype, q.device.type, arguments.product(size.lead), *size[1:7], *scalars, floating,
        attn_mask is not None and not floating, key_mask is not None, slopes is not None,
        sinks is not None)  # fmt: skip
    straight = op != arguments.SEPARATE or (
        q.dim() == k.dim() == v.dim() == 4
        and q.shape[:2] == (*size.lead, size.heads)
        and k.shape[:2] == v.shape[:2] == (*size.lead, size.kv_heads)
    )
    return _Plan(spec, size, dtype, wants_grad(q, k, v, attn_mask, sinks), straight)


def _run(plan, traced, q, k, v, bias, mask, key_mask, slopes, sinks, seed, backend):
    """(out [B, H, S, Dv], lse [B, H, S]) of tensors in the op's form."""
    spec = plan.spec
    args = (q, k, v, bias, mask, key_mask, slopes, sinks, seed)
    if traced and in_transform():
        return reference.forward(spec, *_views(q, k, v), *args[3:])
    if traced:
        return torch.ops.llmkern.attention(*args, *spec.scalars(), backend)
    if plan.grad:
        return _apply(*args, spec, backend)
    module = dispatch.resolve("attention", spec, backend)
    return module.forward(spec, *_views(q, k, v), *args[3:])


def _views(q: Tensor, k: Tensor | None, v: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(q, k, v) as [B, heads, length, dim]. Of the op's arguments q, k, v, packed ones stand
    alone: qkv [B, S, 3, H, D], None, None or q [B, S, H, D], kv [B, T, 2, G, D], None."""
    if k is None:
        q, k, v = q.permute(2, 0, 3, 1, 4).unbind(0)
    elif v is None:
        q = q.transpose(1, 2)
        k, v = k.permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


class _AttentionFunction(torch.autograd.Function):
    @staticmethod
    @untraced
    def forward(ctx, q, k, v, bias, mask, key_mask, slopes, sinks, seed, spec, backend):
        side = (bias, mask, key_mask, slopes, sinks, seed)
        module = dispatch.resolve("attention", spec, backend)
        out, lse = module.forward(spec, *_views(q, k, v), *side)
        ctx.save_for_backward(q, k, v, *side, out, lse)
        ctx.spec, ctx.backend = spec, backend
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @untraced
    def backward(ctx, dout, dlse):
        if torch.is_grad_enabled():
            run = functools.partial(_differentiable, ctx.spec)
        elif direct(dout, dlse):
            run = functools.partial(_backward_of, ctx.spec, ctx.backend)
        else:
            run = functools.partial(_traced_backward, ctx.spec.scalars(), ctx.backend)
        return _gradients(ctx, dout, dlse, run, 2)


_apply = direct_apply(_AttentionFunction)


def _backward_of(spec, backend, dout, dlse, q, k, v, bias, mask, key_mask, slopes, sinks, seed,
                 out, lse, wants):  # fmt: skip
    """Gradients of (q, k, v, bias, sinks), packed as they were; empty where not wanted."""
    module = dispatch.resolve("attention", spec, backend)
    saved = (*_views(q, k, v), bias, mask, key_mask, slopes, sinks, seed, out, lse)
    if k is None:
        dqkv = torch.empty_like(q)
        wants = [wants[0]] * 3 + list(wants[3:])
        parts = _views(dqkv, None, None)
        *_, dbias, dsinks = module.backward(spec, dout, dlse, *saved, wants, *parts)
        return dqkv, q.new_empty(0), q.new_empty(0), dbias, dsinks
    if v is None:
        dq, dkv = torch.empty_like(q), torch.empty_like(k)
        wants = [wants[0], wants[1], wants[1], *wants[3:]]
        parts = _views(dq, dkv, None)
        *_, dbias, dsinks = module.backward(spec, dout, dlse, *saved, wants, *parts)
        return dq, dkv, q.new_empty(0), dbias, dsinks
    return module.backward(spec, dout, dlse, *saved, wants)


def _traced_backward(scalars, backend, *tensors, wants):
    """`_backward_of` through the dispatcher."""
    return torch.ops.llmkern.attention_backward(*tensors, *scalars, wants, backend)


def _differentiable(spec, dout, dlse, q, k, v, bias, mask, key_mask, slopes, sinks, seed,
                    out, lse, wants):  # fmt: skip
    """The same as a graph (create_graph=True): the reference formula, differentiated by torch.

    Views stand for the inputs, so that one computed from another is not followed back to it here.
    """
    q, k, v, bias, sinks = (None if t is None else t.view_as(t) for t in (q, k, v, bias, sinks))
    side = (bias, mask, key_mask, slopes, sinks, seed)
    outputs = reference.forward(spec, *_views(q, k, v), *side)
    inputs = [t for t, wanted in zip((q, k, v, bias, sinks), wants, strict=True) if wanted]
    given = (dout, torch.zeros_like(lse) if dlse is None else dlse)
    found = torch.autograd.grad(outputs, inputs, given, create_graph=True, materialize_grads=True)
    results = iter(found)
    return [next(results) if wanted else None for wanted in wants]


def _gradients(ctx, dout, dlse, backward, options):
    """Gradients in the order of the forward's arguments: nine tensors, then `options` others."""
    if dout is None and dlse is None:
        return (None,) * (9 + options)
    *saved, out, lse = ctx.saved_tensors
    if dout is None:
        dout = torch.zeros_like(out)
    need = ctx.needs_input_grad
    wants = [need[0], need[1], need[2], need[3], need[7]]
    found = backward(dout, dlse, *saved, out, lse, wants=wants)
    dq, dk, dv, dbias, dsinks = (g if w else None for g, w in zip(found, wants, strict=True))
    return (dq, dk, dv, dbias, None, None, None, dsinks, *(None,) * (1 + options))


def _spec(q, k, v, bias, mask, key_mask, slopes, sinks, options) -> AttentionSpec:
    b, h, s, d = q.shape
    _, g, t, value_dim = v.shape
    return AttentionSpec(q.dtype, q.device.type, b, h, g, s, t, d, value_dim, *options,
                         bias is not None, mask is not None, key_mask is not None,
                         slopes is not None, sinks is not None)  # fmt: skip


def _forward(q, k, v, bias, mask, key_mask, slopes, sinks, seed, scale, softcap, shift, left, right,
             dropout_p, backend) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out [B, H, S, Dv] in [B, S, H, Dv] memory, lse [B, H, S])."""
    views = _views(q, k, v)
    options = (scale, softcap, shift, left, right, dropout_p)
    spec = _spec(*views, bias, mask, key_mask, slopes, sinks, options)
    module = dispatch.resolve("attention", spec, backend)
    return module.forward(spec, *views, bias, mask, key_mask, slopes, sinks, seed)


def _backward(dout, dlse, q, k, v, bias, mask, key_mask, slopes, sinks, seed, out, lse, scale,
              softcap, shift, left, right, dropout_p, wants, backend):  # fmt: skip
    options = (scale, softcap, shift, left, right, dropout_p)
    spec = _spec(*_views(q, k, v), bias, mask, key_mask, slopes, sinks, options)
    side = (bias, mask, key_mask, slopes, sinks, seed)
    return _backward_of(spec, backend, dout, dlse, q, k, v, *side, out, lse, wants)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:9], *output)
    ctx.options = inputs[9:15]
    ctx.backend = inputs[15]
    ctx.set_materialize_grads(False)


def _autograd(ctx, dout, dlse):
    run = functools.partial(_traced_backward, ctx.options, ctx.backend)
    return _gradients(ctx, dout, dlse, run, 7)


def _fake(q, k, v, bias, mask, key_mask, slopes, sinks, seed, scale, softcap, shift, left, right,
          dropout_p, backend):  # fmt: skip
    q, k, v = _views(q, k, v)
    options = (scale, softcap, shift, left, right, dropout_p)
    spec = _spec(q, k, v, bias, mask, key_mask, slopes, sinks, options)
    dispatch.foresee("attention", lambda: spec, backend)
    lse = q.new_empty(q.shape[:3], dtype=numerics.compute_dtype(q.dtype))
    return spec.new_out(q), lse


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
    no_second_derivative("attention"),
)
