"""Which kernel form and which tiles an attention call gets: data and pure functions.

Tiles follow from dtype, head dim, lengths and architecture, never from batch size or head count, so
an element of a batch has the same bits alone and in company.
"""

from typing import NamedTuple

import torch

from llmkern import random
from llmkern.specs import AttentionSpec


class Form(NamedTuple):
    """What a call has, as compile-time facts; a kernel holds no code for what is False."""

    left: bool  # some query's window begins behind key 0
    right: bool  # some query's window ends before the last key
    right_edge: bool  # blocks at the right need a mask: right, or a last block that is not full
    tail_edge: bool  # the same of the last blocks of queries that a block of keys meets
    masked: bool  # bias, mask or key_mask: any pair may be hidden
    sees_first: bool  # every query's window begins at key 0 and holds it
    hides: bool  # some pair of existing query and key may be hidden
    bias: bool
    mask: bool
    key_mask: bool
    slopes: bool
    sinks: bool
    softcap: bool
    dropout: bool
    natural: bool  # scores in the formula's units; else <q, k>, with scale folded into exp2
    sharp: bool  # float32 inputs: no shortcut that costs a bit
    packed: bool  # rows are the queries of all heads of a kv head
    split: bool  # keys are dealt out to several programs
    head_dim: int
    value_dim: int
    block_d: int
    block_dv: int
    precision: str  # of products of float32: "ieee" or "tf32"


