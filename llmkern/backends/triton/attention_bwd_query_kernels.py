"""Attention backward, the pass for dq: a block of queries a program. Formulas and pair_gradients:
attention_bwd_kernels.py; the meaning of FORM, size, side, rule: attention_mask_kernels.py.
"""

import triton
import triton.language as tl

from llmkern.backends.triton.attention_bwd_kernels import (
    load_terms,
    pair_gradients,
    pulled_product,
)
from llmkern.backends.triton.attention_mask_kernels import (
    CAREFUL_COLUMNS,
    CAREFUL_KEYS,
    LOG2E,
    band,
    careful_result,
    careful_sum,
    kept,
    load_columns,
    load_rows,
    not_finite,
    open_head,
    open_sides,
    store_rows,
)
from llmkern.backends.triton.philox_kernels import load_keys


@triton.jit
def query_tiles(qt, dot, k, v, row, j0, i, slab, offsets, size, side, rule, drop,
                OF_BIAS: tl.constexpr, FORM: tl.constexpr, EDGE: tl.constexpr,
                BLOCK_N: tl.constexpr):  # fmt: skip
    """(ds [BLOCK_M, BLOCK_N], visible, the rows of k) of the block of keys j0."""
    kv_len = size[1]
    minus_level, minus_delta = row
    minus_level, minus_delta = minus_level[:, None], minus_delta[:, None]
    keys, threshold, drop_scale = drop
    bounded: tl.constexpr = EDGE and FORM.tail_edge
    k_base, k_stride = k
    v_base, v_stride = v
    kt = load_rows(k_base, j0, k_stride, kv_len, BLOCK_N, FORM.head_dim, FORM.block_d, bounded)
    vt = load_rows(v_base, j0, v_stride, kv_len, BLOCK_N, FORM.value_dim, FORM.block_dv, bounded)
    qk = tl.dot(qt, tl.trans(kt), input_precision=FORM.precision)
    dp = pulled_product(dot, tl.trans(vt), minus_delta, FORM)
    keep = False
    if FORM.dropout:
        keep = kept(keys, slab, i, j0, threshold, BLOCK_N)
    _, ds, visible = pair_gradients(
        qk, dp, keep, i[:, None], tl.arange(0, BLOCK_N)[None, :], 0, j0, (minus_level, minus_delta),
        offsets, size, side, rule, drop_scale, OF_BIAS, FORM, EDGE
    )  # fmt: skip
    return ds, visible, kt


