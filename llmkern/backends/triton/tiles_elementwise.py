"""Tile sizes of dropout and the activations. Chosen 2026-11-22 by count, not timed on a card."""

import functools
from typing import NamedTuple

# 16 elements a lane: two (16-bit types) or four (float32) 16-byte loads in flight.
BLOCK = 2048
NUM_WARPS = 4


class RowsTile(NamedTuple):
    rows: int
    chunk: int


@functools.lru_cache(maxsize=4096)
def pick_rows(cols: int) -> RowsTile:
    """BLOCK elements of rows that do not follow one another in memory."""
    chunk = min(BLOCK, max(8, 1 << (cols - 1).bit_length()))
    return RowsTile(BLOCK // chunk, chunk)