class Tile(NamedTuple):
    """block_m queries by block_n keys at a time."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# Shared memory that one block may have, by compute capability * 10.
SHARED_KB = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99, 121: 99}
SHARED_KB_OTHERS = 99


def shared_bytes(capability: int) -> int:
    """Shared memory that one block may have, in bytes."""
    return SHARED_KB.get(capability, SHARED_KB_OTHERS) * 1024


def padded(n: int) -> int:
    """The tile width of a dim: the power of two from 16 (the least that a product takes) on."""
    return max(16, 1 << (n - 1).bit_length()) if n > 0 else 16


def rows(spec: AttentionSpec) -> int:
    """Rows of a unit of the forward kernel."""
    return spec.q_len * (spec.heads // spec.kv_heads if is_packed(spec) else 1)


PACKED_BELOW = 64  # queries: from here on a tile is filled by one head


def is_packed(spec: AttentionSpec) -> bool:
    return spec.kv_heads < spec.heads and spec.q_len < PACKED_BELOW


SPLIT_ROWS = 64  # with more rows a unit has work enough for one program ...
SPLIT_KEYS = 1024  # ... and so it has with fewer keys
CHUNK_KEYS = 256
MOST_PARTS = 64


def pick_chunk(spec: AttentionSpec) -> int:
    """Keys of one program of the forward kernel, a multiple of CHUNK_KEYS; 0: not split."""
    if rows(spec) > SPLIT_ROWS or spec.kv_len < SPLIT_KEYS:
        return 0
    return -(-spec.kv_len // (MOST_PARTS * CHUNK_KEYS)) * CHUNK_KEYS


def form(spec: AttentionSpec, precision: str) -> Form:
    """precision: of products of float32 operands, "ieee" or "tf32"."""
    left = spec.left < spec.q_len - 1 + spec.shift
    right = spec.right < spec.kv_len - 1 - spec.shift
    masked = spec.bias or spec.mask or spec.key_mask
    sharp = spec.dtype == torch.float32
    return Form(
        left=left,
        right=right,
        right_edge=right or spec.kv_len % LARGEST_BLOCK != 0,
        tail_edge=left or spec.q_len % LARGEST_BLOCK != 0 or spec.kv_len % LARGEST_BLOCK != 0,
        masked=masked,
        sees_first=not left and spec.shift + spec.right >= 0 and spec.kv_len > 0,
        hides=left or right or masked or spec.kv_len == 0,
        bias=spec.bias,
        mask=spec.mask,
        key_mask=spec.key_mask,
        slopes=spec.slopes,
        sinks=spec.sinks,
        softcap=spec.softcap > 0.0,
        dropout=random.threshold(spec.dropout_p) > 0,
        natural=spec.softcap > 0.0 or spec.bias or spec.slopes or spec.sinks or spec.scale <= 0.0,
        sharp=sharp,
        packed=is_packed(spec),
        split=pick_chunk(spec) > 0,
        head_dim=spec.head_dim,
        value_dim=spec.value_dim,
        block_d=padded(spec.head_dim),
        block_dv=padded(spec.value_dim),
        precision=precision if sharp else "ieee",
    )


# Tiles by (architecture class, bytes of an element), then by the wider of the padded head dims.
# 2026-11-22, Triton 3.7.1, not timed: of the candidates those that ptxas compiles (causal) without
# spills, or with the fewest, and that fit in shared memory; instruction counts break ties.
_FORWARD = {
    (80, 2): {64: Tile(128, 128, 8, 2), 128: Tile(128, 128, 8, 2), 256: Tile(64, 32, 8, 2)},
    (86, 2): {64: Tile(128, 128, 8, 2), 128: Tile(128, 32, 8, 2), 256: Tile(64, 32, 8, 2)},
    (90, 2): {64: Tile(128, 64, 4, 3), 128: Tile(128, 64, 8, 3), 256: Tile(64, 64, 8, 2)},
    (100, 2): {64: Tile(128, 64, 4, 3), 128: Tile(128, 64, 8, 3), 256: Tile(64, 64, 8, 2)},
    (80, 4): {64: Tile(64, 64, 4, 2), 128: Tile(64, 32, 4, 2), 256: Tile(32, 32, 8, 2)},
    (86, 4): {64: Tile(64, 64, 4, 2), 128: Tile(64, 32, 8, 2), 256: Tile(32, 16, 4, 2)},
    (90, 4): {64: Tile(64, 64, 4, 2), 128: Tile(64, 32, 8, 2), 256: Tile(32, 32, 8, 1)},
    (100, 4): {64: Tile(64, 64, 8, 2), 128: Tile(64, 32, 8, 2), 256: Tile(32, 32, 8, 2)},
}
LARGEST_BLOCK = 128  # every block size divides it


def architecture(capability: int) -> int:
    """The class of tiles: 80, 90 and 100 by generation, 86 for cards with 99 KB a block."""
    if shared_bytes(capability) < 100 * 1024:
        return 86
    return 80 if capability < 90 else 90 if capability < 100 else 100


# Of the forward kernel with two or more of: bias, mask, softcap, slopes, dropout. By bytes of an
# element, then by width. What they compute beside the scores is dealt out to more warps.
_MANY = {
    2: {64: Tile(64, 32, 8, 1), 128: Tile(32, 32, 8, 1), 256: Tile(16, 32, 8, 1)},
    4: {64: Tile(32, 32, 8, 1), 128: Tile(32, 32, 8, 1), 256: Tile(16, 16, 8, 1)},
}
# Of width 256, by architecture class, bytes of an element and number of _burden.
_MANY_WIDE = {
    **{(86, 4, masks): Tile(16, 32, 8, 1) for masks in (0, 1)},
    (90, 2, 2): Tile(32, 32, 8, 1),
    **{(100, 2, masks): Tile(32, 32, 8, 1) for masks in (0, 1, 2)},
}


def _of(table: dict, spec: AttentionSpec, shape: Form, capability: int) -> Tile:
    """Features beside the scores take registers: their calls get the smaller tiles of float32.
    Tiles of bias and mask would be buffered in shared memory too: these calls are not pipelined."""
    beside = shape.softcap or shape.slopes or shape.dropout or shape.bias or shape.mask
    size = 4 if beside else spec.dtype.itemsize
    tile = table[architecture(capability), size][max(64, shape.block_d, shape.block_dv)]
    return tile._replace(num_stages=1) if shape.bias or shape.mask else tile


# Up to this length tiles of 64 queries do a tenth less under a band than tiles of 128 (1.125
# against 1.25 of the least at 512) and make twice the programs; beyond, fewer reads of k, v count.
# Of 64 channels at most: with more, starting a program costs more than that saves. wgmma wants four
# warps; where there is none, two warps of 32 rows each read a tile of k or v half as often as four.
# The masks of lengths that are no multiple of 128 leave two warps too few registers on sm_86 (212
# bytes spilled), with those of a padded head dim on sm_80 too (48).
SHORT_BAND = 1024
_SHORT = {80: Tile(64, 64, 2, 2), 86: Tile(64, 64, 2, 2)}


# Triton 3.7 lays an operand that was computed from bytes, as p is from a mask, out in eights along
# the sum: four lanes then need 32, and with a sum over 16 the product is wrong, silently.
LEAST_SUM = 32


def _deep_enough(tile: Tile, spec: AttentionSpec, shape: Form, of_queries: bool) -> Tile:
    """The tile with enough places in its products' sums, which go over queries or over keys."""
    if spec.dtype.itemsize > 2 or not (shape.mask or shape.key_mask):
        return tile
    if of_queries:
        return tile._replace(block_m=max(LEAST_SUM, tile.block_m))
    return tile._replace(block_n=max(LEAST_SUM, tile.block_n))


