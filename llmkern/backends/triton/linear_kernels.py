"""The matrix product under linear layers, with what the layer does to it before its one store.

    z = A B^T + bias;  y = drop(act(z)) + residual                               MODE "plain"
    z = A B^T + bias, u = A C^T + up_bias;  y = drop(act(z) * u) + residual      MODE "gated"
    y = A B^T + D C^T                                                            MODE "sum"

A, D [M, K] and B, C [N, K] may have any strides, so one kernel serves the forward pass (x, W), the
input gradient (g, W^T) and the weight gradient (g^T, x^T) without transposing copies; formulas as
in csrc/include/llmkern/gemm.h. Sums are kept in float32 and rounded once.

With SPLIT_K > 1 each program of grid axis 1 multiplies a range of K and leaves its float32 tile in
a workspace [SPLIT_K, M, N] ([2 SPLIT_K, M, N] when gated: z, then u). `linear_join_kernel` adds
these in a fixed order and applies the epilogue, so the result is the same from run to run.
"""

import triton
import triton.language as tl

from llmkern.backends.triton.activation_kernels import act
from llmkern.backends.triton.philox_kernels import flat_keep, load_keys


@triton.jit
def tile_of(program, m, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """(tile row, tile column): columns of GROUP_M tile rows follow each other, so that programs
    which run at the same time share operands in the second-level cache."""
    tiles_m = tl.cdiv(m, BLOCK_M)
    tiles_n = tl.cdiv(n, BLOCK_N)
    in_group = GROUP_M * tiles_n
    first = program // in_group * GROUP_M
    height = min(tiles_m - first, GROUP_M)
    return first + program % in_group % height, program % in_group // height


@triton.jit
def load_tile(pointers, in_a, in_b, EVEN_A: tl.constexpr, EVEN_B: tl.constexpr):
    """A tile, 0 where one of the masks says no; EVEN: that mask is True everywhere."""
    if EVEN_A and EVEN_B:
        tile = tl.load(pointers)
    elif EVEN_B:
        tile = tl.load(pointers, mask=in_a, other=0.0)
    elif EVEN_A:
        tile = tl.load(pointers, mask=in_b, other=0.0)
    else:
        tile = tl.load(pointers, mask=in_a & in_b, other=0.0)
    return tile


@triton.jit
def store_tile(pointers, tile, in_a, in_b, EVEN_A: tl.constexpr, EVEN_B: tl.constexpr):
    """Stores a tile, rounded to the dtype of its destination, where both masks say yes."""
    tile = tile.to(pointers.dtype.element_ty)
    if EVEN_A and EVEN_B:
        tl.store(pointers, tile)
    elif EVEN_B:
        tl.store(pointers, tile, mask=in_a)
    elif EVEN_A:
        tl.store(pointers, tile, mask=in_b)
    else:
        tl.store(pointers, tile, mask=in_a & in_b)


@triton.jit
def _halves(tile):
    """Its left and its right half."""
    halves = tl.reshape(tile, [tile.shape[0], 2, tile.shape[1] // 2])
    return tl.split(tl.permute(halves, [0, 2, 1]))


@triton.jit
def _epilogue(
    z,
    u,
    bias,
    up_bias,
    residual,
    seed,
    y,
    preact,
    up_preact,
    stride_rm,
    first_row,  # int64, as is first_col
    first_col,
    m,
    n,
    threshold,
    scale,
    ACTIVATION: tl.constexpr,
    ALIGNED: tl.constexpr,
    EVEN_M: tl.constexpr,
    EVEN_N: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Everything between the float32 product z [BLOCK_M, BLOCK_N], u too when gated, and y."""
    row = tl.arange(0, z.shape[0])[:, None]
    col = tl.arange(0, z.shape[1])[None, :]
    if WIDE:
        row, col = row.to(tl.int64), col.to(tl.int64)
    in_m = row < m - first_row
    in_n = col < n - first_col
    start = first_row * n + first_col
    local = row * n + col
    if bias is not None:
        z += load_tile(bias + first_col + col, in_n, True, EVEN_N, True).to(tl.float32)
    if preact is not None:
        store_tile(preact + start + local, z, in_m, in_n, EVEN_M, EVEN_N)
    value = z
    if ACTIVATION is not None:
        value = act(z, ACTIVATION)
    if u is not None:
        if up_bias is not None:
            u += load_tile(up_bias + first_col + col, in_n, True, EVEN_N, True).to(tl.float32)
        if up_preact is not None:
            store_tile(up_preact + start + local, u, in_m, in_n, EVEN_M, EVEN_N)
        value *= u
    if seed is not None:
        k0, k1 = load_keys(seed)
        eights = tl.arange(0, z.shape[1] // 8)[None, :] * 8
        keep = flat_keep(k0, k1, start + (row * n + eights), threshold, ALIGNED)
        value = tl.where(keep, value * scale, 0.0)
    if residual is not None:
        pointers = residual + first_row * stride_rm + first_col + (row * stride_rm + col)
        value += load_tile(pointers, in_m, in_n, EVEN_M, EVEN_N).to(tl.float32)
    store_tile(y + start + local, value, in_m, in_n, EVEN_M, EVEN_N)


@triton.jit(do_not_specialize=["m"])
def linear_kernel(
    a,
    b,
    c,  # B's partner in modes "gated" and "sum"
    d,  # A's partner in mode "sum"
    bias,
    up_bias,
    residual,
    seed,
    y,  # the workspace when SPLIT_K > 1
    preact,
    up_preact,
    stride_am,
    stride_ak,
    stride_bn,
    stride_bk,
    stride_cn,
    stride_ck,
    stride_dm,
    stride_dk,
    stride_rm,
    m,
    n,
    k,
    k_part,  # of K for each program of axis 1, a multiple of BLOCK_K
    threshold,
    scale,
    MODE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ALIGNED: tl.constexpr,  # n is a multiple of 8
    PRECISION: tl.constexpr,
    SPLIT_K: tl.constexpr,
    EVEN_M: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    WIDE: tl.constexpr,  # a stride times a block's size passes 2^31
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    tile_m, tile_n = tile_of(tl.program_id(0), m, n, BLOCK_M, BLOCK_N, GROUP_M)
    first_row = tile_m.to(tl.int64) * BLOCK_M
    first_col = tile_n.to(tl.int64) * BLOCK_N
    row = tl.arange(0, BLOCK_M)[:, None]
    col = tl.arange(0, BLOCK_N)[None, :]
    inner_a = tl.arange(0, BLOCK_K)[None, :]
    inner_b = tl.arange(0, BLOCK_K)[:, None]
    if WIDE:
        row, col = row.to(tl.int64), col.to(tl.int64)
        inner_a, inner_b = inner_a.to(tl.int64), inner_b.to(tl.int64)
    in_m = row < m - first_row
    in_n = col < n - first_col
    if SPLIT_K > 1:
        part = tl.program_id(1).to(tl.int64)
        first_k = part * k_part
        k = min(k - first_k, k_part).to(tl.int32)
        a += first_k * stride_ak
        b += first_k * stride_bk
        if c is not None:
            c += first_k * stride_ck
        if d is not None:
            d += first_k * stride_dk
    a += first_row * stride_am + (row * stride_am + inner_a * stride_ak)
    b += first_col * stride_bn + (col * stride_bn + inner_b * stride_bk)
    step_a = tl.full([], BLOCK_K, tl.int64) * stride_ak
    step_b = tl.full([], BLOCK_K, tl.int64) * stride_bk
    z = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    u = None
    if MODE == "gated":
        u = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        c += first_col * stride_cn + (col * stride_cn + inner_b * stride_ck)
        step_c = tl.full([], BLOCK_K, tl.int64) * stride_ck
    for done in range(0, k, BLOCK_K):
        tile_a = load_tile(a, in_m, inner_a < k - done, EVEN_M, EVEN_K)
        z = tl.dot(
            tile_a,
            load_tile(b, in_n, inner_b < k - done, EVEN_N, EVEN_K),
            z,
            input_precision=PRECISION,
        )
        if MODE == "gated":
            tile_c = load_tile(c, in_n, inner_b < k - done, EVEN_N, EVEN_K)
            u = tl.dot(tile_a, tile_c, u, input_precision=PRECISION)
            c += step_c
        a += step_a
        b += step_b
    if MODE == "sum":
        c += first_col * stride_cn + (col * stride_cn + inner_b * stride_ck)
        step_c = tl.full([], BLOCK_K, tl.int64) * stride_ck
        d += first_row * stride_dm + (row * stride_dm + inner_a * stride_dk)
        step_d = tl.full([], BLOCK_K, tl.int64) * stride_dk
        for done in range(0, k, BLOCK_K):
            tile_d = load_tile(d, in_m, inner_a < k - done, EVEN_M, EVEN_K)
            tile_c = load_tile(c, in_n, inner_b < k - done, EVEN_N, EVEN_K)
            z = tl.dot(tile_d, tile_c, z, input_precision=PRECISION)
            d += step_d
            c += step_c
    if SPLIT_K > 1:
        plane = tl.cast(m, tl.int64) * n
        y += part * plane + first_row * n + first_col + (row * n + col)
        store_tile(y, z, in_m, in_n, EVEN_M, EVEN_N)
        if MODE == "gated":
            store_tile(y + SPLIT_K * plane, u, in_m, in_n, EVEN_M, EVEN_N)
    elif BLOCK_M * BLOCK_N >= 8192:  # half a tile at a time, for want of registers
        right_u = None
        if MODE == "gated":
            u, right_u = _halves(u)
        z, right_z = _halves(z)
        _epilogue(
            z, u, bias, up_bias, residual, seed, y, preact, up_preact, stride_rm, first_row,
            first_col, m, n, threshold, scale, ACTIVATION, ALIGNED, EVEN_M, EVEN_N, WIDE,
        )  # fmt: skip
        _epilogue(
            right_z, right_u, bias, up_bias, residual, seed, y, preact, up_preact, stride_rm,
            first_row, first_col + BLOCK_N // 2, m, n, threshold, scale, ACTIVATION, ALIGNED,
            EVEN_M, EVEN_N, WIDE,
        )  # fmt: skip
    else:
        _epilogue(
            z, u, bias, up_bias, residual, seed, y, preact, up_preact, stride_rm, first_row,
            first_col, m, n, threshold, scale, ACTIVATION, ALIGNED, EVEN_M, EVEN_N, WIDE,
        )  # fmt: skip


@triton.jit(do_not_specialize=["m"])
def linear_join_kernel(
    parts,  # [SPLIT_K, M, N], twice when GATED
    bias,
    up_bias,
    residual,
    seed,
    y,
    preact,
    up_preact,
    stride_rm,
    m,
    n,
    threshold,
    scale,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    ALIGNED: tl.constexpr,
    SPLIT_K: tl.constexpr,
    EVEN_M: tl.constexpr,
    EVEN_N: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_M
    first_col = tl.program_id(1).to(tl.int64) * BLOCK_N
    row = tl.arange(0, BLOCK_M)[:, None]
    col = tl.arange(0, BLOCK_N)[None, :]
    if WIDE:
        row, col = row.to(tl.int64), col.to(tl.int64)
    in_m = row < m - first_row
    in_n = col < n - first_col
    plane = tl.cast(m, tl.int64) * n
    parts += first_row * n + first_col + (row * n + col)
    z = load_tile(parts, in_m, in_n, EVEN_M, EVEN_N)
    for part in tl.static_range(1, SPLIT_K):
        z += load_tile(parts + part * plane, in_m, in_n, EVEN_M, EVEN_N)
    u = None
    if GATED:
        u = load_tile(parts + SPLIT_K * plane, in_m, in_n, EVEN_M, EVEN_N)
        for part in tl.static_range(SPLIT_K + 1, 2 * SPLIT_K):
            u += load_tile(parts + part * plane, in_m, in_n, EVEN_M, EVEN_N)
    _epilogue(
        z, u, bias, up_bias, residual, seed, y, preact, up_preact, stride_rm, first_row, first_col,
        m, n, threshold, scale, ACTIVATION, ALIGNED, EVEN_M, EVEN_N, WIDE,
    )  # fmt: skip
