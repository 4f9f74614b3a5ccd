"""Device functions shared by the attention kernels: which blocks of keys (or queries) a block
meets, what a tile's scores are and which pairs are visible, tile loads, sums that hidden NaN does
not reach. Formula: csrc/include/llmkern/attention.h.

Index tensors i (queries) and j (keys) are int32, count from scalars i0 and j0, and broadcast
against each other, so one function serves S [M, N] with i [M, 1], j [1, N] and its transpose with
i [1, M], j [N, 1]. What does not move in a loop counts from 0.

FORM is tiles_attention.Form: what the call has, as compile-time facts. Tuples that go together:
    size = (q_len, kv_len, shift, left, right), int32
    side = (bias, bias_stride_j, mask, mask_stride_j, key_mask), pointers at the batch's origin
    rule = (factor, scale, softcap), float32; p = exp2(factor * (score - row maximum))
Scores are <q, k> itself where nothing but scale acts on them (factor holds scale), else the s_ij of
the formula.
"""

import triton
import triton.language as tl

from llmkern.backends.triton import _launch
from llmkern.backends.triton.philox_kernels import attention_keep

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
INFINITY = tl.constexpr(float("inf"))
# The careful passes take little at a time: what they need then fits beside what waits for them.
INTERPRETED = tl.constexpr(_launch.interpreted())  # the interpreter knows no PTX
CAREFUL_COLUMNS = tl.constexpr(16)
CAREFUL_KEYS = tl.constexpr(32)
CAREFUL_QUERIES = tl.constexpr(32)


