"""Attention forward: online softmax over blocks of keys (Milakov and Gimelshein, "Online normalizer
calculation for softmax", 2018), a block of queries a program (Dao, "FlashAttention-2", 2023).

A program's queries are rows of one head, or, PACKED, of all query heads that share a kv head: row r
is query r % S of the group's head r // S, so a few queries fill a tile. Key blocks outside the band
are never touched, and those wholly inside take no mask. Index conventions and the meaning of FORM,
size, side, rule: attention_mask_kernels.py.
"""

import triton
import triton.language as tl

from llmkern.backends.triton.attention_mask_kernels import (
    CAREFUL_COLUMNS,
    CAREFUL_KEYS,
    INFINITY,
    LN2,
    LOG2E,
    band,
    careful_result,
    careful_sum,
    exponential,
    kept,
    load_columns,
    load_rows,
    log2,
    not_finite,
    open_head,
    open_sides,
    tile_scores,
)
from llmkern.backends.triton.philox_kernels import load_keys


@triton.jit
def place(b, head, i, first, tensor, FORM: tl.constexpr):
    """(pointer, offset of each row from it) of queries i [M] in a [B, H, S, dim] tensor; 32 bits
    are enough for it unless the rows are of several heads."""
    at, stride_b, stride_h, stride_s = tensor
    at = at + tl.cast(b, tl.int64) * stride_b
    if FORM.packed:
        rows = head.to(tl.int64) * stride_h + i.to(tl.int64) * stride_s
    else:
        at = at + tl.cast(head, tl.int64) * stride_h + tl.cast(first, tl.int64) * stride_s
        rows = (i - first) * stride_s
    return at, rows


@triton.jit
def open_rows(pid, tiles, heads, kv_heads, q_len, FORM: tl.constexpr, BLOCK_M: tl.constexpr):
    """Who the program serves: (batch, kv head, query head (of each row if packed), query of each
    row, slab, first query, last query, rows that exist)."""
    group = heads // kv_heads
    tile = pid % tiles
    unit = pid // tiles
    r = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    if FORM.packed:
        b = unit // kv_heads
        kv_head = unit % kv_heads
        live = r < group * q_len
        # Rows beyond the last stand at it: theirs would be a head that bias and mask have not.
        row = tl.minimum(r, group * q_len - 1)
        head = kv_head * group + row // q_len
        i = row % q_len
        slab = (b * heads + head)[:, None]
        first = tile * 0
        last = q_len - 1
    else:
        b = unit // heads
        kv_head = unit % heads // group
        head = unit % heads
        i = r
        live = r < q_len
        slab = unit
        first = tile * BLOCK_M
        last = tl.minimum(first + BLOCK_M, q_len) - 1
    return b, kv_head, head, i, slab, first, last, live


@triton.jit
def load_queries(at, rows, live, FORM: tl.constexpr):
    """The rows of q, 0 where there is none and beyond head_dim."""
    c = tl.arange(0, FORM.block_d)
    inside = (c < FORM.head_dim)[None, :]
    if FORM.tail_edge:
        inside = inside & live[:, None]
    return tl.load(at + rows[:, None] + c[None, :], mask=inside, other=0.0)


@triton.jit
def start(sinks, head, live, FORM: tl.constexpr, BLOCK_M: tl.constexpr):
    """The state before the first key: a sink is a key with value 0."""
    width: tl.constexpr = FORM.block_dv
    top = tl.full([BLOCK_M], -INFINITY, tl.float32)
    total = tl.zeros([BLOCK_M, 8], tl.float32)
    if FORM.sinks:
        top = tl.load(sinks + (head + tl.arange(0, BLOCK_M) * 0), mask=live, other=0.0)
        first = (tl.arange(0, 8) == 0)[None, :]
        total = tl.where(first & (top != -INFINITY)[:, None], 1.0, 0.0)
    return tl.zeros([BLOCK_M, width], tl.float32), top, total


