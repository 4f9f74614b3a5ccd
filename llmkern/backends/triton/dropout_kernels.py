"""Dropout, which is its own gradient: y = x * scale where the flat stream keeps an element, else 0.

x is dense memory in the order of the logical elements, or rows of it. y may be x.
"""

import triton
import triton.language as tl

from llmkern.backends.triton.philox_kernels import flat_keep, load_keys


@triton.jit(do_not_specialize=["elements", "threshold", "scale"])
def dropout_flat(
    x, seed,
    y,
    elements,
    threshold, scale,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A full block needs no mask, which would split the 16-byte loads where `elements` is no
    multiple of 16."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    k0, k1 = load_keys(seed)
    keep = flat_keep(k0, k1, start + tl.arange(0, BLOCK // 8) * 8, threshold, True)
    offset = start + tl.arange(0, BLOCK)
    if start + BLOCK <= elements:
        value = tl.where(keep, tl.load(x + offset).to(tl.float32) * scale, 0.0)
        tl.store(y + offset, value.to(y.dtype.element_ty))
    else:
        inside = offset < elements
        value = tl.load(x + offset, mask=inside, other=0.0).to(tl.float32)
        value = tl.where(keep, value * scale, 0.0)
        tl.store(y + offset, value.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "threshold", "scale"])
def dropout_rows(
    x, seed,
    y,
    x_stride, y_stride,
    rows, cols,
    threshold, scale,
    ALIGNED: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """[rows, cols] with column stride 1; grid (row blocks, column blocks). ALIGNED: cols is a
    multiple of 8."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    start = tl.program_id(1) * CHUNK
    k0, k1 = load_keys(seed)
    first = (row * cols)[:, None] + (start + tl.arange(0, CHUNK // 8) * 8)[None, :]
    keep = flat_keep(k0, k1, first, threshold, ALIGNED)
    col = start + tl.arange(0, CHUNK)
    inside = (row < rows)[:, None] & (col < cols)[None, :]
    value = tl.load(x + (row * x_stride)[:, None] + col[None, :], mask=inside, other=0.0)
    value = tl.where(keep, value.to(tl.float32) * scale, 0.0).to(y.dtype.element_ty)
    tl.store(y + (row * y_stride)[:, None] + col[None, :], value, mask=inside)