@triton.jit
def band(first, last, length, shift, left, right, LEFT: tl.constexpr, RIGHT: tl.constexpr,
         BLOCK: tl.constexpr):  # fmt: skip
    """(begin, full_begin, full_end, end) of the places that first..last meet in 0..length: from
    begin to end somebody sees somebody, from full_begin to full_end all see all. The first three
    are multiples of BLOCK, or end.

    Place x meets y iff x + shift - left <= y <= x + shift + right. The places that meet a block of
    keys are those with shift negated, left and right exchanged.
    """
    begin = first * 0
    full_begin = begin
    end = begin + length
    full_end = end
    if LEFT:
        begin = tl.maximum(first + shift - left, 0) // BLOCK * BLOCK
        full_begin = (tl.maximum(last + shift - left, 0) + BLOCK - 1) // BLOCK * BLOCK
    if RIGHT:
        end = tl.minimum(tl.maximum(last + shift + right + 1, 0), end)
        full_end = tl.minimum(tl.maximum(first + shift + right + 1, 0), end)
    full_begin = tl.minimum(full_begin, end)
    full_end = tl.maximum(full_end // BLOCK * BLOCK, full_begin)
    return begin, full_begin, full_end, end


@triton.jit
def load_rows(base, first, stride, rows, BLOCK_R: tl.constexpr, COLS: tl.constexpr,
              BLOCK_C: tl.constexpr, BOUNDED: tl.constexpr):  # fmt: skip
    """Rows first .. first + BLOCK_R of a matrix with last stride 1, [BLOCK_R, BLOCK_C]; 0 beyond
    `rows` (only looked at if BOUNDED) and COLS. Offsets inside a tile have 32 bits: the row stride
    is below 2^24 (attention._rows)."""
    r = tl.arange(0, BLOCK_R)
    c = tl.arange(0, BLOCK_C)
    at = base + tl.cast(first, tl.int64) * stride + (r[:, None] * stride + c[None, :]).to(tl.uint32)
    if BOUNDED:
        inside = (first + r < rows)[:, None]
        if COLS < BLOCK_C:
            inside = inside & (c < COLS)[None, :]
        return tl.load(at, mask=inside, other=0.0)
    if COLS < BLOCK_C:
        return tl.load(at, mask=(c < COLS)[None, :], other=0.0)
    return tl.load(at)


@triton.jit
def open_head(b, head, tensor):
    """(first row, row stride) of a head of a [B, heads, length, dim] tensor."""
    at, stride_b, stride_h, stride_row = tensor
    at = at + tl.cast(b, tl.int64) * stride_b + tl.cast(head, tl.int64) * stride_h
    return at, stride_row


@triton.jit
def open_sides(b, head, i, bias, mask, slopes, AXIS: tl.constexpr, FORM: tl.constexpr):
    """(bias_rows, mask_rows, slope) of queries i [M] of `head` (or of head [M]), spread along AXIS
    of a tile; 0 for what the call has not."""
    bias_rows = 0
    mask_rows = 0
    slope = 0.0
    b = tl.cast(b, tl.int64)
    head = i * 0 + tl.cast(head, tl.int64)
    if FORM.bias:
        stride_b, stride_h, stride_i = bias
        bias_rows = tl.expand_dims(b * stride_b + head * stride_h + i.to(tl.int64) * stride_i, AXIS)
    if FORM.mask:
        stride_b, stride_h, stride_i = mask
        mask_rows = tl.expand_dims(b * stride_b + head * stride_h + i.to(tl.int64) * stride_i, AXIS)
    if FORM.slopes:
        at, stride_b = slopes
        slope = tl.expand_dims(tl.load(at + b * stride_b + head), AXIS)
    return bias_rows, mask_rows, slope


@triton.jit
def load_columns(base, first, stride, rows, column, COLS: tl.constexpr, BLOCK_R: tl.constexpr,
                 BLOCK_C: tl.constexpr):  # fmt: skip
    """[BLOCK_R, BLOCK_C] from row `first` and column `column` on, 0 beyond rows and COLS."""
    r = tl.arange(0, BLOCK_R)
    c = column + tl.arange(0, BLOCK_C)
    at = base + tl.cast(first, tl.int64) * stride + (r[:, None] * stride + c[None, :])
    return tl.load(at, mask=(first + r < rows)[:, None] & (c < COLS)[None, :], other=0.0)


@triton.jit
def store_rows(base, first, stride, rows, column, COLS: tl.constexpr, tile):
    """Rounds `tile` [R, C] once and stores it at row `first`, column `column` of a matrix with
    `rows` rows and COLS columns."""
    r = tl.arange(0, tile.shape[0])
    c = column + tl.arange(0, tile.shape[1])
    at = base + tl.cast(first, tl.int64) * stride + (r[:, None] * stride + c[None, :])
    inside = (first + r < rows)[:, None] & (c < COLS)[None, :]
    tl.store(at, tile.to(base.dtype.element_ty), mask=inside)


@triton.jit
def tanh(x, SHARP: tl.constexpr):
    """1 - 2 / (e^2x + 1), which is off by 1e-7 and saturates right; SHARP: to 3 ulp also near 0."""
    y = 1.0 - 2.0 / (tl.exp2(x * (2.0 * LOG2E)) + 1.0)
    if SHARP:
        # Below 0.55 the difference cancels: x + x^3 P(x^2), least squares on that range (4e-9).
        z = x * x
        small = -6.29149e-3
        small = small * z + 2.108577e-2
        small = small * z - 5.385613e-2
        small = small * z + 1.3332625e-1
        small = small * z - 3.3333319e-1
        y = tl.where(z < 0.3025, small * z * x + x, y)
    return y


@triton.jit
def columns_up_to(last, COLS: tl.constexpr):
    """[R, COLS]: whether a column, counted from 0, is at most last [R, 1]. In a product's layout a
    thread has columns 8 a + e + lane part with constants a and e: comparing these takes neither a
    register for each column nor, as comparing whole tiles of indices would, LLVM to vectorise the
    comparisons and unpack their bits one by one."""
    lane = tl.reshape(tl.arange(0, 4) * 2, [1, 1, 4, 1])
    own = tl.arange(0, COLS // 8)[:, None] * 8 + tl.arange(0, 2)[None, :]
    own = tl.reshape(own, [1, COLS // 8, 1, 2])
    rows: tl.constexpr = last.shape[0]
    return tl.reshape(own <= tl.reshape(last, [rows, 1, 1, 1]) - lane, [rows, COLS])


@triton.jit
def in_band(i, j, i0, j0, size, FORM: tl.constexpr):
    """Is key j0 + j there and in the window of query i0 + i. One of i and j is a row 0, 1, ..."""
    q_len, kv_len, shift, left, right = size
    if i.shape[1] == 1:
        if FORM.right and not FORM.tail_edge:
            last = i + (i0 + shift + right - j0)
        else:
            last = i * 0 + (kv_len - 1 - j0)
            if FORM.right:
                last = tl.minimum(i + (i0 + shift + right - j0), last)
        visible = columns_up_to(last, j.shape[1])
        if FORM.left:
            hidden = columns_up_to(i + (i0 + shift - left - j0 - 1), j.shape[1])
            visible = visible & (hidden == 0)
    else:
        before = j * 0 - i0 - 1
        if FORM.right:
            before = j + (j0 - shift - right - i0 - 1)
        if FORM.tail_edge:
            before = tl.where(j < kv_len - j0, before, q_len - i0)
        visible = columns_up_to(before, i.shape[1]) == 0
        if FORM.tail_edge:  # queries that do not exist have scores too: 0 times a key's infinity
            visible = visible & columns_up_to(j * 0 + (q_len - 1 - i0), i.shape[1])
        if FORM.left:
            visible = visible & columns_up_to(j + (j0 - shift + left - i0), i.shape[1])
    return visible


@triton.jit
def tile_scores(qk, i, j, i0, j0, bias_rows, mask_rows, slope, size, side, rule,
                FORM: tl.constexpr, EDGE: tl.constexpr):  # fmt: skip
    """(scores, visible, derivative of softcap) of a tile of dot products, queries i0 + i and keys
    j0 + j. Hidden scores can be anything, NaN included. Nothing is to be done with visible if
    neither EDGE nor FORM.masked, nor with the derivative without FORM.softcap.

    bias_rows, mask_rows: int64, offset of each query's row of bias and mask; slope: of each query.
    EDGE: the tile may reach over the band or over the last key.
    """
    q_len, kv_len, shift, left, right = size
    bias, bias_stride_j, mask, mask_stride_j, key_mask = side
    factor, scale, softcap = rule
    s = qk
    derivative = qk
    if FORM.softcap:
        capped = tanh(qk * (scale / softcap), FORM.sharp)
        derivative = 1.0 - capped * capped
        s = capped * softcap
    elif FORM.natural:
        s = qk * scale
    inside = i < q_len - i0
    visible = inside
    if EDGE:
        inside = inside & (j < kv_len - j0)
        visible = in_band(i, j, i0, j0, size, FORM)
    at = j.to(tl.int64) + j0
    if FORM.bias:
        b = tl.load(bias + bias_rows + at * bias_stride_j, mask=inside, other=0.0)
        s = s + b
        visible = visible & (b != -INFINITY)
    if FORM.slopes:
        s = s - slope * tl.abs(j - i + (j0 - i0 - shift)).to(tl.float32)
    if FORM.mask:
        m = tl.load(mask + mask_rows + at * mask_stride_j, mask=inside, other=0)
        visible = visible & (m != 0)
    if FORM.key_mask:
        visible = visible & (tl.load(key_mask + at, mask=at < kv_len, other=0) != 0)
    return s, visible, derivative


@triton.jit
def log2(x, SHARP: tl.constexpr):
    """Logarithm of sums of 1 and more, or 0; unless SHARP by one instruction, to 2^-22."""
    if SHARP or INTERPRETED:
        return tl.log2(x)
    return tl.inline_asm_elementwise(
        "lg2.approx.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def exponential(s, least, rule, FORM: tl.constexpr):
    """exp2(factor * (s - least)): the fused multiply-add saves an instruction, the difference first
    is exact where s is near least."""
    factor, scale, softcap = rule
    if FORM.sharp:
        return tl.exp2((s - least) * factor)
    return tl.exp2(s * factor - least * factor)


@triton.jit
def kept(keys, slab, i, j0, threshold, BLOCK_N: tl.constexpr):
    """Dropout mask [M, BLOCK_N] of queries i [M] and the keys from j0, a multiple of 8, on."""
    k0, k1 = keys
    return attention_keep(k0, k1, slab, i, j0 // 8 + tl.arange(0, BLOCK_N // 8), threshold)


@triton.jit
def not_finite(x):
    """0.0 where all of a tile is finite, else NaN; also NaN where the sum of it overflows, which
    costs a careful pass and no more. One reduction: for sm_100 Triton 3.7 cannot lower one after
    the other."""
    return tl.sum(tl.reshape(x, [x.shape[0] * x.shape[1]]), 0) * 0.0


@triton.jit
def careful_sum(totals, weights, visible, rows, PRECISION: tl.constexpr):
    """totals + weights [M, N] @ rows [N, E] in which row n meets only the m that see it: a weight
    of 0 does not keep NaN out of a product. totals = (sum of finite products, how many rows that
    are not finite were seen, how many of them pull to +inf less how many to -inf)."""
    exact, count, pull = totals
    dtype: tl.constexpr = rows.dtype
    wide = rows.to(tl.float32)
    strange = (wide * 0.0 != 0.0).to(tl.float32)
    exact = tl.dot(weights.to(dtype), tl.where(strange != 0.0, 0.0, wide).to(dtype), exact,
                   input_precision=PRECISION)  # fmt: skip
    count = tl.dot(visible.to(tl.float32).to(dtype), strange.to(dtype), count)
    sign = (weights > 0.0).to(tl.float32) - (weights < 0.0).to(tl.float32)
    end = (wide == INFINITY).to(tl.float32) - (wide == -INFINITY).to(tl.float32)
    return exact, count, tl.dot(sign.to(dtype), end.to(dtype), pull)


@triton.jit
def careful_result(totals):
    """What IEEE arithmetic gives for the sum over the visible rows."""
    exact, count, pull = totals
    special = tl.where(pull == count, INFINITY, tl.where(pull == -count, -INFINITY, float("nan")))
    return tl.where(count == 0.0, exact, special)
