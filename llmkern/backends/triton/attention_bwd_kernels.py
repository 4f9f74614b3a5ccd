"""Attention backward with recomputed probabilities (Dao, "FlashAttention-2", 2023).

    p_ij = exp(s_ij - lse_i), dropped and scaled in o and dv;  dp_ij = drop(<do_i, v_j>)
    delta_i = <do_i, o_i> - dlse_i;                            ds_ij = p_ij (dp_ij - delta_i)
    dv_j = sum_i drop(p_ij) do_i;  dk_j = scale sum_i ds_ij q_i;  dq_i = scale sum_j ds_ij k_j

One pass for dk and dv by blocks of keys, which also sums over the query heads of a kv head, and one
for dq by blocks of queries: each sum belongs to one program, in an order that the lengths decide.
The first works on transposed tiles [keys, queries], whose p and ds are then left operands as they
lie. Index conventions and the meaning of FORM, size, side, rule: attention_mask_kernels.py.
"""

import triton
import triton.language as tl

from llmkern.backends.triton.attention_mask_kernels import (
    CAREFUL_COLUMNS,
    CAREFUL_QUERIES,
    INFINITY,
    LOG2E,
    band,
    careful_result,
    careful_sum,
    kept,
    load_columns,
    load_rows,
    open_head,
    open_sides,
    store_rows,
    tile_scores,
)
from llmkern.backends.triton.philox_kernels import load_keys


@triton.jit
def pair_gradients(qk, dp, keep, i, j, i0, j0, terms, offsets, size, side, rule, drop_scale,
                   OF_BIAS: tl.constexpr, FORM: tl.constexpr, EDGE: tl.constexpr):  # fmt: skip
    """(p as dv takes it but for drop_scale, ds, visible) of a tile, from <q, k> and dp as
    `pulled_product` gives it. ds is the gradient of <q, k> scale, which softcap acts on, or OF_BIAS
    of what is added after it."""
    bias_rows, mask_rows, slope = offsets
    minus_level, minus_delta = terms
    s, visible, derivative = tile_scores(qk, i, j, i0, j0, bias_rows, mask_rows, slope, size, side,
                                         rule, FORM, EDGE)  # fmt: skip
    if FORM.sharp:
        p = tl.exp2((s + minus_level) * rule[0])
    else:
        p = tl.exp2(s * rule[0] + minus_level)
    if EDGE or FORM.masked:
        p = tl.where(visible, p, 0.0)
    weights = p
    if FORM.dropout:
        weights = tl.where(keep, p, 0.0)
        dp = tl.where(keep, dp * drop_scale, 0.0) + minus_delta
    ds = p * dp
    if FORM.softcap and not OF_BIAS:
        ds = ds * derivative
    if EDGE or FORM.masked:
        ds = tl.where(visible, ds, 0.0)
    return weights, ds, visible


@triton.jit
def pulled_product(a, b, minus_delta, FORM: tl.constexpr):
    """<do, v> of a tile, plus minus_delta, which costs nothing where a product starts from it;
    dropout acts before it is added."""
    if FORM.dropout:
        return tl.dot(a, b, input_precision=FORM.precision)
    start = tl.broadcast_to(minus_delta, [a.shape[0], b.shape[1]])
    return tl.dot(a, b, start, input_precision=FORM.precision)


@triton.jit
def load_terms(terms, at, i, q_len, EDGE: tl.constexpr):
    """(-level, -delta) of queries i, as `attention_terms` stored them from `at` on."""
    c = tl.arange(0, 2)[None, :]
    place = terms + at * 2 + (i[:, None] * 2 + c)
    if EDGE:  # a query that does not exist has p = exp2(-inf)
        return tl.split(tl.load(place, mask=(i < q_len)[:, None],
                                other=tl.where(c == 0, -INFINITY, 0.0)))  # fmt: skip
    return tl.split(tl.load(place))


