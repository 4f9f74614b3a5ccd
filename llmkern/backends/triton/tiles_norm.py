"""Tile sizes of the norm kernels: data and pure functions.

A tile is [block_rows, chunk] and a row is `chunks` of them side by side, kept in registers. A chunk
is as wide as the warps of one row read with one 16-byte load a lane, so rows that are no power of
two waste little, and with one warp a row no reduction leaves the warp. Chosen 2026-11-22 from the
registers and spills that ptxas reports; not yet timed on a card.
"""

import functools
from typing import NamedTuple

WARP = 32
VECTOR_BYTES = 16

# Elements of one row in a lane's registers: at most, and preferred. Backward holds two values, the
# weight and two sums for each, forward one value, weight and bias.
FORWARD_ELEMENTS = (64, 32)
BACKWARD_ELEMENTS = (40, 32)
# Warps of one row, at most: beyond, the 65536 registers of an SM do not hold a program.
FORWARD_WARPS = 16
BACKWARD_WARPS = 8
ROW_ELEMENTS = 512  # of one row in one lane of each of its warps: 16 warps have 128 registers each

# capability -> SMs of the largest card of that architecture. 2026-11-22.
SMS = {80: 108, 86: 84, 89: 142, 90: 132, 100: 148, 120: 188}
FORWARD_PROGRAMS = 4  # an SM: 4 warps of 120 registers each fill it to 16 warps
BACKWARD_PROGRAMS = 1  # an SM: every program writes a partial sum of the weights' gradients
# Blocks of rows for which a program loads the weights once, while that leaves one program an SM.
TURNS = 4


class NormTile(NamedTuple):
    block_rows: int  # rows that a program has on chip at a time
    chunk: int
    chunks: int  # 0: the row does not fit on chip, loop over it by chunk
    lanes: int  # of a warp that share a row
    num_warps: int
    programs: int  # each takes every programs-th block of rows

    def covers(self, cols: int) -> bool:
        """True where no column needs a mask."""
        return self.chunk * self.chunks == cols


class SumTile(NamedTuple):
    rows: int
    chunk: int
    num_warps: int


WIDE_CHUNK = 4096  # columns that a program takes at a time where a row does not fit on chip
WIDE_WARPS = 8
WIDE_PARTS = 32  # partial sums of the weights' gradients there
AFFINE = SumTile(16, 256, 4)  # 32 elements of each of two sums a lane
# 32 columns are 128 bytes, and cols / 32 programs. Of one warp: the sum crosses no shared memory.
SUM_ROWS, SUM_CHUNK, SUM_WARPS = 64, 32, 1


@functools.cache
def multiprocessors(capability: int) -> int:
    """SMs to spread work over, by the nearest architecture that is not newer."""
    return SMS[max(known for known in SMS if known <= max(capability, min(SMS)))]


def power_of_two(n: int) -> int:
    """The least one that is not below n."""
    return 1 << max(0, n - 1).bit_length()


def _row_shape(
    cols: int, vector: int, limits: tuple[int, int], most_warps: int
) -> tuple[int, int, int] | None:
    """(chunk, chunks, warps of a row) with the least padding, then few registers, then few
    warps."""
    narrow = vector * WARP
    if cols <= narrow:
        return max(8, power_of_two(cols)), 1, 1  # 8: one Philox call
    most, preferred = limits
    if cols % 16:  # an address for each element
        most = preferred
    ranked = []
    warps = 1
    while warps <= most_warps:
        chunk = narrow * warps
        chunks = -(-cols // chunk)
        if chunks * vector <= min(most, ROW_ELEMENTS // warps):
            rank = (chunk * chunks, chunks * vector > preferred, warps)
            ranked.append((rank, (chunk, chunks, warps)))
        warps *= 2
    return min(ranked)[1] if ranked else None


def _pick(rows, cols, itemsize, limits, most_warps, least_warps, programs, sms) -> NormTile:
    vector = VECTOR_BYTES // itemsize
    shape = _row_shape(cols, vector, limits, most_warps)
    if shape is None:
        return NormTile(1, WIDE_CHUNK, 0, WARP, WIDE_WARPS, min(rows, WIDE_PARTS))
    chunk, chunks, row_warps = shape
    lanes = min(WARP, max(1, chunk // vector))
    num_warps = max(least_warps, row_warps)
    # As many for few rows as for many: how a row lies over lanes and warps is how its sums are
    # ordered, and a row's bits do not depend on how many others there are.
    block_rows = num_warps * WARP // (row_warps * lanes)
    blocks = -(-rows // block_rows)
    turns = max(-(-blocks // (programs * sms)), min(TURNS, blocks // sms), 1)
    # As few programs as give the same number of turns.
    return NormTile(block_rows, chunk, chunks, lanes, num_warps, -(-blocks // turns))


@functools.lru_cache(maxsize=4096)
def pick_forward(rows: int, cols: int, itemsize: int, capability: int) -> NormTile:
    """itemsize: bytes of the narrowest of input, residual and output elements."""
    sms = multiprocessors(capability)
    return _pick(rows, cols, itemsize, FORWARD_ELEMENTS, FORWARD_WARPS, 4, FORWARD_PROGRAMS, sms)


@functools.lru_cache(maxsize=4096)
def pick_backward(rows: int, cols: int, itemsize: int, capability: int) -> NormTile:
    """As pick_forward; programs is also the number of partial sums."""
    sms = multiprocessors(capability)
    return _pick(rows, cols, itemsize, BACKWARD_ELEMENTS, BACKWARD_WARPS, 8, BACKWARD_PROGRAMS, sms)


def pick_sum(parts: int) -> SumTile:
    """The tile that adds up `parts` partial sums."""
    return SumTile(min(SUM_ROWS, power_of_two(parts)), SUM_CHUNK, SUM_WARPS)
