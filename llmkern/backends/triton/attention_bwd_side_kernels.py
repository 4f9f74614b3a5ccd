"""Attention backward, the gradients of what stands beside q, k and v: bias and sinks.

    dbias = sum of ds over the dims that bias is broadcast along
    dsink_h = -sum_bi exp(sink_h - lse_i) delta_i: the sink is a key with value 0

A program owns a tile of dbias and visits all that was broadcast from it, in order. Formulas and
pair_gradients: attention_bwd_kernels.py.
"""

import triton
import triton.language as tl

from llmkern.backends.triton.attention_bwd_kernels import load_terms
from llmkern.backends.triton.attention_bwd_query_kernels import query_tiles
from llmkern.backends.triton.attention_mask_kernels import (
    INFINITY,
    LOG2E,
    band,
    load_rows,
    open_head,
    open_sides,
)
from llmkern.backends.triton.philox_kernels import load_keys


@triton.jit
def one_or_all(place, block, length, WIDE: tl.constexpr):
    """(first, last + 1) of the places that a program visits: all where bias is broadcast, else a
    block of them."""
    if WIDE:
        return 0, length
    return place * block, tl.minimum(place * block + block, length)


@triton.jit
def store_sums(at, strides, first_i, first_j, acc, q_len, kv_len, WIDE: tl.constexpr):
    """Stores a tile of one slab of dbias, summed along the dims that are broadcast."""
    stride_i, stride_j = strides
    i = first_i + tl.arange(0, acc.shape[0])
    j = first_j + tl.arange(0, acc.shape[1])
    inside = (i < q_len)[:, None] & (j < kv_len)[None, :]
    if WIDE.j:
        acc = tl.expand_dims(tl.sum(acc, 1), 1)
        inside = (i < q_len)[:, None]
        j = tl.zeros([1], tl.int32)
    if WIDE.i:
        acc = tl.expand_dims(tl.sum(acc, 0), 0)
        inside = tl.sum(inside.to(tl.int32), 0)[None, :] > 0
        i = tl.zeros([1], tl.int32)
    at = at + i[:, None].to(tl.int64) * stride_i + j[None, :].to(tl.int64) * stride_j
    tl.store(at, acc, mask=inside)