@triton.jit
def gather_keys(dq, qt, dot, k, v, row, begin, end, i, slab, offsets, size, side, rule, drop,
                FORM: tl.constexpr, EDGE: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """dq (but for scale) of a block of queries, brought forward over the keys begin .. end."""
    for j0 in range(begin, end, BLOCK_N):
        j0 = tl.multiple_of(j0, BLOCK_N)
        ds, visible, kt = query_tiles(qt, dot, k, v, row, j0, i, slab, offsets, size, side, rule,
                                      drop, False, FORM, EDGE, BLOCK_N)  # fmt: skip
        dq = tl.dot(ds.to(kt.dtype), kt, dq, input_precision=FORM.precision)
    return dq


@triton.jit
def gather_keys_carefully(dq, dq_stride, i0, scale, qt, dot, k, v, row, begin, end, i, slab,
                          offsets, size, side, rule, drop, FORM: tl.constexpr):  # fmt: skip
    """Overwrite the block's rows of dq with what `gather_keys` gives, had hidden rows of k been
    finite; a few columns at a time."""
    q_len = size[0]
    kv_len = size[1]
    k_base, k_stride = k
    for column in range(0, FORM.block_d, CAREFUL_COLUMNS):
        zero = tl.zeros([qt.shape[0], CAREFUL_COLUMNS], tl.float32)
        totals = (zero, zero, zero)
        for j0 in tl.range(begin, end, CAREFUL_KEYS, num_stages=1):
            ds, visible, kt = query_tiles(qt, dot, k, v, row, j0, i, slab, offsets, size, side,
                                          rule, drop, False, FORM, True, CAREFUL_KEYS)  # fmt: skip
            met = load_columns(k_base, j0, k_stride, kv_len, column, FORM.head_dim, CAREFUL_KEYS,
                               CAREFUL_COLUMNS)  # fmt: skip
            totals = careful_sum(totals, ds, visible, met, FORM.precision)
        store_rows(dq, i0, dq_stride, q_len, column, FORM.head_dim,
                   careful_result(totals) * scale)  # fmt: skip


@triton.jit
def query_block(i0, b, head, kv_head, heads, q, k, v, dout, dq, terms, strides, size, side, rule,
                drop, FORM: tl.constexpr, BLOCK_M: tl.constexpr,
                BLOCK_N: tl.constexpr):  # fmt: skip
    """dq of a block of queries, stored. q, k, v, dout, dq: whole tensors."""
    q_len, kv_len, shift, left, right = size
    slab = b * heads + head
    i = i0 + tl.arange(0, BLOCK_M)
    offsets = open_sides(b, head, tl.minimum(i, q_len - 1), *strides, 1, FORM)
    q_base, q_stride = open_head(b, head, q)
    do_base, do_stride = open_head(b, head, dout)
    qt = load_rows(q_base, i0, q_stride, q_len, BLOCK_M, FORM.head_dim, FORM.block_d, True)
    dot = load_rows(do_base, i0, do_stride, q_len, BLOCK_M, FORM.value_dim, FORM.block_dv, True)
    row = load_terms(terms, tl.cast(slab, tl.int64) * q_len, i, q_len, True)
    keys = open_head(b, kv_head, k)
    values = open_head(b, kv_head, v)
    last = tl.minimum(i0 + BLOCK_M, q_len) - 1
    begin, full_begin, full_end, end = band(
        i0, last, kv_len, shift, left, right, FORM.left, FORM.right, BLOCK_N
    )
    width: tl.constexpr = FORM.block_d
    acc = tl.zeros([BLOCK_M, width], tl.float32)
    if FORM.left:
        acc = gather_keys(acc, qt, dot, keys, values, row, begin, full_begin, i, slab, offsets,
                          size, side, rule, drop, FORM, True, BLOCK_N)  # fmt: skip
    acc = gather_keys(acc, qt, dot, keys, values, row, full_begin, full_end, i, slab, offsets, size,
                      side, rule, drop, FORM, False, BLOCK_N)  # fmt: skip
    if FORM.right_edge:
        acc = gather_keys(acc, qt, dot, keys, values, row, full_end, end, i, slab, offsets, size,
                          side, rule, drop, FORM, True, BLOCK_N)  # fmt: skip
    dq_base, dq_stride = open_head(b, head, dq)
    store_rows(dq_base, i0, dq_stride, q_len, 0, FORM.head_dim, acc * rule[1])
    if FORM.hides:
        if not_finite(tl.where((i < q_len)[:, None], acc, 0.0)) != 0.0:
            gather_keys_carefully(dq_base, dq_stride, i0, rule[1], qt, dot, keys, values, row,
                                  begin, end, i, slab, offsets, size, side, rule, drop,
                                  FORM)  # fmt: skip


@triton.jit(do_not_specialize=["q_len", "kv_len", "shift", "left", "right", "threshold"])
def attention_bwd_queries(
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
    dq,
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
    dq_stride_b,
    dq_stride_h,
    dq_stride_s,
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
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    AGAIN: tl.constexpr,
):
    """dq [B, H, S, D]; grid: (blocks of queries * B * H,). AGAIN: of those blocks alone that hold
    something not finite, which a key that they do not see may have brought in."""
    tiles = tl.cdiv(q_len, BLOCK_M)
    slab = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    if FORM.right:  # later rows see more keys: they start first
        tile = tiles - 1 - tile
    i0 = tile * BLOCK_M
    b = slab // heads
    head = slab % heads
    kv_head = head // (heads // kv_heads)
    if FORM.key_mask:
        key_mask += tl.cast(b, tl.int64) * kv_len
    size = (q_len, kv_len, shift, left, right)
    side = (bias, bias_stride_j, mask, mask_stride_j, key_mask)
    factor = LOG2E if FORM.natural else scale * LOG2E
    rule = (factor, scale, softcap)
    drop = (seed, threshold, drop_scale)
    if FORM.dropout:
        drop = (load_keys(seed), threshold, drop_scale)
    strides = (
        (bias_stride_b, bias_stride_h, bias_stride_i),
        (mask_stride_b, mask_stride_h, mask_stride_i),
        (slopes, slopes_stride_b),
    )
    of_q = (q, q_stride_b, q_stride_h, q_stride_s)
    of_k = (k, k_stride_b, k_stride_h, k_stride_s)
    of_v = (v, v_stride_b, v_stride_h, v_stride_s)
    of_do = (dout, dout_stride_b, dout_stride_h, dout_stride_s)
    of_dq = (dq, dq_stride_b, dq_stride_h, dq_stride_s)
    if AGAIN:
        at, stride = open_head(b, head, of_dq)
        found = load_rows(at, i0, stride, q_len, BLOCK_M, FORM.head_dim, FORM.block_d,
                          FORM.tail_edge)  # fmt: skip
        if not_finite(found.to(tl.float32)) != 0.0:
            query_block(i0, b, head, kv_head, heads, of_q, of_k, of_v, of_do, of_dq, terms, strides,
                        size, side, rule, drop, FORM, BLOCK_M, BLOCK_N)  # fmt: skip
    else:
        query_block(i0, b, head, kv_head, heads, of_q, of_k, of_v, of_do, of_dq, terms, strides,
                    size, side, rule, drop, FORM, BLOCK_M, BLOCK_N)  # fmt: skip
