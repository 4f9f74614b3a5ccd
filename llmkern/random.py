"""The dropout contract: which element uses which Philox counter, equal on every backend.

Philox4x32-7 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). The key is the
seed (low 32 bits, high 32 bits). One counter gives 128 random bits = 8 decisions of 16 bits;
decision d of a counter is bits [16 * (d % 2), +16) of word d // 2.

    flat stream       element e of the contiguous tensor: decision e % 8 of the counter
                      (e // 8 low, e // 8 high, 0, "flat"). Used by dropout, norms with dropout and
                      linear epilogues.
    attention stream  element (b * H + h, i, j): decision j % 8 of (j // 8, i, b * H + h, "atte").

An element is kept iff its decision >= threshold, threshold = round(p * 65536), and is then scaled
by 65536 / (65536 - threshold): p is met to within 2^-17. p = 1 drops everything.
"""

import torch
from torch import Tensor

FLAT_STREAM = 0x666C6174
ATTENTION_STREAM = 0x61747465
ROUNDS = 7
DECISIONS = 65536  # values of one 16-bit decision

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_MASK32 = 0xFFFFFFFF


def threshold(p: float) -> int:
    """Number of the 65536 decision values that drop an element."""
    dropped = round(p * DECISIONS)
    return min(dropped, DECISIONS - 1) if p < 1.0 else DECISIONS


def scale(p: float) -> float:
    """Factor of a kept element; 0 where nothing is kept."""
    kept = DECISIONS - threshold(p)
    return DECISIONS / kept if kept else 0.0


def draw_seed(device: torch.device) -> Tensor:
    """A fresh seed [1] int64 from torch's generator of `device`: torch.manual_seed rules."""
    return torch.randint(0, 2**62, (1,), dtype=torch.int64, device=device)


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """(low, high) 32 bits of a * b, both below 2^32, in int64 arithmetic without overflow."""
    low, high = b & 0xFFFF, b >> 16
    p0, p1 = a * low, a * high  # below 2^48
    total = p0 + ((p1 & 0xFFFF) << 16)
    return total & _MASK32, (p1 >> 16) + (total >> 32)


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: Tensor) -> list[Tensor]:
    """Four random words (int64 tensors below 2^32) for each counter."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed & _MASK32, (seed >> 32) & _MASK32
    for _ in range(ROUNDS):
        lo0, hi0 = _multiply(_M0, c0)
        lo1, hi1 = _multiply(_M1, c2)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + _W0) & _MASK32, (k1 + _W1) & _MASK32
    return [c0, c1, c2, c3]


def _decisions(words: list[Tensor]) -> Tensor:
    """[..., 8] decisions of [...] counters."""
    halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    return torch.stack(halves, dim=-1)


def flat_keep_mask(seed: Tensor, shape: tuple[int, ...], p: float) -> Tensor:
    """bool tensor of `shape`: True where the flat stream keeps the element."""
    count = 1
    for size in shape:
        count *= size
    index = torch.arange(-(-count // 8), dtype=torch.int64, device=seed.device)
    zero = torch.zeros_like(index)
    words = philox((index & _MASK32, index >> 32, zero, zero + FLAT_STREAM), seed)
    return (_decisions(words).reshape(-1)[:count] >= threshold(p)).reshape(shape)


def attention_keep_mask(seed: Tensor, shape: tuple[int, int, int, int], p: float) -> Tensor:
    """bool [B, H, S, T]: True where the attention stream keeps the probability."""
    b, h, s, t = shape
    counts = (-(-t // 8), s, b * h)
    x, row, slab = (torch.arange(n, dtype=torch.int64, device=seed.device) for n in counts)
    c0 = x.expand(b * h, s, -1)
    c1 = row[:, None].expand(b * h, s, counts[0])
    c2 = slab[:, None, None].expand(b * h, s, counts[0])
    words = philox((c0, c1, c2, torch.full_like(c0, ATTENTION_STREAM)), seed)
    keep = _decisions(words).reshape(b * h, s, counts[0] * 8)[:, :, :t] >= threshold(p)
    return keep.reshape(b, h, s, t)
