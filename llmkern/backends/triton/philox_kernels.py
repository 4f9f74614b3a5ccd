"""Device functions for dropout: the keep masks of llmkern/random.py, bit for bit.

One Philox4x32-7 call decides 8 neighbouring elements. Its words are joined so that the 8 decisions
lie in the minor dimension: in Triton's layout they belong to one thread, next to each other, as
the 16-bit elements of one 16-byte load do. The threshold is a number in 1..65536
(random.threshold); a caller with threshold 0 drops nothing and must not come here.
"""

import triton
import triton.language as tl

from llmkern import random

_FLAT_STREAM = tl.constexpr(random.FLAT_STREAM)
_ATTENTION_STREAM = tl.constexpr(random.ATTENTION_STREAM)
_ROUNDS = tl.constexpr(random.ROUNDS)


@triton.jit
def load_keys(seed):
    """The two key words of the seed that `seed` (pointer to int64) holds."""
    value = tl.load(seed).to(tl.uint64)
    return value.to(tl.uint32), (value >> 32).to(tl.uint32)


@triton.jit
def _by_eights(w0, w1, w2, w3):
    """[..., G] four times, word w of 8 decisions each -> [..., 8 G]: each decision in the high half
    of a uint32, whatever is below it being of no weight in `_kept`."""
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [..., G, 2, 2]: word 2 a + b at [a, b]
    decisions = tl.join(words << 16, words)  # the low half of a word is its first decision
    if len(w0.shape) == 1:
        decisions = tl.reshape(decisions, [w0.shape[0] * 8])
    else:
        tl.static_assert(len(w0.shape) == 2, "groups must be a vector or a matrix")
        decisions = tl.reshape(decisions, [w0.shape[0], w0.shape[1] * 8])
    return decisions


@triton.jit
def _kept(decisions, threshold):
    """decision >= threshold on the high halves, as a comparison of whole words: 2^32 - 1, which is
    never exceeded, stands for threshold 65536."""
    bound = threshold.to(tl.uint64) << 16
    return decisions > (bound - 1).to(tl.uint32)


@triton.jit
def _flat_words(k0, k1, counter):
    """Four words of each counter e // 8 (int64)."""
    low = counter.to(tl.uint32)
    high = (counter >> 32).to(tl.uint32)
    zero = tl.zeros_like(low)
    return tl.philox_impl(low, high, zero, zero + _FLAT_STREAM, k0, k1, _ROUNDS)


@triton.jit
def flat_keep(k0, k1, first, threshold, ALIGNED: tl.constexpr):
    """The flat stream's mask of [..., G] groups of 8 elements each, as bool [..., 8 G].

    first: int64 tensor, flat index of each group's first element; the other seven follow it.
    ALIGNED: every `first` is a multiple of 8, as in rows of 8 n elements. Otherwise a group takes
    two counters, whose 16 decisions are shifted by first % 8.
    """
    counter = first >> 3
    w0, w1, w2, w3 = _flat_words(k0, k1, counter)
    if not ALIGNED:
        w4, w5, w6, w7 = _flat_words(k0, k1, counter + 1)
        shift = (first & 7).to(tl.uint32)
        by_four = (shift & 4) != 0  # elements: two words
        w0 = tl.where(by_four, w2, w0)
        w1 = tl.where(by_four, w3, w1)
        w2 = tl.where(by_four, w4, w2)
        w3 = tl.where(by_four, w5, w3)
        w4 = tl.where(by_four, w6, w4)
        w5 = tl.where(by_four, w7, w5)
        by_two = (shift & 2) != 0
        w0 = tl.where(by_two, w1, w0)
        w1 = tl.where(by_two, w2, w1)
        w2 = tl.where(by_two, w3, w2)
        w3 = tl.where(by_two, w4, w3)
        w4 = tl.where(by_two, w5, w4)
        by_one = (shift & 1) != 0
        w0 = tl.where(by_one, (w0 >> 16) | (w1 << 16), w0)
        w1 = tl.where(by_one, (w1 >> 16) | (w2 << 16), w1)
        w2 = tl.where(by_one, (w2 >> 16) | (w3 << 16), w2)
        w3 = tl.where(by_one, (w3 >> 16) | (w4 << 16), w3)
    return _kept(_by_eights(w0, w1, w2, w3), threshold)


@triton.jit
def attention_keep(k0, k1, slab, row, group, threshold):
    """The attention stream's mask of a tile of probabilities, as bool [M, 8 N].

    slab: b * H + h. row: int32 [M], queries i. group: int32 [N], j // 8 of the keys of each eight.
    """
    zero = tl.zeros([row.shape[0], group.shape[0]], tl.uint32)
    c0 = zero + group.to(tl.uint32)[None, :]
    c1 = zero + row.to(tl.uint32)[:, None]
    c2 = zero + slab.to(tl.uint32)
    w0, w1, w2, w3 = tl.philox_impl(c0, c1, c2, zero + _ATTENTION_STREAM, k0, k1, _ROUNDS)
    return _kept(_by_eights(w0, w1, w2, w3), threshold)
