"""Tile sizes of the linear kernels: dated rows and pure functions, importable without triton.

Rows of 2026-11-22, Triton 3.7.1. They were chosen by compiling for each architecture: no spills,
shared memory within a block's limit, PTX warp instructions per mma. None has been timed on a card.
"""

from typing import NamedTuple

import torch

GROUP_M = 8  # tile rows that share columns of B in the second-level cache
LONGEST_SPLIT = 16  # programs that share one tile's K
SHORTEST_K = 256  # of a program's range of K


class Tile(NamedTuple):
    """What one program computes, and how."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    cost: float  # of one multiply-add, relative to the first row of its table


class Plan(NamedTuple):
    """How a product is cut."""

    tile: Tile
    split_k: int
    k_part: int  # K of one program, a multiple of block_k


class Columns(NamedTuple):
    """How a pass over [M, N] is cut that also sums its columns."""

    block_m: int
    block_n: int
    num_warps: int
    parts: int  # ranges of rows
    m_part: int  # rows of a range, a multiple of block_m


# Operand bytes are dear: while one comes out of the second-level cache, a multiprocessor's tensor
# cores do 16 or more multiply-adds (vendors' peak figures), its FMA units 2.
ADDS_PER_BYTE = {"16-bit": 16, "tf32": 8, "ieee": 2}
# What no multiply-add hides, in multiply-adds of one multiprocessor: a program's first loads and
# its epilogue, half a microsecond, and twice that for one more launch in a stream.
START_COST = {"16-bit": 500_000, "tf32": 250_000, "ieee": 50_000}

# The last row of each table is for a few rows of A, whose product only reads B.
MMA = {  # mma.sync: sm_80, 86, 89, 120. Two programs or more on a multiprocessor of 100 KB
    "16-bit": (
        Tile(128, 128, 32, 4, 4, 1.0),
        Tile(64, 128, 32, 4, 3, 1.35),
        Tile(64, 64, 64, 4, 3, 1.6),
        Tile(32, 64, 64, 4, 4, 2.4),
        Tile(16, 64, 128, 4, 3, 3.1),
    ),
    "tf32": (
        Tile(128, 128, 32, 4, 3, 1.0),
        Tile(64, 128, 32, 4, 3, 1.3),
        Tile(64, 64, 32, 4, 3, 1.7),
        Tile(16, 64, 64, 4, 3, 3.2),
    ),
}
WIDE_MMA = {  # wgmma and tcgen05, sm_90 and sm_100: 64 rows at least, else mma.sync
    "16-bit": (
        Tile(128, 256, 64, 8, 3, 1.0),
        Tile(128, 128, 64, 8, 4, 1.1),
        Tile(64, 128, 64, 4, 4, 1.3),
        Tile(64, 64, 64, 4, 4, 1.6),
        Tile(16, 64, 128, 4, 3, 4.0),
    ),
    "tf32": (
        Tile(128, 128, 32, 8, 4, 1.0),
        Tile(64, 128, 32, 4, 4, 1.3),
        Tile(64, 64, 32, 4, 4, 1.6),
        Tile(16, 64, 64, 4, 3, 4.0),
    ),
}
FMA = (
    Tile(64, 64, 16, 8, 3, 1.0),
    Tile(32, 32, 16, 4, 3, 1.3),
    Tile(16, 32, 16, 2, 3, 1.5),
)
# Gated: two sums of this size each.
MMA_GATED = {
    "16-bit": (
        Tile(128, 64, 32, 4, 4, 1.0),
        Tile(64, 64, 32, 4, 3, 1.3),
        Tile(32, 64, 64, 4, 3, 1.7),
        Tile(16, 64, 64, 4, 3, 2.7),
    ),
    "tf32": (
        Tile(128, 64, 32, 8, 3, 1.0),
        Tile(64, 64, 32, 4, 3, 1.1),
        Tile(16, 32, 64, 4, 3, 3.2),
    ),
}
WIDE_MMA_GATED = {
    "16-bit": (
        Tile(128, 128, 64, 8, 3, 1.0),
        Tile(128, 64, 64, 8, 3, 1.1),
        Tile(64, 64, 64, 4, 3, 1.3),
        Tile(16, 32, 128, 4, 3, 4.0),
    ),
    "tf32": (
        Tile(128, 64, 32, 8, 4, 1.0),
        Tile(64, 64, 32, 4, 4, 1.3),
        Tile(16, 32, 64, 4, 3, 4.0),
    ),
}
FMA_GATED = (
    Tile(64, 32, 16, 4, 3, 1.0),
    Tile(32, 32, 16, 4, 3, 1.3),
    Tile(16, 32, 16, 4, 3, 1.5),
)


def arithmetic(dtype: torch.dtype, tf32: bool) -> str:
    """Which units multiply: "16-bit", "tf32" or "ieee"."""
    if dtype != torch.float32:
        return "16-bit"
    return "tf32" if tf32 else "ieee"


def rows(kind: str, gated: bool, vectors: bool, capability: int) -> tuple[Tile, ...]:
    """The tiles that a product of this `arithmetic` may take.

    Without 16-byte loads (`vectors`) operands travel through registers, of which the larger tiles
    then need more warps.
    """
    if kind == "ieee":
        return FMA_GATED if gated else FMA
    wide = capability // 10 in (9, 10)
    table = (WIDE_MMA_GATED if gated else WIDE_MMA) if wide else MMA_GATED if gated else MMA
    if vectors:
        return table[kind]
    return tuple(
        tile._replace(num_warps=8, block_k=32) if tile.block_m >= 64 else tile
        for tile in table[kind]
        if tile.block_n <= 128
    )


def pick(
    kind: str, gated: bool, tiles: tuple[Tile, ...], m: int, n: int, k: int, processors: int
) -> Plan:
    """The tile and the split of K that cost least.

    Cost of a plan: waves of programs over the multiprocessors x what one program does, which is the
    larger of its multiply-adds and the reading of its operands; and joining the parts, if there
    are any.
    """
    best, lowest = None, float("inf")
    for tile in tiles:
        for split in _splits(tile, m, n, k, processors):
            plan = _cut(tile, k, split)
            cost = _cost(plan, kind, gated, m, n, processors)
            if cost < lowest:
                best, lowest = plan, cost
    return best


def _splits(tile: Tile, m: int, n: int, k: int, processors: int) -> list[int]:
    """1, and the powers of two that leave no multiprocessor with two programs."""
    tiles = -(-m // tile.block_m) * -(-n // tile.block_n)
    most = min(LONGEST_SPLIT, processors // max(1, tiles), k // SHORTEST_K)
    return [1 << bit for bit in range(max(1, most.bit_length()))]


def _cut(tile: Tile, k: int, split: int) -> Plan:
    blocks = -(-k // tile.block_k)
    k_part = -(-blocks // split) * tile.block_k
    return Plan(tile, max(1, -(-k // max(1, k_part))), k_part)


def _cost(plan: Plan, kind: str, gated: bool, m: int, n: int, processors: int) -> float:
    tile, products = plan.tile, 1 + gated
    item_bytes = 2 if kind == "16-bit" else 4
    byte = ADDS_PER_BYTE[kind]
    programs = -(-m // tile.block_m) * -(-n // tile.block_n) * plan.split_k
    adds = tile.block_m * tile.block_n * products * tile.cost
    reads = (tile.block_m + tile.block_n * products) * item_bytes * byte
    cost = -(-programs // processors) * (plan.k_part * max(adds, reads) + START_COST[kind])
    if plan.split_k > 1:
        joined_bytes = 4 * m * n * products * (2 * plan.split_k + 1)
        cost += 2 * START_COST[kind] + joined_bytes * byte / processors
    return cost


def pick_join(n: int) -> tuple[int, int, int]:
    """(block_m, block_n, num_warps) of the join: 4 elements a thread, one 16-byte load of each part
    side by side. With 8, a load would use half of each 32-byte sector that it touches."""
    block_n = 512 if n % 512 == 0 else 256 if n > 128 else 128
    return 512 // block_n, block_n, 4


def pick_columns(m: int, n: int, processors: int) -> Columns:
    """The cut of the pass over dy: 64 KB of dy or less a step, ranges that fill the card twice."""
    block_m, block_n = 16, 128
    across = max(1, -(-n // block_n))
    most = max(1, min(64, 2 * processors // across))
    blocks = max(1, -(-m // block_m))
    m_part = -(-blocks // most) * block_m
    return Columns(block_m, block_n, 4, max(1, -(-m // m_part)), m_part)