@triton.jit(do_not_specialize=["q_len"])
def attention_terms(
    out,
    dout,
    lse,
    dlse,
    terms,
    out_stride_b,
    out_stride_h,
    out_stride_s,
    dout_stride_b,
    dout_stride_h,
    dout_stride_s,
    heads,
    q_len,
    scale,
    FORM: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BOUNDED: tl.constexpr,
):
    """terms [B H S, 2], what backward needs of a row (b * H + h) * S + i: (-level, -delta), level
    being lse as `pair_gradients` takes it, +inf for rows that see nothing. Both are to be added: an
    fma takes one, a product starts from the other. Grid: (blocks of rows * B * H,)."""
    tiles = tl.cdiv(q_len, BLOCK_R)
    unit = tl.program_id(0) // tiles
    first = tl.program_id(0) % tiles * BLOCK_R
    b, head = unit // heads, unit % heads
    i = first + tl.arange(0, BLOCK_R)
    live = i < q_len
    r = tl.cast(unit, tl.int64) * q_len + i
    at, stride = open_head(b, head, (out, out_stride_b, out_stride_h, out_stride_s))
    o = load_rows(at, first, stride, q_len, BLOCK_R, FORM.value_dim, FORM.block_dv, BOUNDED)
    at, stride = open_head(b, head, (dout, dout_stride_b, dout_stride_h, dout_stride_s))
    do = load_rows(at, first, stride, q_len, BLOCK_R, FORM.value_dim, FORM.block_dv, BOUNDED)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    if dlse is not None:
        delta = delta - tl.load(dlse + r, mask=live, other=0.0)
    row = tl.load(lse + r, mask=live, other=0.0)
    if not FORM.sharp:
        known = row * LOG2E
    elif FORM.natural:
        known = row
    else:
        known = row / scale
    pair = tl.join(tl.where(row == -INFINITY, -INFINITY, -known), -delta)
    tl.store(terms + (r[:, None] * 2 + tl.arange(0, 2)[None, :]), pair, mask=live[:, None])


@triton.jit
def key_tiles(kt, vt, q, do, terms, at, i0, i, j, slab, j0, offsets, size, side, rule, drop,
              FORM: tl.constexpr, EDGE: tl.constexpr, BLOCK_M: tl.constexpr,
              BLOCK_N: tl.constexpr):  # fmt: skip
    """(weights, ds, visible), all [BLOCK_N, BLOCK_M], and the rows of q and do of block i0."""
    q_len = size[0]
    keys, threshold, drop_scale = drop
    bounded: tl.constexpr = EDGE and FORM.tail_edge
    q_base, q_stride = q
    do_base, do_stride = do
    qt = load_rows(q_base, i0, q_stride, q_len, BLOCK_M, FORM.head_dim, FORM.block_d, bounded)
    minus_level, minus_delta = load_terms(terms, at, i, q_len, bounded)
    minus_level, minus_delta = minus_level[None, :], minus_delta[None, :]
    qk = tl.dot(kt, tl.trans(qt), input_precision=FORM.precision)
    dot = load_rows(do_base, i0, do_stride, q_len, BLOCK_M, FORM.value_dim, FORM.block_dv, bounded)
    dp = pulled_product(vt, tl.trans(dot), minus_delta, FORM)
    keep = False
    if FORM.dropout:
        keep = tl.trans(kept(keys, slab, i, j0, threshold, BLOCK_N))
    weights, ds, visible = pair_gradients(
        qk, dp, keep, tl.arange(0, BLOCK_M)[None, :], j[:, None], i0, 0, (minus_level, minus_delta),
        offsets, size, side, rule, drop_scale, False, FORM, EDGE
    )  # fmt: skip
    return weights, ds, visible, qt, dot


