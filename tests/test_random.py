"""The dropout contract of llmkern/random.py: known answers, an independent Philox, both streams."""

import numpy as np
import pytest
import torch

from llmkern import random

SEEDS = [0, 1, 0x123456789ABCDEF0 >> 2, 2**62 - 1]


def _philox(counter, key, rounds):
    """Philox4x32 from the paper, in Python integers."""
    c, k = list(counter), list(key)
    for _ in range(rounds):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [b >> 32 ^ c[1] ^ k[0], b & 0xFFFFFFFF, a >> 32 ^ c[3] ^ k[1], a & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def _key(seed):
    return seed & 0xFFFFFFFF, seed >> 32


# kat_vectors of Random123 (Salmon et al.): philox4x32 with 10 and with 7 rounds.
@pytest.mark.parametrize(
    ("rounds", "counter", "key", "expected"),
    [
        (10, [0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        (10, [0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            10,
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
        (7, [0] * 4, [0] * 2, "5f6fb709 0d893f64 4f121f81 4f730a48"),
        (7, [0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, "5207ddc2 45165e59 4d8ee751 8c52f662"),
        (
            7,
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            "4dfccaba 190a87f0 c47362ba b6b5242a",
        ),
    ],
)
def test_philox_gives_the_published_words(rounds, counter, key, expected):
    words = [int(word, 16) for word in expected.split()]
    assert _philox(counter, key, rounds) == words
    if rounds == random.ROUNDS:
        seed = int.from_bytes(np.array(key, np.uint32).tobytes(), "little", signed=True)
        got = random.philox(tuple(torch.tensor([c]) for c in counter), torch.tensor([seed]))
        assert [int(word) for word in got] == words


@pytest.mark.parametrize("seed", SEEDS)
def test_philox_matches_the_paper_on_many_counters(seed):
    counters = torch.randint(0, 2**32, (64, 4), generator=torch.Generator().manual_seed(3))
    words = torch.stack(random.philox(tuple(counters.unbind(1)), torch.tensor([seed])), 1)
    for counter, got in zip(counters.tolist(), words.tolist(), strict=True):
        assert got == _philox(counter, _key(seed), random.ROUNDS)


@pytest.mark.parametrize("seed", SEEDS)
def test_flat_stream_uses_the_counters_of_the_contract(seed):
    p, count = 0.3, 101
    keep = random.flat_keep_mask(torch.tensor([seed]), (count,), p)
    for element in range(count):
        words = _philox((element // 8, 0, 0, 0x666C6174), _key(seed), 7)
        decision = words[element % 8 // 2] >> 16 * (element % 2) & 0xFFFF
        assert bool(keep[element]) == (decision >= round(p * 65536))


def test_attention_stream_uses_the_counters_of_the_contract():
    seed, p, (b, h, s, t) = 77, 0.6, (2, 3, 4, 19)
    keep = random.attention_keep_mask(torch.tensor([seed]), (b, h, s, t), p)
    for slab, i, j in np.ndindex(b * h, s, t):
        words = _philox((j // 8, i, slab, 0x61747465), _key(seed), 7)
        decision = words[j % 8 // 2] >> 16 * (j % 2) & 0xFFFF
        assert bool(keep[slab // h, slab % h, i, j]) == (decision >= round(p * 65536))


def test_threshold_and_scale_at_the_ends():
    assert random.threshold(0.0) == 0
    assert random.scale(0.0) == 1.0
    assert random.threshold(1.0) == 65536
    assert random.scale(1.0) == 0.0
    assert random.threshold(1.0 - 1e-9) == 65535  # below 1 something is kept
    assert random.scale(1.0 - 1e-9) == 65536.0


def test_seed_comes_from_torchs_generator():
    torch.manual_seed(5)
    first, second = random.draw_seed(torch.device("cpu")), random.draw_seed(torch.device("cpu"))
    torch.manual_seed(5)
    assert torch.equal(random.draw_seed(torch.device("cpu")), first)
    assert not torch.equal(first, second)