_FEW_ROWS = Tile(32, 32, 8, 1)  # of float32: 17 to 64 rows
# What stands for the forward kernel's tile where that would spill: by (architecture class, bytes of
# an element, width), then by _burden's name and number; None: it does not. 2026-11-22: the first of
# fifteen tiles, from large to small, that ptxas compiles without spills, causal, of lengths 2048,
# 1000 x 1001 or 3000 x 3001.
EASED = {
    (80, 2, 64): {
        "beside": (None, None, Tile(128, 32, 8, 2)),
        "key mask": (None, Tile(128, 32, 8, 2), Tile(128, 32, 8, 2)),
        "mask": (None, Tile(128, 32, 8, 1), Tile(128, 32, 8, 1)),
        "plain": (None, Tile(128, 64, 8, 2), None),
    },
    (80, 2, 128): {
        "beside": (Tile(64, 32, 8, 2), Tile(64, 32, 8, 2), Tile(64, 32, 8, 2)),
        "key mask": (Tile(128, 64, 8, 2), Tile(128, 32, 8, 2), Tile(128, 32, 8, 2)),
        "mask": (None, Tile(64, 32, 8, 1), Tile(64, 32, 8, 1)),
        "plain": (None, None, Tile(128, 64, 8, 2)),
    },
    (80, 2, 256): {
        "key mask": (None, Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)),
    },
    (80, 4, 64): {
        "bias": (Tile(64, 32, 4, 1), Tile(64, 32, 4, 1), Tile(64, 32, 4, 1)),
        "key mask": (None, Tile(64, 32, 8, 2), Tile(64, 32, 8, 2)),
        "mask": (Tile(64, 64, 8, 1), Tile(64, 32, 4, 1), Tile(64, 32, 4, 1)),
    },
    (80, 4, 128): {
        "beside": (Tile(64, 32, 8, 2), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)),
        "bias": (None, Tile(64, 32, 8, 1), Tile(64, 32, 8, 1)),
        "key mask": (Tile(64, 32, 8, 2), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)),
        "plain": (None, None, Tile(64, 32, 8, 2)),
    },
    (80, 4, 256): {
        "beside": (None, Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)),
        "key mask": (None, Tile(16, 16, 4, 1), Tile(16, 16, 4, 1)),
    },
    (86, 2, 64): {
        "beside": (None, Tile(128, 32, 8, 2), Tile(128, 32, 8, 2)),
        "key mask": (None, None, Tile(128, 32, 8, 2)),
        "plain": (None, None, Tile(128, 32, 8, 2)),
    },
    (86, 2, 128): {
        "beside": (Tile(64, 32, 4, 2), Tile(64, 32, 4, 2), None),
        "key mask": (None, Tile(128, 32, 8, 1), Tile(128, 32, 8, 1)),
        "mask": (Tile(64, 32, 4, 1), Tile(32, 32, 4, 1), Tile(32, 32, 4, 1)),
        "plain": (None, None, Tile(128, 32, 8, 1)),
    },
    (86, 2, 256): {
        "beside": (None, Tile(16, 64, 8, 1), Tile(16, 64, 8, 1)),
        "bias": (None, Tile(16, 32, 4, 1), Tile(16, 32, 4, 1)),
    },
    (86, 4, 64): {
        "bias": (Tile(64, 32, 8, 1), Tile(64, 32, 8, 1), Tile(64, 32, 8, 1)),
        "key mask": (None, Tile(64, 64, 8, 2), Tile(64, 64, 8, 2)),
        "mask": (Tile(64, 32, 4, 1), Tile(64, 32, 4, 1), Tile(64, 32, 4, 1)),
    },
    (86, 4, 256): {
        "key mask": (Tile(16, 32, 4, 1), Tile(16, 32, 8, 1), Tile(16, 32, 8, 1)),
    },
    (90, 2, 64): {
        "key mask": (None, Tile(128, 64, 8, 2), None),
        "plain": (None, None, Tile(128, 64, 8, 2)),
    },
    (90, 2, 128): {
        "key mask": (None, None, Tile(128, 32, 8, 2)),
    },
    (90, 2, 256): {
        "bias": (None, Tile(32, 32, 4, 1), Tile(32, 32, 4, 1)),
        "key mask": (None, Tile(64, 32, 8, 1), Tile(16, 32, 8, 1)),
        "plain": (None, Tile(64, 32, 8, 1), Tile(64, 32, 8, 1)),
    },
    (90, 4, 64): {
        "beside": (None, Tile(64, 64, 8, 2), Tile(64, 64, 8, 2)),
        "bias": (Tile(64, 64, 8, 1), Tile(64, 64, 8, 1), Tile(64, 64, 8, 1)),
        "key mask": (None, Tile(64, 32, 4, 2), Tile(64, 32, 4, 2)),
        "mask": (None, Tile(64, 64, 8, 1), Tile(64, 64, 8, 1)),
        "plain": (None, None, Tile(64, 64, 8, 2)),
    },
    (90, 4, 128): {
        "beside": (None, Tile(32, 32, 4, 1), Tile(32, 32, 4, 1)),
        "bias": (None, Tile(16, 32, 4, 1), Tile(32, 32, 4, 1)),
        "mask": (None, Tile(32, 32, 4, 1), Tile(32, 32, 4, 1)),
        "plain": (None, Tile(64, 32, 4, 1), Tile(32, 32, 4, 2)),
    },
    (100, 2, 64): {
        "key mask": (None, Tile(128, 32, 8, 2), Tile(128, 64, 8, 2)),
        "plain": (None, Tile(128, 64, 8, 2), None),
    },
    (100, 2, 128): {
        "beside": (None, Tile(64, 32, 4, 2), None),
    },
    (100, 2, 256): {
        "key mask": (None, Tile(64, 32, 8, 2), Tile(64, 32, 8, 2)),
        "mask": (Tile(32, 32, 4, 1), Tile(32, 32, 4, 1), None),
        "plain": (None, Tile(64, 32, 8, 2), Tile(64, 32, 8, 2)),
    },
    (100, 4, 128): {
        "bias": (Tile(32, 32, 4, 1), Tile(32, 32, 4, 1), None),
    },
}


