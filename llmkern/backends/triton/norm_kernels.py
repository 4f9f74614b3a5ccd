"""LayerNorm and RMSNorm, forward; formulas: csrc/include/llmkern/norm.h.

norm_fwd: a program walks over blocks of ROWS rows, each CHUNKS tiles [ROWS, CHUNK] wide and all in
registers, so a row is read once. Weight and bias stay in registers from block to block. Sums are
taken lane by lane over the chunks, then once across lanes. norm_fwd_wide: a row too long for that
is read twice, CHUNK columns at a time.

Columns have stride 1; y and z are contiguous. Rows that do not exist are read as the last one and
not written. EVEN: cols == CHUNK * CHUNKS, no column masks. DROPOUT: 0 none, 1 with cols a multiple
of 8, 2 any. LANES: lanes that share a row in a warp.
`rows` changes from batch to batch and is not specialised; cols and strides are a model's own, and
16-byte loads need to know that they are multiples of 16.
"""

import triton
import triton.language as tl

from llmkern.backends.triton.philox_kernels import flat_keep, load_keys

VARYING = ["rows", "eps", "threshold", "scale"]
# Differences of finite elements, and sums of 2^32 of them, do not overflow.
OFFSET_SCALE = tl.constexpr(2.0**-33)


@triton.jit
def load_affine(
    pointer, cols,
    UNIT_OFFSET: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """A weight or bias as CHUNKS tiles [ROWS, CHUNK] in float32, every row the same.

    Loaded once a program and passed on to the warps of the other rows through shared memory, before
    the loop over rows: loads of whole tiles are ROWS times the bytes.
    """
    pieces = ()
    for c in tl.static_range(CHUNKS):
        col = c * CHUNK + tl.arange(0, CHUNK)
        if EVEN:
            piece = tl.load(pointer + col).to(tl.float32)
        else:
            piece = tl.load(pointer + col, mask=col < cols, other=0.0).to(tl.float32)
        if UNIT_OFFSET:
            piece += 1.0
        pieces = pieces + (piece[None, :] + tl.zeros([ROWS, CHUNK], tl.float32),)
    return pieces


@triton.jit
def load_tile(pointer, row, stride, col, cols, EVEN: tl.constexpr):
    """[ROWS, CHUNK] in float32; 0 beyond cols."""
    offset = (row * stride)[:, None] + col[None, :]
    if EVEN:
        return tl.load(pointer + offset).to(tl.float32)
    return tl.load(pointer + offset, mask=(col < cols)[None, :], other=0.0).to(tl.float32)


@triton.jit
def store_tile(pointer, row, exists, col, cols, value, EVEN: tl.constexpr):
    """Into a contiguous tensor, in its dtype."""
    offset = (row * cols)[:, None] + col[None, :]
    mask = exists[:, None] if EVEN else exists[:, None] & (col < cols)[None, :]
    tl.store(pointer + offset, value.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def keep_tile(
    k0, k1, row, cols, start, threshold,
    CHUNK: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """The dropout mask of a tile whose columns begin at `start`, a multiple of 8."""
    group = start + tl.arange(0, (CHUNK + 7) // 8) * 8
    first = (row * cols)[:, None] + group[None, :]
    return flat_keep(k0, k1, first, threshold, DROPOUT == 1)


@triton.jit
def _read(
    x, residual, y,
    row, x_stride, residual_stride, start, cols,
    k0, k1, threshold, scale,
    DROPOUT: tl.constexpr, CHUNK: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """drop(x) + residual of a tile, rounded as the next layer reads it; 0 beyond cols."""
    col = start + tl.arange(0, CHUNK)
    value = load_tile(x, row, x_stride, col, cols, EVEN)
    if DROPOUT:
        keep = keep_tile(k0, k1, row, cols, start, threshold, CHUNK, DROPOUT)
        value = tl.where(keep, value * scale, 0.0)
    if residual is not None:
        value += load_tile(residual, row, residual_stride, col, cols, EVEN)
        value = value.to(y.dtype.element_ty).to(tl.float32)
    return value


@triton.jit
def _first(value, CHUNK: tl.constexpr):
    """Each row's first element, of its first tile. The mean is summed as an offset from it: exact
    where all elements are equal, and closer than a plain sum where they stand far from zero."""
    return tl.sum(tl.where((tl.arange(0, CHUNK) == 0)[None, :], value, 0.0), axis=1)


@triton.jit
def _offset(value, first, start, cols, CHUNK: tl.constexpr, EVEN: tl.constexpr):
    """Scaled differences of a tile from first; 0 beyond cols. No product is rounded."""
    offset = value * OFFSET_SCALE - first * OFFSET_SCALE
    if not EVEN:
        offset = tl.where((start + tl.arange(0, CHUNK) < cols)[None, :], offset, 0.0)
    return offset


@triton.jit
def _store_statistic(pointer, row, exists, value, LANES: tl.constexpr):
    """One value a row. Spread over the lanes of a row, of which the first writes: a store of a
    vector would gather it from the warps through shared memory."""
    lane = tl.arange(0, LANES)[None, :]
    spread = value[:, None] + tl.zeros([1, LANES], tl.float32)
    tl.store(pointer + row[:, None] + lane * 0, spread, mask=exists[:, None] & (lane == 0))


@triton.jit(do_not_specialize=VARYING)
def norm_fwd(
    x, residual, weight, bias, seed,
    y, z, statistics,
    x_stride, residual_stride,
    rows, cols,
    eps, threshold, scale,
    RMS: tl.constexpr, UNIT_OFFSET: tl.constexpr, DROPOUT: tl.constexpr,
    ROWS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, LANES: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    if weight is not None:
        w = load_affine(weight, cols, UNIT_OFFSET, ROWS, CHUNK, CHUNKS, EVEN)
    if bias is not None:
        b = load_affine(bias, cols, False, ROWS, CHUNK, CHUNKS, EVEN)
    k0, k1 = load_keys(seed) if DROPOUT else (0, 0)
    inverse = 1.0 / cols
    for block in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = block * ROWS + tl.arange(0, ROWS)
        exists = row < rows
        row = tl.minimum(row, rows - 1).to(tl.int64)
        pieces = ()
        total = tl.zeros([ROWS, CHUNK], tl.float32)
        for c in tl.static_range(CHUNKS):
            value = _read(x, residual, y, row, x_stride, residual_stride, c * CHUNK, cols,
                          k0, k1, threshold, scale, DROPOUT, CHUNK, EVEN)  # fmt: skip
            if z is not None:
                store_tile(z, row, exists, c * CHUNK + tl.arange(0, CHUNK), cols, value, EVEN)
            if RMS:
                total += value * value
            pieces = pieces + (value,)
        if not RMS:
            first = _first(pieces[0], CHUNK)
            for c in tl.static_range(CHUNKS):
                total += _offset(pieces[c], first[:, None], c * CHUNK, cols, CHUNK, EVEN)
            mean = tl.sum(total, axis=1) * (inverse / OFFSET_SCALE) + first
            total = tl.zeros([ROWS, CHUNK], tl.float32)
            rest = tl.zeros([ROWS, CHUNK], tl.float32)
            centred = ()
            for c in tl.static_range(CHUNKS):
                value = pieces[c] - mean[:, None]
                if not EVEN:
                    value = tl.where((c * CHUNK + tl.arange(0, CHUNK) < cols)[None, :], value, 0.0)
                total += value * value
                rest += value
                centred = centred + (value,)
            pieces = centred
            # Where the first element stands far from the others, the mean has the rounding of its
            # distance. Not a number where differences of huge elements overflowed: none then.
            shift = tl.sum(rest, axis=1) * inverse
            shift = tl.where(tl.abs(shift) < float("inf"), shift, 0.0)
            _store_statistic(statistics, row, exists, mean + shift, LANES)
        rstd = tl.rsqrt(tl.sum(total, axis=1) * inverse + eps)
        _store_statistic(statistics + (0 if RMS else rows), row, exists, rstd, LANES)
        for c in tl.static_range(CHUNKS):
            value = pieces[c] * rstd[:, None]
            if not RMS:
                value -= (shift * rstd)[:, None]
            if weight is not None:
                value *= w[c]
            if bias is not None:
                value += b[c]
            store_tile(y, row, exists, c * CHUNK + tl.arange(0, CHUNK), cols, value, EVEN)


@triton.jit(do_not_specialize=VARYING)
def norm_fwd_wide(
    x, residual, weight, bias, seed,
    y, z, statistics,
    x_stride, residual_stride,
    rows, cols,
    eps, threshold, scale,
    RMS: tl.constexpr, UNIT_OFFSET: tl.constexpr, DROPOUT: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """One program a row. Mean and squares of the blocks are merged pairwise (Chan, Golub and
    LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979),
    from the first block's mean on, which is an offset from the row's first element."""
    row = tl.program_id(0).to(tl.int64) + tl.zeros([1], tl.int64)
    exists = row < rows
    k0, k1 = load_keys(seed) if DROPOUT else (0, 0)
    mean = 0.0
    if not RMS:
        head = _read(x, residual, y, row, x_stride, residual_stride, 0, cols,
                     k0, k1, threshold, scale, DROPOUT, CHUNK, False)  # fmt: skip
        first = tl.sum(_first(head, CHUNK), axis=0)
        offset = tl.sum(_offset(head, first, 0, cols, CHUNK, False))
        mean = first + offset / tl.minimum(cols, CHUNK).to(tl.float32) * (1.0 / OFFSET_SCALE)
    squares = 0.0
    for start in range(0, cols, CHUNK):
        col = start + tl.arange(0, CHUNK)
        value = _read(x, residual, y, row, x_stride, residual_stride, start, cols,
                      k0, k1, threshold, scale, DROPOUT, CHUNK, False)  # fmt: skip
        if z is not None:
            store_tile(z, row, exists, col, cols, value, False)
        if RMS:
            squares += tl.sum(value * value)
        else:
            count = tl.minimum(cols - start, CHUNK).to(tl.float32)
            offset = tl.sum(_offset(value, mean, start, cols, CHUNK, False))
            away = offset / count * (1.0 / OFFSET_SCALE)
            value = tl.where((col < cols)[None, :], value - (mean + away), 0.0)
            share = count / (start + count)
            mean += away * share
            squares += tl.sum(value * value) + away * away * start * share
    rstd = tl.rsqrt(squares / cols + eps)
    if not RMS:
        tl.store(statistics + row, mean)
    tl.store(statistics + row + (0 if RMS else rows), rstd)
    for start in range(0, cols, CHUNK):
        col = start + tl.arange(0, CHUNK)
        value = _read(x, residual, y, row, x_stride, residual_stride, start, cols,
                      k0, k1, threshold, scale, DROPOUT, CHUNK, False)  # fmt: skip
        value = (value - mean) * rstd
        if weight is not None:
            w = tl.load(weight + col, mask=col < cols, other=0.0).to(tl.float32)
            value *= (w + 1.0 if UNIT_OFFSET else w)[None, :]
        if bias is not None:
            value += tl.load(bias + col, mask=col < cols, other=0.0).to(tl.float32)[None, :]
        store_tile(y, row, exists, col, cols, value, False)
