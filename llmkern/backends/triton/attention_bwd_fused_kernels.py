"""Attention backward in one pass, five products instead of the seven of two passes: a block of keys
a program, which also adds its part of dq. Formulas and key_tiles: attention_bwd_kernels.py; the
meaning of FORM, size, side, rule: attention_mask_kernels.py.

Many programs add to one block of dq, each when its turn has come: a lock a block counts who has
added. Additions then have one order, by keys, and results are bitwise repeatable. Programs take
tickets when they start, and whom a program waits for has a lower ticket: it has started, so waiting
ends whatever order the programs start in. Sums of dq are float32; who adds last rounds them.
"""

import triton
import triton.language as tl

from llmkern.backends.triton.attention_bwd_kernels import finish_keys, key_tiles
from llmkern.backends.triton.attention_mask_kernels import (
    LOG2E,
    band,
    load_rows,
    open_head,
    open_sides,
    store_rows,
)
from llmkern.backends.triton.philox_kernels import load_keys

# The barriers below are PTX of ours because Triton does not pipeline a loop that holds one of its
# own, nor one that holds a while loop.


@triton.jit
def wait_for_turn(lock, turn):
    """Returns, for all threads, when `turn` others have added. One thread looks; its acquire and
    the barrier show to all what the others stored."""
    tl.inline_asm_elementwise(
        """{
        .reg .pred other, early;
        .reg .u32 id, count;
        mov.u32 id, %tid.x;
        setp.ne.u32 other, id, 0;
        @other bra gone;
        look:
        ld.acquire.gpu.global.u32 count, [$1];
        setp.lt.u32 early, count, $2;
        @early bra look;
        gone:
        bar.sync 0;
        mov.u32 $0, 0;
        }""",
        "=r,l,r",
        [lock, turn],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def end_turn(lock):
    """Counts one more who has added, once all threads have stored."""
    tl.inline_asm_elementwise(
        """{
        .reg .pred first;
        .reg .u32 id;
        mov.u32 id, %tid.x;
        setp.eq.u32 first, id, 0;
        bar.sync 0;
        @first red.release.gpu.global.add.u32 [$1], 1;
        mov.u32 $0, 0;
        }""",
        "=r,l",
        [lock],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def dealt(tile, WARP_ROWS: tl.constexpr):
    """The numbers of `tile` [M, D], float32, in the order in which the threads of a product hold
    them: [M D], four neighbours a thread, the lanes of a warp after one another. WARP_ROWS: by how
    many warps Triton divides the rows of the product; another number costs time, no more."""
    rows: tl.constexpr = tile.shape[0] // (16 * WARP_ROWS)
    warps: tl.constexpr = tl.extra.cuda.num_warps() // WARP_ROWS
    cols: tl.constexpr = tile.shape[1] // (16 * warps)
    # Row: repetition, warp, half, lane / 4; column: repetition, tile, warp, lane % 4, element.
    parts = tl.reshape(tile, [rows, WARP_ROWS, 2, 8, cols, 2, warps, 4, 2])
    return tl.reshape(
        tl.permute(parts, [0, 2, 4, 1, 6, 3, 7, 5, 8]), [tile.shape[0] * tile.shape[1]]
    )


@triton.jit
def gathered(own, ROWS: tl.constexpr, COLS: tl.constexpr, WARP_ROWS: tl.constexpr):
    """The inverse of `dealt`."""
    rows: tl.constexpr = ROWS // (16 * WARP_ROWS)
    warps: tl.constexpr = tl.extra.cuda.num_warps() // WARP_ROWS
    cols: tl.constexpr = COLS // (16 * warps)
    parts = tl.reshape(own, [rows, 2, cols, WARP_ROWS, warps, 8, 4, 2, 2])
    return tl.reshape(tl.permute(parts, [0, 3, 1, 5, 2, 7, 4, 6, 8]), [ROWS, COLS])


@triton.jit
def add_in_turn(part, total, lock, i0, n, dq, size, right, scale, COLS: tl.constexpr,
                RIGHT: tl.constexpr, BLOCK_N: tl.constexpr, WARP_ROWS: tl.constexpr):  # fmt: skip
    """Adds `part` [M, D] of dq, from block n of the keys, to the sum in `total`, or with the last
    one stores the sum times scale. total: the M D numbers of this block of queries; dq: its first
    row and row stride."""
    q_len, kv_len, shift, _, _ = size
    block: tl.constexpr = part.shape[0]
    width: tl.constexpr = part.shape[1]
    at = total + tl.arange(0, block * width)
    own = dealt(part, WARP_ROWS)
    if n > 0:
        wait_for_turn(lock, n)
        own += tl.load(at)
    last = kv_len - 1
    if RIGHT:  # `band` sends a block of keys to whole blocks of queries, also beyond the last query
        last = tl.minimum(i0 + (block - 1) + shift + right, last)
    if n == last // BLOCK_N:
        base, stride = dq
        store_rows(base, i0, stride, q_len, 0, COLS, gathered(own, block, width, WARP_ROWS) * scale)
    else:
        tl.store(at, own)
        end_turn(lock)


@triton.jit
def gather_queries_in_turn(dk, dv, kt, vt, q, do, dq, sums, terms, begin, end, j0, b, head, heads,
                           strides, size, side, rule, drop, FORM: tl.constexpr, EDGE: tl.constexpr,
                           BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                           WARP_ROWS: tl.constexpr):  # fmt: skip
    """`gather_queries` that also adds to dq. q, do, dq: whole tensors; sums: (total, locks)."""
    bias_strides, mask_strides, slopes = strides
    total, locks = sums
    q_len = size[0]
    slab = b * heads + head
    at = tl.cast(slab, tl.int64) * q_len
    blocks = tl.cdiv(q_len, BLOCK_M)
    first = tl.cast(slab, tl.int64) * blocks
    of_q = open_head(b, head, q)
    of_do = open_head(b, head, do)
    of_dq = open_head(b, head, dq)
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
        ds = ds.to(qt.dtype)
        dk = tl.dot(ds, qt, dk, input_precision=FORM.precision)
        part = tl.dot(tl.trans(ds), kt, input_precision=FORM.precision)
        block = first + i0 // BLOCK_M
        add_in_turn(part, total + block * (BLOCK_M * FORM.block_d), locks + block, i0,
                    j0 // BLOCK_N, of_dq, size, size[4], rule[1], FORM.head_dim, FORM.right,
                    BLOCK_N, WARP_ROWS)  # fmt: skip
    return dk, dv


@triton.jit(do_not_specialize=["q_len", "kv_len", "shift", "left", "right", "threshold"])
def attention_bwd_fused(
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
    dk,
    dv,
    total,
    locks,
    ticket,
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
    WARP_ROWS: tl.constexpr,
):
    """dq [B, H, S, D], dk [B, G, T, D], dv [B, G, T, Dv] where every query's window begins at key 0
    and holds it. total: float32, BLOCK_M block_d numbers for each block of queries of each head;
    locks: an int32 0 for each of these; ticket: an int32 0. Grid: (blocks of keys * B * G,)."""
    tiles = tl.cdiv(kv_len, BLOCK_N)
    place = tl.atomic_add(ticket, 1, sem="relaxed", scope="gpu")
    unit = place // tiles
    b, kv_head, group = unit // kv_heads, unit % kv_heads, heads // kv_heads
    j0 = place % tiles * BLOCK_N
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
    kt = load_rows(k_base, j0, k_stride, kv_len, BLOCK_N, FORM.head_dim, FORM.block_d,
                   FORM.tail_edge)  # fmt: skip
    vt = load_rows(v_base, j0, v_stride, kv_len, BLOCK_N, FORM.value_dim, FORM.block_dv,
                   FORM.tail_edge)  # fmt: skip
    last = tl.minimum(j0 + BLOCK_N, kv_len) - 1
    begin, full_begin, full_end, end = band(
        j0, last, q_len, -shift, right, left, FORM.right, FORM.left, BLOCK_M
    )
    if FORM.tail_edge:
        full_end = tl.where(j0 + BLOCK_N > kv_len, full_begin, full_end)
    of_q = (q, q_stride_b, q_stride_h, q_stride_s)
    of_do = (dout, dout_stride_b, dout_stride_h, dout_stride_s)
    of_dq = (dq, dq_stride_b, dq_stride_h, dq_stride_s)
    sums = (total, locks)
    sum_k = tl.zeros(kt.shape, tl.float32)
    sum_v = tl.zeros(vt.shape, tl.float32)
    for n in range(group):
        head = kv_head * group + n
        if FORM.right:
            sum_k, sum_v = gather_queries_in_turn(
                sum_k, sum_v, kt, vt, of_q, of_do, of_dq, sums, terms, begin, full_begin, j0, b,
                head, heads, strides, size, side, rule, drop, FORM, True, BLOCK_M, BLOCK_N,
                WARP_ROWS
            )  # fmt: skip
        sum_k, sum_v = gather_queries_in_turn(
            sum_k, sum_v, kt, vt, of_q, of_do, of_dq, sums, terms, full_begin, full_end, j0, b,
            head, heads, strides, size, side, rule, drop, FORM, False, BLOCK_M, BLOCK_N, WARP_ROWS
        )  # fmt: skip
        if FORM.tail_edge:
            sum_k, sum_v = gather_queries_in_turn(
                sum_k, sum_v, kt, vt, of_q, of_do, of_dq, sums, terms, full_end, end, j0, b, head,
                heads, strides, size, side, rule, drop, FORM, True, BLOCK_M, BLOCK_N, WARP_ROWS
            )  # fmt: skip
    finish_keys(sum_k, sum_v, kt, vt, (dk, dk_stride_b, dk_stride_h, dk_stride_s),
                (dv, dv_stride_b, dv_stride_h, dv_stride_s), of_q, of_do, terms, begin, end, j0, b,
                kv_head, group, heads, strides, size, side, rule, drop, FORM, BLOCK_N)  # fmt: skip