@triton.jit
def gather_queries(dk, dv, kt, vt, q, do, terms, begin, end, j0, b, head, heads, strides, size,
                   side, rule, drop, FORM: tl.constexpr, EDGE: tl.constexpr, BLOCK_M: tl.constexpr,
                   BLOCK_N: tl.constexpr):  # fmt: skip
    """dk (but for scale) and dv (but for drop_scale) of a block of keys, brought forward over the
    queries begin .. end of one head. q, do: whole tensors."""
    bias_strides, mask_strides, slopes = strides
    slab = b * heads + head
    at = tl.cast(slab, tl.int64) * size[0]
    of_q = open_head(b, head, q)
    of_do = open_head(b, head, do)
    j = j0 + tl.arange(0, BLOCK_N)
    for i0 in range(begin, end, BLOCK_M):
        i0 = tl.multiple_of(i0, BLOCK_M)
        i = i0 + tl.arange(0, BLOCK_M)
        offsets = open_sides(b, head, i, bias_strides, mask_strides, slopes, 0, FORM)
        weights, ds, visible, qt, dot = key_tiles(
            kt, vt, of_q, of_do, terms, at, i0, i, j, slab, j0, offsets, size, side, rule, drop,
            FORM, EDGE, BLOCK_M, BLOCK_N
        )  # fmt: skip
        dv = tl.dot(weights.to(dot.dtype), dot, dv, input_precision=FORM.precision)
        dk = tl.dot(ds.to(qt.dtype), qt, dk, input_precision=FORM.precision)
    return dk, dv