def _burden(shape: Form) -> tuple[str, int]:
    """What takes registers beside the products: its name, and how many of length and head dim need
    masks too: 0, 1 (the lengths) or 2."""
    if shape.mask or shape.bias:
        name = "mask" if shape.mask else "bias"
    elif shape.softcap or shape.slopes or shape.dropout:
        name = "beside"
    else:
        name = "key mask" if shape.key_mask else "plain"
    padded_dim = shape.head_dim < shape.block_d or shape.value_dim < shape.block_dv
    return name, shape.tail_edge + (shape.tail_edge and padded_dim)


def pick_forward(spec: AttentionSpec, shape: Form, capability: int) -> Tile:
    """Of the forward kernel."""
    family, width = architecture(capability), max(64, shape.block_d, shape.block_dv)
    tile, burden = _of(_FORWARD, spec, shape, capability), _burden(shape)
    if shape.softcap + shape.slopes + shape.dropout + shape.bias + shape.mask > 1:
        tile = _MANY[spec.dtype.itemsize][width]
        if width == 256:
            tile = _MANY_WIDE.get((family, spec.dtype.itemsize, burden[1]), tile)
    else:
        few = padded(rows(spec))
        if spec.dtype.itemsize == 4 and 16 < few <= 64 and width <= 128:
            return _FEW_ROWS
        full, tile = tile, _under_band(tile, spec, shape, capability)
        name, masks = burden
        # Left out: decoding's 16 rows, and short bands without a burden, which do not spill.
        if min(tile.block_m, few) > 16 and (tile == full or burden != ("plain", 1)):
            eased = EASED.get((family, spec.dtype.itemsize, width), {})
            tile = eased.get(name, (None, None, None))[masks] or tile
    tile = _deep_enough(tile, spec, shape, of_queries=False)
    block_m = min(tile.block_m, padded(rows(spec)))
    if block_m == tile.block_m:
        return tile
    block_n = tile.block_n if block_m == 16 else min(tile.block_n, 64)  # half the warps, or fewer
    return tile._replace(block_m=block_m, block_n=block_n, num_warps=min(4, tile.num_warps))


