"""Which kernel form and which tiles an attention call gets: data and pure functions, without triton.

Tiles follow from dtype, head dim, lengths and architecture, never from batch size or head count, so
an element of a batch has the same bits alone and in company.
"""

from typing import NamedTuple

import torch

from llmkern.specs import AttentionSpec


class Form(NamedTuple):
    """What a call has, as compile-time facts; a kernel holds no code for what is False."""

    left: bool  # some query's window begins behind key 0
    right: bool  # some query's window ends before the last key
    right_edge: bool  # blocks at the right need a mask: right, or a last block that is not full
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