@triton.jit
def attend(state, q, k, v, begin, end, i, slab, offsets, size, side, rule, drop,
           FORM: tl.constexpr, EDGE: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """state = (sum of p v, row maximum, sums of p), brought forward over the keys begin .. end. The
    sums are [M, 8], of every eighth key: what one thread has, so that none is exchanged here."""
    acc, top, total = state
    k_base, k_stride = k
    v_base, v_stride = v
    bias_rows, mask_rows, slope = offsets
    kv_len = size[1]
    keys, threshold = drop
    factor = rule[0]
    for j0 in range(begin, end, BLOCK_N):
        j0 = tl.multiple_of(j0, BLOCK_N)
        kt = load_rows(k_base, j0, k_stride, kv_len, BLOCK_N, FORM.head_dim, FORM.block_d,
                       EDGE and FORM.tail_edge)  # fmt: skip
        qk = tl.dot(q, tl.trans(kt), input_precision=FORM.precision)
        s, visible, derivative = tile_scores(
            qk, i[:, None], tl.arange(0, BLOCK_N)[None, :], 0, j0, bias_rows, mask_rows, slope,
            size, side, rule, FORM, EDGE
        )  # fmt: skip
        if EDGE or FORM.masked:
            s = tl.where(visible, s, -INFINITY)
        higher = tl.maximum(top, tl.max(s, 1))
        least = higher
        if FORM.hides or FORM.sinks or FORM.split:  # else a row sees some key of every block
            least = tl.where(higher == -INFINITY, 0.0, higher)  # never inf - inf
        p = exponential(s, least[:, None], rule, FORM)
        fade = tl.exp2((top - least) * factor)
        total = total * fade[:, None] + tl.sum(tl.reshape(p, [p.shape[0], BLOCK_N // 8, 8]), 1)
        if FORM.dropout:
            p = tl.where(kept(keys, slab, i, j0, threshold, BLOCK_N), p, 0.0)
        acc = acc * fade[:, None]
        vt = load_rows(v_base, j0, v_stride, kv_len, BLOCK_N, FORM.value_dim, FORM.block_dv,
                       EDGE and FORM.tail_edge)  # fmt: skip
        acc = tl.dot(p.to(vt.dtype), vt, acc, input_precision=FORM.precision)
        top = higher
    return acc, top, total


@triton.jit
def half_of(acc):
    """Every other group of 8 rows of acc [M, E], enough to look for what hidden values brought in:
    a row of v that is not finite leaves its mark in each row of acc, 0 * inf being NaN."""
    groups: tl.constexpr = acc.shape[0] // 16
    parts = tl.permute(tl.reshape(acc, [groups, 2, 8, acc.shape[1]]), [0, 2, 3, 1])
    first, _ = tl.split(parts)
    return tl.reshape(first, [groups * 8, acc.shape[1]])


@triton.jit
def attend_carefully(out, out_rows, live, scale, lse, q, k, v, begin, end, i, slab, offsets, size,
                     side, rule, drop, FORM: tl.constexpr):  # fmt: skip
    """Overwrite the program's rows of `out`: what `attend` gives, had hidden rows of v been finite.
    A few columns at a time, for which the weights are computed again; q too is read again in parts,
    so that nothing of this takes registers in `attend`. q: (pointer, offsets of rows)."""
    q_base, q_rows = q
    k_base, k_stride = k
    v_base, v_stride = v
    bias_rows, mask_rows, slope = offsets
    kv_len = size[1]
    keys, threshold = drop
    least = tl.where(lse == -INFINITY, INFINITY, lse)
    for column in range(0, FORM.block_dv, CAREFUL_COLUMNS):
        zero = tl.zeros([live.shape[0], CAREFUL_COLUMNS], tl.float32)
        totals = (zero, zero, zero)
        for j0 in tl.range(begin, end, CAREFUL_KEYS, num_stages=1):
            qk = tl.zeros([live.shape[0], CAREFUL_KEYS], tl.float32)
            for channel in tl.range(0, FORM.block_d, CAREFUL_COLUMNS, num_stages=1):
                c = channel + tl.arange(0, CAREFUL_COLUMNS)
                part = tl.load(q_base + q_rows[:, None] + c[None, :], other=0.0,
                               mask=live[:, None] & (c < FORM.head_dim)[None, :])  # fmt: skip
                kt = load_columns(k_base, j0, k_stride, kv_len, channel, FORM.head_dim,
                                  CAREFUL_KEYS, CAREFUL_COLUMNS)  # fmt: skip
                qk = tl.dot(part, tl.trans(kt), qk, input_precision=FORM.precision)
            s, visible, derivative = tile_scores(
                qk, i[:, None], tl.arange(0, CAREFUL_KEYS)[None, :], 0, j0, bias_rows, mask_rows,
                slope, size, side, rule, FORM, True
            )  # fmt: skip
            p = exponential(s, least[:, None], rule, FORM)
            if FORM.dropout:
                p = tl.where(kept(keys, slab, i, j0, threshold, CAREFUL_KEYS), p, 0.0)
            p = tl.where(visible, p, 0.0)
            vt = load_columns(v_base, j0, v_stride, kv_len, column, FORM.value_dim, CAREFUL_KEYS,
                              CAREFUL_COLUMNS)  # fmt: skip
            totals = careful_sum(totals, p, visible, vt, FORM.precision)
        c = column + tl.arange(0, CAREFUL_COLUMNS)
        result = careful_result(totals) * scale
        tl.store(out + out_rows[:, None] + c[None, :], result.to(out.dtype.element_ty),
                 mask=live[:, None] & (c < FORM.value_dim)[None, :])  # fmt: skip


@triton.jit(do_not_specialize=["q_len", "kv_len", "shift", "left", "right", "chunk", "part_rows",
                               "threshold"])  # fmt: skip
def attention_fwd(
    q,
    k,
    v,
    bias,
    mask,
    key_mask,
    slopes,
    sinks,
    seed,
    out,
    lse,
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
    out_stride_b,
    out_stride_h,
    out_stride_s,
    heads,
    kv_heads,
    q_len,
    kv_len,
    shift,
    left,
    right,
    chunk,
    part_rows,
    scale,
    softcap,
    threshold,
    drop_scale,
    FORM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """out [B, H, S, Dv] and lse [B, H, S]; grid: (blocks of rows * units, splits).

    With FORM.split program (., n) takes the keys from n * chunk on, and its results go part_rows *
    n rows further on, in a stack of outputs with contiguous rows.
    """
    unit_rows = q_len
    if FORM.packed:
        unit_rows = q_len * (heads // kv_heads)
    tiles = tl.cdiv(unit_rows, BLOCK_M)
    pid = tl.program_id(0)
    if FORM.right:  # later rows see more keys: they start first
        pid = pid // tiles * tiles + (tiles - 1 - pid % tiles)
    b, kv_head, head, i, slab, first, last, live = open_rows(
        pid, tiles, heads, kv_heads, q_len, FORM, BLOCK_M
    )
    q_base, q_rows = place(b, head, i, first, (q, q_stride_b, q_stride_h, q_stride_s), FORM)
    tile_q = load_queries(q_base, q_rows, live, FORM)
    keys = open_head(b, kv_head, (k, k_stride_b, k_stride_h, k_stride_s))
    values = open_head(b, kv_head, (v, v_stride_b, v_stride_h, v_stride_s))
    offsets = open_sides(b, head, i, (bias_stride_b, bias_stride_h, bias_stride_i),
                         (mask_stride_b, mask_stride_h, mask_stride_i), (slopes, slopes_stride_b),
                         1, FORM)  # fmt: skip
    if FORM.key_mask:
        key_mask += tl.cast(b, tl.int64) * kv_len
    size = (q_len, kv_len, shift, left, right)
    side = (bias, bias_stride_j, mask, mask_stride_j, key_mask)
    factor, unit = scale * LOG2E, scale
    if FORM.natural:
        factor, unit = LOG2E, 1.0
    rule = (factor, scale, softcap)
    drop = (seed, threshold)
    if FORM.dropout:
        drop = (load_keys(seed), threshold)
    begin, full_begin, full_end, end = band(first, last, kv_len, shift, left, right, FORM.left,
                                            FORM.right, BLOCK_N)  # fmt: skip
    if FORM.split:
        part = tl.program_id(1)
        begin = tl.maximum(begin, part * chunk)
        end = tl.minimum(end, (part + 1) * chunk)
        full_begin = tl.minimum(tl.maximum(full_begin, begin), end)
        full_end = tl.maximum(tl.minimum(full_end, end), full_begin)
    state = start(sinks, head, live, FORM, BLOCK_M)
    if FORM.left:
        state = attend(state, tile_q, keys, values, begin, full_begin, i, slab, offsets, size,
                       side, rule, drop, FORM, True, BLOCK_N)  # fmt: skip
    if FORM.right_edge and FORM.sees_first and not FORM.split:
        # The last block counts as one of the edge, whose loop then runs in any case, and first:
        # what it has to set up serves the other loop too.
        full_end = tl.minimum(full_end, (end - 1) // BLOCK_N * BLOCK_N)
        tl.assume(full_end < end)
    if FORM.right_edge:
        state = attend(state, tile_q, keys, values, full_end, end, i, slab, offsets, size, side,
                       rule, drop, FORM, True, BLOCK_N)  # fmt: skip
    state = attend(state, tile_q, keys, values, full_begin, full_end, i, slab, offsets, size, side,
                   rule, drop, FORM, False, BLOCK_N)  # fmt: skip
    acc, top, parts = state
    total = tl.sum(parts, 1)
    row_lse = top * unit + log2(total, FORM.sharp) * LN2
    if FORM.hides or FORM.sinks or FORM.split:
        total = tl.where(total == 0.0, 1.0, total)
    acc = acc * (drop_scale / total)[:, None]
    lse_rows = (tl.cast(b, tl.int64) * heads + head) * q_len + i
    out, out_rows = place(b, head, i, first, (out, out_stride_b, out_stride_h, out_stride_s), FORM)
    if FORM.split:
        lse_rows = lse_rows + part * tl.cast(part_rows, tl.int64)
        out = out + part * tl.cast(part_rows, tl.int64) * FORM.value_dim
    c = tl.arange(0, FORM.block_dv)
    inside = (c < FORM.value_dim)[None, :]
    if FORM.tail_edge:
        inside = inside & live[:, None]
        tl.store(lse + lse_rows, row_lse, mask=live)
    else:
        tl.store(lse + lse_rows, row_lse)
    tl.store(out + out_rows[:, None] + c[None, :], acc.to(out.dtype.element_ty), mask=inside)
    if FORM.hides:
        if not_finite(half_of(acc)) != 0.0:
            rows_of_q = place(b, head, i, first, (q, q_stride_b, q_stride_h, q_stride_s), FORM)
            attend_carefully(out, out_rows, live, drop_scale, row_lse / unit, rows_of_q, keys,
                             values, begin, end, i, slab, offsets, size, side, rule, drop,
                             FORM)  # fmt: skip