@triton.jit
def gather_carefully(result, result_stride, scale, kt, vt, q, do, terms, begin, end, j0, b,
                     first_head, group, heads, strides, size, side, rule, drop, OF_V: tl.constexpr,
                     FORM: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """Overwrite the block's rows of dv (OF_V) or dk with what `gather_queries` gives, had hidden
    rows of do and q been finite; a few columns at a time. q, do: whole tensors."""
    bias_strides, mask_strides, slopes = strides
    q_len = size[0]
    kv_len = size[1]
    j = j0 + tl.arange(0, BLOCK_N)
    width: tl.constexpr = FORM.block_dv if OF_V else FORM.block_d
    cols: tl.constexpr = FORM.value_dim if OF_V else FORM.head_dim
    for column in range(0, width, CAREFUL_COLUMNS):
        zero = tl.zeros([BLOCK_N, CAREFUL_COLUMNS], tl.float32)
        totals = (zero, zero, zero)
        for n in range(group):
            head = first_head + n
            slab = b * heads + head
            at = tl.cast(slab, tl.int64) * q_len
            of_q = open_head(b, head, q)
            of_do = open_head(b, head, do)
            for i0 in tl.range(begin, end, CAREFUL_QUERIES, num_stages=1):
                i = i0 + tl.arange(0, CAREFUL_QUERIES)
                offsets = open_sides(b, head, i, bias_strides, mask_strides, slopes, 0, FORM)
                weights, ds, visible, qt, dot = key_tiles(
                    kt, vt, of_q, of_do, terms, at, i0, i, j, slab, j0, offsets, size, side, rule,
                    drop, FORM, True, CAREFUL_QUERIES, BLOCK_N
                )  # fmt: skip
                base, stride = of_q
                if OF_V:
                    base, stride = of_do
                    ds = weights
                met = load_columns(base, i0, stride, q_len, column, cols, CAREFUL_QUERIES,
                                   CAREFUL_COLUMNS)  # fmt: skip
                visible = visible & (i < q_len)[None, :]
                ds = tl.where(visible, ds, 0.0)
                totals = careful_sum(totals, ds, visible, met, FORM.precision)
        store_rows(result, j0, result_stride, kv_len, column, cols,
                   careful_result(totals) * scale)  # fmt: skip


@triton.jit
def finish_keys(sum_k, sum_v, kt, vt, dk, dv, q, do, terms, begin, end, j0, b, kv_head, group,
                heads, strides, size, side, rule, drop, FORM: tl.constexpr,
                BLOCK_N: tl.constexpr):  # fmt: skip
    """Stores a block's dk and dv from their sums over the queries begin .. end; once more with care
    if a query that does not see them may have brought NaN in. dk, dv, q, do: whole tensors."""
    kv_len = size[1]
    scale = rule[1]
    drop_scale = drop[2]
    dk_base, dk_stride = open_head(b, kv_head, dk)
    dv_base, dv_stride = open_head(b, kv_head, dv)
    store_rows(dk_base, j0, dk_stride, kv_len, 0, FORM.head_dim, sum_k * scale)
    store_rows(dv_base, j0, dv_stride, kv_len, 0, FORM.value_dim, sum_v * drop_scale)
    if FORM.hides:
        totals = tl.sum(sum_k, 1) + tl.sum(sum_v, 1)
        if FORM.tail_edge:
            totals = tl.where(j0 + tl.arange(0, BLOCK_N) < kv_len, totals, 0.0)
        if tl.sum(totals, 0) * 0.0 != 0.0:
            for of_v in tl.static_range(2):
                gather_carefully(
                    dv_base if of_v else dk_base, dv_stride if of_v else dk_stride,
                    drop_scale if of_v else scale, kt, vt, q, do, terms, begin, end, j0, b,
                    kv_head * group, group, heads, strides, size, side, rule, drop, of_v == 1,
                    FORM, BLOCK_N
                )  # fmt: skip


@triton.jit(do_not_specialize=["q_len", "kv_len", "shift", "left", "right", "threshold"])
def attention_bwd_keys(
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
    dk,
    dv,
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
    dk_stride_b,
    dk_stride_h,
    dk_stride_s,
    dv_stride_b,
    dv_stride_h,
    dv_stride_s,
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
):
    """dk [B, G, T, D] and dv [B, G, T, Dv]; grid: (blocks of keys * B * G,)."""
    tiles = tl.cdiv(kv_len, BLOCK_N)
    unit = tl.program_id(0) // tiles
    b, kv_head, group = unit // kv_heads, unit % kv_heads, heads // kv_heads
    j0 = tl.program_id(0) % tiles * BLOCK_N
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
    k_base, k_stride = open_head(b, kv_head, (k, k_stride_b, k_stride_h, k_stride_s))
    v_base, v_stride = open_head(b, kv_head, (v, v_stride_b, v_stride_h, v_stride_s))
    kt = load_rows(k_base, j0, k_stride, kv_len, BLOCK_N, FORM.head_dim, FORM.block_d, True)
    vt = load_rows(v_base, j0, v_stride, kv_len, BLOCK_N, FORM.value_dim, FORM.block_dv, True)
    last = tl.minimum(j0 + BLOCK_N, kv_len) - 1
    begin, full_begin, full_end, end = band(
        j0, last, q_len, -shift, right, left, FORM.right, FORM.left, BLOCK_M
    )
    if FORM.tail_edge:
        full_end = tl.where(j0 + BLOCK_N > kv_len, full_begin, full_end)
    of_q = (q, q_stride_b, q_stride_h, q_stride_s)
    of_do = (dout, dout_stride_b, dout_stride_h, dout_stride_s)
    sum_k = tl.zeros(kt.shape, tl.float32)
    sum_v = tl.zeros(vt.shape, tl.float32)
    for n in range(group):
        head = kv_head * group + n
        if FORM.right:
            sum_k, sum_v = gather_queries(
                sum_k, sum_v, kt, vt, of_q, of_do, terms, begin, full_begin, j0, b, head, heads,
                strides, size, side, rule, drop, FORM, True, BLOCK_M, BLOCK_N
            )  # fmt: skip
        sum_k, sum_v = gather_queries(
            sum_k, sum_v, kt, vt, of_q, of_do, terms, full_begin, full_end, j0, b, head, heads,
            strides, size, side, rule, drop, FORM, False, BLOCK_M, BLOCK_N
        )  # fmt: skip
        if FORM.tail_edge:
            sum_k, sum_v = gather_queries(
                sum_k, sum_v, kt, vt, of_q, of_do, terms, full_end, end, j0, b, head, heads,
                strides, size, side, rule, drop, FORM, True, BLOCK_M, BLOCK_N
            )  # fmt: skip
    finish_keys(sum_k, sum_v, kt, vt, (dk, dk_stride_b, dk_stride_h, dk_stride_s),
                (dv, dv_stride_b, dv_stride_h, dv_stride_s), of_q, of_do, terms, begin, end, j0, b,
                kv_head, group, heads, strides, size, side, rule, drop, FORM, BLOCK_N)  # fmt: skip
