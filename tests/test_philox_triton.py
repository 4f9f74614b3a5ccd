"""The device functions of philox_kernels.py against llmkern/random.py, bit for bit."""

import pytest
import torch

from llmkern import random
from llmkern.backends.triton import _launch

if _launch.version() is None:
    pytest.skip("triton is not installed", allow_module_level=True)

import triton
import triton.language as tl

from llmkern.backends.triton.philox_kernels import attention_keep, flat_keep, load_keys

pytestmark = pytest.mark.usefixtures("emulated_triton")
SEEDS = [0, 77, 2**62 - 1]
PROBABILITIES = [2e-5, 0.1, 0.5, 1.0]


@triton.jit(do_not_specialize=["threshold"])
def _flat_rows(out, seed, start, rows, cols, threshold, ALIGNED: tl.constexpr, ROWS: tl.constexpr,
               COLS: tl.constexpr):  # fmt: skip
    k0, k1 = load_keys(seed)
    row, col = tl.arange(0, ROWS), tl.arange(0, COLS)
    first = (start + row.to(tl.int64) * cols)[:, None] + (tl.arange(0, COLS // 8) * 8)[None, :]
    keep = flat_keep(k0, k1, first, threshold, ALIGNED)
    inside = (row < rows)[:, None] & (col < cols)[None, :]
    tl.store(out + row[:, None] * cols + col[None, :], keep, mask=inside)


@triton.jit(do_not_specialize=["threshold"])
def _flat_vector(out, seed, start, threshold, SIZE: tl.constexpr):
    k0, k1 = load_keys(seed)
    first = start + tl.arange(0, SIZE // 8).to(tl.int64) * 8
    tl.store(out + tl.arange(0, SIZE), flat_keep(k0, k1, first, threshold, True))


@triton.jit(do_not_specialize=["slab", "row", "group", "threshold"])
def _attention(out, seed, slab, row, group, rows, cols, threshold, ROWS: tl.constexpr,
               COLS: tl.constexpr):  # fmt: skip
    k0, k1 = load_keys(seed)
    rows_ = row + tl.arange(0, ROWS)
    groups = group + tl.arange(0, COLS // 8)
    keep = attention_keep(k0, k1, slab, rows_, groups, threshold)
    col = group * 8 + tl.arange(0, COLS)
    inside = (rows_ < rows)[:, None] & (col < cols)[None, :]
    tl.store(out + rows_[:, None] * cols + col[None, :], keep, mask=inside)


def _flat_from(seed, start, count, p):
    """The flat stream's mask of elements start .. start + count, start a multiple of 8."""
    index = torch.arange(start // 8, start // 8 + -(-count // 8))
    zero = torch.zeros_like(index)
    words = random.philox((index & 0xFFFFFFFF, index >> 32, zero, zero + random.FLAT_STREAM), seed)
    halves = torch.stack([half for word in words for half in (word & 0xFFFF, word >> 16)], -1)
    return (halves.reshape(-1) >= random.threshold(p))[:count]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("p", PROBABILITIES)
@pytest.mark.parametrize(("rows", "cols"), [(4, 64), (8, 61), (5, 13), (1, 1), (3, 8)])
def test_rows_of_the_flat_stream(seed, p, rows, cols):
    seed, expected = torch.tensor([seed]), None
    for aligned in (True, False) if cols % 8 == 0 else (False,):
        out = torch.zeros(rows, cols, dtype=torch.bool)
        _flat_rows[(1,)](out, seed, 0, rows, cols, random.threshold(p), aligned, 8, 64)
        expected = random.flat_keep_mask(seed, (rows, cols), p)
        assert torch.equal(out, expected)


@pytest.mark.parametrize("start", [0, 8, (1 << 35) - 64, 1 << 40])
def test_flat_stream_counts_beyond_32_bits(start):
    seed, out = torch.tensor([123]), torch.zeros(128, dtype=torch.bool)
    _flat_vector[(1,)](out, seed, start, random.threshold(0.5), 128)
    assert torch.equal(out, _flat_from(seed, start, 128, 0.5))
    assert 30 < int(out.sum()) < 98


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("p", PROBABILITIES)
def test_tiles_of_the_attention_stream(seed, p):
    seed, shape = torch.tensor([seed]), (1, 3, 21, 45)
    expected = random.attention_keep_mask(seed, shape, p)[0]
    for slab in range(3):
        out = torch.zeros(21, 45, dtype=torch.bool)
        for row in (0, 16):
            for group in (0, 4):
                _attention[(1,)](out, seed, slab, row, group, 21, 45, random.threshold(p), 16, 32)
        assert torch.equal(out, expected[slab])