@triton.jit(do_not_specialize=["q_len", "kv_len", "shift", "left", "right", "threshold", "batch"])
def attention_bwd_bias(
    q,
    k,
    v,
    bias,
    mask,
    key_mask,
    slopes,
    seed,
    dout,
    terms,
    dbias,
    q_stride_b,
    q_stride_h,
    q_stride_s,
    k_stride_b,
    k_stride_h,
    k_stride_s,
    v_stride_b,
    v_stride_h,
    v_stride_s,
    bias_stride_b,
    bias_stride_h,
    bias_stride_i,
    bias_stride_j,
    mask_stride_b,
    mask_stride_h,
    mask_stride_i,
    mask_stride_j,
    slopes_stride_b,
    dout_stride_b,
    dout_stride_h,
    dout_stride_s,
    dbias_stride_b,
    dbias_stride_h,
    dbias_stride_i,
    dbias_stride_j,
    batch,
    heads,
    kv_heads,
    q_len,
    kv_len,
    shift,
    left,
    right,
    scale,
    softcap,
    threshold,
    drop_scale,
    FORM: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dbias, of bias's shape; grid: (blocks of i, of j, * heads * batches, each 1 if broadcast,).

    WIDE = (b, h, i, j): is the dim of bias 1.
    """
    pid = tl.program_id(0)
    count_j = 1 if WIDE.j else tl.cdiv(kv_len, BLOCK_N)
    count_i = 1 if WIDE.i else tl.cdiv(q_len, BLOCK_M)
    count_h = 1 if WIDE.h else heads
    first_j, last_j = one_or_all(pid % count_j, BLOCK_N, kv_len, WIDE.j)
    first_i, last_i = one_or_all(pid // count_j % count_i, BLOCK_M, q_len, WIDE.i)
    place = pid // count_j // count_i
    first_h, last_h = one_or_all(place % count_h, 1, heads, WIDE.h)
    first_b, last_b = one_or_all(place // count_h, 1, batch, WIDE.b)
    size = (q_len, kv_len, shift, left, right)
    factor = LOG2E
    drop = (seed, threshold, drop_scale)
    if FORM.dropout:
        drop = (load_keys(seed), threshold, drop_scale)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for b in range(first_b, last_b):
        # No name of its own for the mask: Triton cannot assign a None inside a loop.
        side = (bias, bias_stride_j, mask, mask_stride_j, key_mask)
        if FORM.key_mask:
            seen = key_mask + tl.cast(b, tl.int64) * kv_len
            side = (bias, bias_stride_j, mask, mask_stride_j, seen)
        for head in range(first_h, last_h):
            kv_head = head // (heads // kv_heads)
            q_base, q_stride = open_head(b, head, (q, q_stride_b, q_stride_h, q_stride_s))
            do_base, do_stride = open_head(b, head, (dout, dout_stride_b, dout_stride_h,
                                                     dout_stride_s))  # fmt: skip
            keys = open_head(b, kv_head, (k, k_stride_b, k_stride_h, k_stride_s))
            values = open_head(b, kv_head, (v, v_stride_b, v_stride_h, v_stride_s))
            slab = b * heads + head
            for i0 in range(first_i, last_i, BLOCK_M):
                i = i0 + tl.arange(0, BLOCK_M)
                offsets = open_sides(
                    b, head, i, (bias_stride_b, bias_stride_h, bias_stride_i),
                    (mask_stride_b, mask_stride_h, mask_stride_i), (slopes, slopes_stride_b), 1,
                    FORM
                )  # fmt: skip
                qt = load_rows(q_base, i0, q_stride, q_len, BLOCK_M, FORM.head_dim, FORM.block_d,
                               True)  # fmt: skip
                dot = load_rows(do_base, i0, do_stride, q_len, BLOCK_M, FORM.value_dim,
                                FORM.block_dv, True)  # fmt: skip
                row = load_terms(terms, tl.cast(slab, tl.int64) * q_len, i, q_len, True)
                last = tl.minimum(i0 + BLOCK_M, q_len) - 1
                begin, full_begin, full_end, end = band(
                    i0, last, kv_len, shift, left, right, FORM.left, FORM.right, BLOCK_N
                )
                for j0 in range(tl.maximum(begin, first_j), tl.minimum(end, last_j), BLOCK_N):
                    ds, visible, kt = query_tiles(
                        qt, dot, keys, values, row, j0, i, slab, offsets, size, side,
                        (factor, scale, softcap), drop, True, FORM, True, BLOCK_N
                    )  # fmt: skip
                    acc += tl.where((i < q_len)[:, None], ds, 0.0)
    at = dbias + (place % count_h).to(tl.int64) * dbias_stride_h
    at += (place // count_h).to(tl.int64) * dbias_stride_b
    store_sums(at, (dbias_stride_i, dbias_stride_j), first_i, first_j, acc, q_len, kv_len, WIDE)


@triton.jit(do_not_specialize=["batch", "q_len"])
def attention_bwd_sinks(
    sinks,
    lse,
    terms,
    dsinks,
    batch,
    heads,
    q_len,
    BLOCK: tl.constexpr,
):
    """dsinks [H]; grid: (H,)."""
    head = tl.program_id(0)
    sink = tl.load(sinks + head).to(tl.float32)
    acc = tl.zeros([BLOCK], tl.float32)
    for b in range(batch):
        at = (tl.cast(b, tl.int64) * heads + head) * q_len
        for i0 in range(0, q_len, BLOCK):
            i = i0 + tl.arange(0, BLOCK)
            row = tl.load(lse + at + i, mask=i < q_len, other=-INFINITY)
            toward = tl.load(terms + (at + i) * 2 + 1, mask=i < q_len, other=0.0)
            p = tl.exp2((sink - row) * LOG2E)
            acc += tl.where(row == -INFINITY, 0.0, p * toward)
    tl.store(dsinks + head, tl.sum(acc, 0))