def _under_band(tile: Tile, spec: AttentionSpec, shape: Form, capability: int) -> Tile:
    if not (shape.left or shape.right):
        return tile
    family, width = architecture(capability), max(64, shape.block_d, shape.block_dv)
    if tile == _FORWARD[family, 2].get(width):
        if rows(spec) <= SHORT_BAND and width == 64:
            four_warps = tile._replace(block_m=64, block_n=64, num_warps=4)
            padded_dim = min(shape.head_dim, shape.value_dim) < width
            if shape.tail_edge and (family == 86 or padded_dim):
                return four_warps
            return _SHORT.get(family, four_warps)
    return tile


# Backward, by blocks of keys (block_n keys stay, block_m queries pass) ...
_KEYS = {
    (80, 2): {64: Tile(32, 128, 8, 2), 128: Tile(64, 64, 8, 2), 256: Tile(32, 64, 8, 1)},
    (86, 2): {64: Tile(32, 128, 8, 2), 128: Tile(64, 64, 8, 2), 256: Tile(32, 32, 8, 1)},
    (90, 2): {64: Tile(32, 128, 8, 2), 128: Tile(64, 128, 8, 2), 256: Tile(32, 64, 8, 1)},
    (100, 2): {64: Tile(32, 128, 8, 2), 128: Tile(64, 64, 8, 2), 256: Tile(32, 64, 8, 1)},
    (80, 4): {64: Tile(32, 64, 4, 2), 128: Tile(16, 64, 8, 1), 256: Tile(16, 16, 4, 1)},
    (86, 4): {64: Tile(32, 64, 4, 2), 128: Tile(32, 32, 4, 1), 256: Tile(16, 16, 4, 1)},
    (90, 4): {64: Tile(32, 64, 4, 2), 128: Tile(16, 64, 8, 1), 256: Tile(16, 16, 4, 1)},
    (100, 4): {64: Tile(32, 64, 4, 2), 128: Tile(16, 64, 8, 1), 256: Tile(16, 16, 4, 1)},
}
# ... and by blocks of queries (block_m queries stay, block_n keys pass).
_QUERIES = {
    (80, 2): {64: Tile(128, 64, 8, 2), 128: Tile(128, 32, 8, 2), 256: Tile(64, 32, 8, 1)},
    (86, 2): {64: Tile(128, 64, 8, 2), 128: Tile(64, 32, 4, 2), 256: Tile(32, 32, 4, 1)},
    (90, 2): {64: Tile(128, 64, 8, 2), 128: Tile(128, 32, 8, 2), 256: Tile(64, 32, 8, 1)},
    (100, 2): {64: Tile(128, 64, 8, 2), 128: Tile(128, 32, 8, 2), 256: Tile(64, 32, 8, 1)},
    (80, 4): {64: Tile(64, 32, 4, 2), 128: Tile(64, 32, 8, 1), 256: Tile(32, 16, 4, 1)},
    (86, 4): {64: Tile(64, 32, 4, 2), 128: Tile(32, 32, 4, 1), 256: Tile(16, 16, 4, 1)},
    (90, 4): {64: Tile(64, 32, 4, 2), 128: Tile(64, 32, 8, 1), 256: Tile(32, 16, 4, 1)},
    (100, 4): {64: Tile(64, 32, 4, 2), 128: Tile(64, 32, 8, 1), 256: Tile(32, 16, 4, 1)},
}


