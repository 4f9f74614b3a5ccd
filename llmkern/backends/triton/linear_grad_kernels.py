"""What stands in front of the backward products of a linear layer: one pass over dy.

    g = drop(dy) act'(z)                                        one product
    g = drop(dy) u act'(z),  gu = drop(dy) act(z)               gated
    dbias = sum of the rows of g (and gu)

Each program walks down a range of rows; its column sums go to a workspace [ranges, N] whose rows
are then added in a fixed order. The products themselves, dx = g W and dW = g^T x, are
those of linear_kernels.py.
"""

import triton
import triton.language as tl

from llmkern.backends.triton.activation_kernels import act, d_act
from llmkern.backends.triton.linear_kernels import load_tile, store_tile
from llmkern.backends.triton.norm_bwd_kernels import _sum_rows
from llmkern.backends.triton.philox_kernels import flat_keep, load_keys


@triton.jit(do_not_specialize=["m", "m_part"])
def linear_dpre_kernel(
    dy,
    preact,  # None without an activation
    up_preact,  # None unless gated
    seed,  # None without dropout
    g,  # None where only the sums are wanted
    gu,
    sums,  # [ranges, N] float32, or None
    up_sums,
    stride_dm,
    m,
    n,
    m_part,  # rows of a range, a multiple of BLOCK_M
    threshold,
    scale,
    ACTIVATION: tl.constexpr,
    ALIGNED: tl.constexpr,  # n is a multiple of 8
    EVEN_M: tl.constexpr,
    EVEN_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    part = tl.program_id(1).to(tl.int64)
    first_row = part * m_part
    first_col = tl.program_id(0).to(tl.int64) * BLOCK_N
    row = tl.arange(0, BLOCK_M)[:, None].to(tl.int64)
    col = tl.arange(0, BLOCK_N)[None, :]
    eights = tl.arange(0, BLOCK_N // 8)[None, :] * 8
    in_n = col < n - first_col
    start = first_row * n + first_col  # of the tile, in [M, N] contiguous
    local = row * n + col
    dy += first_row * stride_dm + first_col + (row * stride_dm + col)
    if seed is not None:
        k0, k1 = load_keys(seed)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    up_total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    height = tl.full([], BLOCK_M, tl.int64)
    left = min(m - first_row, m_part).to(tl.int32)
    for done in range(0, left, BLOCK_M):
        in_m = row < left - done
        grad = load_tile(dy, in_m, in_n, EVEN_M, EVEN_N).to(tl.float32)
        if seed is not None:
            keep = flat_keep(k0, k1, start + (row * n + eights), threshold, ALIGNED)
            grad = tl.where(keep, grad * scale, 0.0)
        if preact is not None:
            z = load_tile(preact + start + local, in_m, in_n, EVEN_M, EVEN_N).to(tl.float32)
            if up_preact is not None:
                u = load_tile(up_preact + start + local, in_m, in_n, EVEN_M, EVEN_N)
                up_grad = grad * act(z, ACTIVATION)
                grad *= u.to(tl.float32)
                if gu is not None:
                    store_tile(gu + start + local, up_grad, in_m, in_n, EVEN_M, EVEN_N)
                if up_sums is not None:
                    up_total += up_grad
            if ACTIVATION == "relu":  # a select, so that Inf * 0 does not arise
                grad = tl.where(z <= 0.0, 0.0, grad)
            else:
                grad *= d_act(z, ACTIVATION)
        if g is not None:
            store_tile(g + start + local, grad, in_m, in_n, EVEN_M, EVEN_N)
        if sums is not None:
            total += grad
        dy += height * stride_dm
        start += height * n
    at = part * n + first_col + tl.arange(0, BLOCK_N)
    in_sums = tl.arange(0, BLOCK_N) < n - first_col
    if sums is not None:
        store_tile(sums + at, _sum_rows(total, BLOCK_M, BLOCK_N), in_sums, True, EVEN_N, True)
    if up_sums is not None:
        store_tile(up_sums + at, _sum_rows(up_total, BLOCK_M, BLOCK_N), in_sums, True, EVEN_N, True)
