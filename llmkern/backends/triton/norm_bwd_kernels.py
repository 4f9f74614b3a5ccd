"""LayerNorm and RMSNorm, backward. With xhat = (z - mean) * rstd and g = dy * w:

    gradient of z = (g - xhat * mean(g * xhat) - mean(g)) * rstd + dz      (no mean(g) for RMSNorm)
    dx = drop(gradient)    dw = sum over rows of dy * xhat    db = sum over rows of dy

norm_bwd keeps the row on chip as norm_fwd does, and the sums over the rows of a program in
registers. Each program writes one partial sum [cols] and column_sum adds them up: two fixed orders,
no atomics. norm_bwd_wide and norm_bwd_affine take rows that are too long for that. dx None: only
the weight's and bias's gradients are wanted. Rows that do not exist have dy = 0. Means are taken
away before rstd multiplies, which is an instruction an element more than products and sums fused,
but rows far from zero keep their digits.
Layout, flags and what is specialised: norm_kernels.py.
"""

import triton
import triton.language as tl

from llmkern.backends.triton.norm_kernels import (
    VARYING,
    keep_tile,
    load_affine,
    load_tile,
    store_tile,
)
from llmkern.backends.triton.philox_kernels import load_keys


@triton.jit
def _load_rows(dy, row, exists, stride, col, cols, EVEN: tl.constexpr):
    """A tile of dy in float32; 0 in rows that do not exist and beyond cols."""
    offset = (row * stride)[:, None] + col[None, :]
    mask = exists[:, None] if EVEN else exists[:, None] & (col < cols)[None, :]
    return tl.load(dy + offset, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _sum_rows(value, ROWS: tl.constexpr, CHUNK: tl.constexpr):
    """[ROWS, CHUNK] -> [CHUNK] by halves. tl.split wants a column's rows in one thread, so shared
    memory is crossed once; tl.sum would cross it twice and take 24 shuffles a lane for 8 rows."""
    value = tl.trans(value)
    for halving in tl.static_range(10):
        if (ROWS >> halving) > 1:
            even, odd = tl.split(tl.reshape(value, [CHUNK, ROWS >> (halving + 1), 2]))
            value = even + odd
    return tl.reshape(value, [CHUNK])


@triton.jit
def _load_xhat(z, row, stride, col, cols, mean, rstd, RMS: tl.constexpr, EVEN: tl.constexpr):
    """A tile; 0 beyond cols, where a mean of 1e37 would give Inf."""
    xhat = (load_tile(z, row, stride, col, cols, EVEN) - mean) * rstd
    if not EVEN and not RMS:
        xhat = tl.where((col < cols)[None, :], xhat, 0.0)
    return xhat


@triton.jit
def _of_gradient(rstd, cols, RMS: tl.constexpr):
    """rstd, but 0 where a layer norm's row of one element has no gradient: the compiler may fuse
    the product g into g - mean(g), which then keeps its rounding."""
    if RMS:
        return rstd
    return tl.where(cols == 1, 0.0, rstd)


@triton.jit
def _finish(
    gradient, dz, dx, dresidual,
    row, exists, dz_stride, start, cols,
    k0, k1, threshold, scale,
    DROPOUT: tl.constexpr, CHUNK: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Add what reached z itself, store the residual's gradient and, masked, x's."""
    col = start + tl.arange(0, CHUNK)
    if dz is not None:
        gradient += load_tile(dz, row, dz_stride, col, cols, EVEN)
    if dresidual is not None:
        store_tile(dresidual, row, exists, col, cols, gradient, EVEN)
    if DROPOUT:
        keep = keep_tile(k0, k1, row, cols, start, threshold, CHUNK, DROPOUT)
        gradient = tl.where(keep, gradient * scale, 0.0)
    store_tile(dx, row, exists, col, cols, gradient, EVEN)


@triton.jit(do_not_specialize=VARYING)
def norm_bwd(
    dy, dz, z, weight, statistics, seed,
    dx, dresidual, dweight, dbias,
    dy_stride, dz_stride, z_stride,
    rows, cols,
    threshold, scale,
    RMS: tl.constexpr, UNIT_OFFSET: tl.constexpr, DROPOUT: tl.constexpr,
    ROWS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """dweight, dbias: float32 [programs, cols], a partial sum a program; None: not wanted."""
    if weight is not None and dx is not None:
        w = load_affine(weight, cols, UNIT_OFFSET, ROWS, CHUNK, CHUNKS, EVEN)
    k0, k1 = load_keys(seed) if DROPOUT and dx is not None else (0, 0)
    inverse = 1.0 / cols
    dw, db = (), ()
    for _ in tl.static_range(CHUNKS):
        if dweight is not None:
            dw = dw + (tl.zeros([ROWS, CHUNK], tl.float32),)
        if dbias is not None:
            db = db + (tl.zeros([ROWS, CHUNK], tl.float32),)
    for block in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = block * ROWS + tl.arange(0, ROWS)
        exists = row < rows
        row = tl.minimum(row, rows - 1).to(tl.int64)
        rstd = tl.load(statistics + row + (0 if RMS else rows))[:, None]
        mean = 0.0 if RMS else tl.load(statistics + row)[:, None]
        gs, xhats, dws, dbs = (), (), (), ()
        along = tl.zeros([ROWS, CHUNK], tl.float32)
        total = tl.zeros([ROWS, CHUNK], tl.float32)
        for c in tl.static_range(CHUNKS):
            col = c * CHUNK + tl.arange(0, CHUNK)
            d = _load_rows(dy, row, exists, dy_stride, col, cols, EVEN)
            xhat = _load_xhat(z, row, z_stride, col, cols, mean, rstd, RMS, EVEN)
            if dweight is not None:
                dws = dws + (dw[c] + d * xhat,)
            if dbias is not None:
                dbs = dbs + (db[c] + d,)
            if dx is not None:
                g = d
                if weight is not None:
                    g = d * w[c]
                along += g * xhat
                total += g
                gs, xhats = gs + (g,), xhats + (xhat,)
        dw, db = dws, dbs
        if dx is not None:
            rstd = _of_gradient(rstd, cols, RMS)
            along_rstd = (tl.sum(along, axis=1) * -inverse)[:, None] * rstd
            level = 0.0 if RMS else (tl.sum(total, axis=1) * inverse)[:, None]
            for c in tl.static_range(CHUNKS):
                gradient = (gs[c] - level) * rstd + xhats[c] * along_rstd
                _finish(gradient, dz, dx, dresidual, row, exists, dz_stride, c * CHUNK, cols,
                        k0, k1, threshold, scale, DROPOUT, CHUNK, EVEN)  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * cols
    for c in tl.static_range(CHUNKS):
        col = c * CHUNK + tl.arange(0, CHUNK)
        if dweight is not None:
            tl.store(dweight + start + col, _sum_rows(dw[c], ROWS, CHUNK), mask=col < cols)
        if dbias is not None:
            tl.store(dbias + start + col, _sum_rows(db[c], ROWS, CHUNK), mask=col < cols)


@triton.jit(do_not_specialize=VARYING)
def norm_bwd_wide(
    dy, dz, z, weight, statistics, seed,
    dx, dresidual,
    dy_stride, dz_stride, z_stride,
    rows, cols,
    threshold, scale,
    RMS: tl.constexpr, UNIT_OFFSET: tl.constexpr, DROPOUT: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """dx and dresidual, one program a row."""
    row = tl.program_id(0).to(tl.int64) + tl.zeros([1], tl.int64)
    exists = row < rows
    k0, k1 = load_keys(seed) if DROPOUT else (0, 0)
    rstd = tl.load(statistics + row + (0 if RMS else rows))[:, None]
    mean = 0.0 if RMS else tl.load(statistics + row)[:, None]
    along = tl.zeros([1, CHUNK], tl.float32)
    total = tl.zeros([1, CHUNK], tl.float32)
    for start in range(0, cols, CHUNK):
        col = start + tl.arange(0, CHUNK)
        g = load_tile(dy, row, dy_stride, col, cols, False)
        if weight is not None:
            w = tl.load(weight + col, mask=col < cols, other=0.0).to(tl.float32)
            g *= (w + 1.0 if UNIT_OFFSET else w)[None, :]
        along += g * _load_xhat(z, row, z_stride, col, cols, mean, rstd, RMS, False)
        total += g
    along_rstd = -tl.sum(along, axis=1)[:, None] / cols * rstd
    level = 0.0 if RMS else tl.sum(total, axis=1)[:, None] / cols
    for start in range(0, cols, CHUNK):
        col = start + tl.arange(0, CHUNK)
        g = load_tile(dy, row, dy_stride, col, cols, False)
        if weight is not None:
            w = tl.load(weight + col, mask=col < cols, other=0.0).to(tl.float32)
            g *= (w + 1.0 if UNIT_OFFSET else w)[None, :]
        xhat = (load_tile(z, row, z_stride, col, cols, False) - mean) * rstd
        gradient = (g - level) * rstd + xhat * along_rstd
        _finish(gradient, dz, dx, dresidual, row, exists, dz_stride, start, cols,
                k0, k1, threshold, scale, DROPOUT, CHUNK, False)  # fmt: skip


@triton.jit(do_not_specialize=VARYING)
def norm_bwd_affine(
    dy, z, statistics,
    dweight, dbias,
    dy_stride, z_stride,
    rows, cols,
    RMS: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Partial sums as norm_bwd writes them; grid (column blocks, parts): the second axis has 65535
    places at most."""
    col = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    dw = tl.zeros([ROWS, CHUNK], tl.float32)
    db = tl.zeros([ROWS, CHUNK], tl.float32)
    for block in range(tl.program_id(1), tl.cdiv(rows, ROWS), tl.num_programs(1)):
        row = block * ROWS + tl.arange(0, ROWS)
        exists = row < rows
        row = tl.minimum(row, rows - 1).to(tl.int64)
        d = _load_rows(dy, row, exists, dy_stride, col, cols, False)
        if dweight is not None:
            rstd = tl.load(statistics + row + (0 if RMS else rows))[:, None]
            mean = 0.0 if RMS else tl.load(statistics + row)[:, None]
            dw += d * ((load_tile(z, row, z_stride, col, cols, False) - mean) * rstd)
        db += d
    start = tl.program_id(1).to(tl.int64) * cols
    if dweight is not None:
        tl.store(dweight + start + col, tl.sum(dw, axis=0), mask=col < cols)
    if dbias is not None:
        tl.store(dbias + start + col, tl.sum(db, axis=0), mask=col < cols)


@triton.jit(do_not_specialize=["parts"])
def column_sum(
    first_parts, second_parts,
    first, second,
    parts, cols,
    PARTS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The sums over rows of one or two float32 matrices [parts, cols], by program_id(1)."""
    col = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    total = tl.zeros([PARTS, CHUNK], tl.float32)
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)
        offset = part.to(tl.int64)[:, None] * cols + col[None, :]
        mask = (part < parts)[:, None] & (col < cols)[None, :]
        if second is None or tl.program_id(1) == 0:
            total += tl.load(first_parts + offset, mask=mask, other=0.0)
        else:
            total += tl.load(second_parts + offset, mask=mask, other=0.0)
    result = tl.sum(total, axis=0)
    if second is None or tl.program_id(1) == 0:
        tl.store(first + col, result.to(first.dtype.element_ty), mask=col < cols)
    else:
        tl.store(second + col, result.to(second.dtype.element_ty), mask=col < cols)