# What stands for them under a band up to SHORT_BAND: of 64 channels a tenth fewer instructions.
_SHORT_KEYS = {Tile(32, 128, 8, 2): Tile(32, 64, 4, 2)}
_SHORT_QUERIES = {Tile(128, 64, 8, 2): Tile(64, 64, 4, 2)}


def pick_keys(spec: AttentionSpec, shape: Form, capability: int) -> Tile:
    """Of the pass for dk and dv."""
    tile = _of(_KEYS, spec, shape, capability)
    if (shape.left or shape.right) and spec.kv_len <= SHORT_BAND:
        tile = _SHORT_KEYS.get(tile, tile)
    tile = _deep_enough(tile, spec, shape, of_queries=True)
    return tile._replace(block_n=min(tile.block_n, padded(spec.kv_len)))


def pick_queries(spec: AttentionSpec, shape: Form, capability: int) -> Tile:
    """Of the pass for dq."""
    tile = _of(_QUERIES, spec, shape, capability)
    if (shape.left or shape.right) and spec.q_len <= SHORT_BAND:
        tile = _SHORT_QUERIES.get(tile, tile)
    tile = _deep_enough(tile, spec, shape, of_queries=False)
    return tile._replace(block_m=min(tile.block_m, padded(spec.q_len)))


# One pass for dk, dv and dq: five products where two passes make seven, at the price of waiting for
# one another and of float32 sums of dq in memory. As _KEYS; by the width of q, k and of v.
_FUSED = {
    (80, 2): {64: Tile(32, 128, 8, 2), 128: Tile(32, 128, 8, 2)},
    (86, 2): {64: Tile(32, 128, 8, 2)},
    (90, 2): {64: Tile(32, 128, 8, 2), 128: Tile(32, 128, 8, 2)},
    (100, 2): {64: Tile(32, 128, 8, 2), 128: Tile(32, 128, 8, 2)},
}
# By how many warps Triton divides the rows of a product [block_m, width].
_WARP_ROWS = {64: 2, 128: 1}


class Fused(NamedTuple):
    tile: Tile
    warp_rows: int


def pick_fused(spec: AttentionSpec, shape: Form, capability: int) -> Fused | None:
    """Of the one pass for all of dq, dk and dv, or None where two passes run instead: where some
    query does not see key 0, whose block begins each sum; and where what a call has beside the
    scores leaves the third sum no registers."""
    beside = shape.softcap or shape.slopes or shape.dropout or shape.bias or shape.mask
    if beside or not shape.sees_first or shape.block_d != shape.block_dv:
        return None
    tile = _FUSED.get((architecture(capability), spec.dtype.itemsize), {}).get(shape.block_d)
    return None if tile is None else Fused(tile, _WARP_ROWS[shape.block_d])


class Wide(NamedTuple):
    """Along which dims a bias is broadcast, so that its gradient is a sum."""

    b: bool
    h: bool
    i: bool
    j: bool


def pick_bias(spec: AttentionSpec, shape: Form, capability: int) -> Tile:
    """Of the pass for dbias: as for dq, whose products it shares."""
    return pick_queries(spec, shape, capability)


def launch(tile: Tile) -> dict[str, int]:
    """A tile as the arguments of a launch."""
    return dict(BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, num_warps=tile.num_warps,
                num_stages=tile.num_stages)  # fmt: skip


SINK_BLOCK = 256  # queries at a time


def pick_combine(shape: Form) -> Tile:
    """Of the kernel that joins the parts of a split call: few rows are few programs."""
    return Tile(max(1, 512 // shape.block_dv), 0, 4, 1)


def pick_rows(shape: Form) -> Tile:
    """Of the kernel over rows of out: 8192 elements a program."""
    return Tile(max(1, 8192 // shape.block_dv), 0, 4, 1)
