// Dropout decisions by a scalar Philox4x32 written from the paper; which element uses which
// counter: llmkern/random.py.
#pragma once

#include <cstdint>

namespace llmkern {
namespace LLMKERN_ISA {

struct Words {
  uint32_t w[4];
};

static inline Words scalar_philox(Words c, uint64_t seed, int rounds) {
  uint32_t key[2] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
  for (int round = 0; round < rounds; ++round) {
    const uint64_t a = uint64_t{0xD2511F53} * c.w[0], b = uint64_t{0xCD9E8D57} * c.w[2];
    c = {{static_cast<uint32_t>(b >> 32) ^ c.w[1] ^ key[0], static_cast<uint32_t>(b),
          static_cast<uint32_t>(a >> 32) ^ c.w[3] ^ key[1], static_cast<uint32_t>(a)}};
    key[0] += 0x9E3779B9;
    key[1] += 0xBB67AE85;
  }
  return c;
}

// Whether decision `element % 8` of a counter keeps its element.
static inline bool keeps(Words counter, uint64_t element, uint64_t seed, uint32_t threshold) {
  const uint32_t word = scalar_philox(counter, seed, 7).w[element % 8 / 2];
  return (element % 2 ? word >> 16 : word & 0xffff) >= threshold;
}

static inline bool flat_keeps(uint64_t element, uint64_t seed, uint32_t threshold) {
  const uint64_t c = element / 8;
  const Words counter = {{static_cast<uint32_t>(c), static_cast<uint32_t>(c >> 32), 0, 0x666c6174}};
  return keeps(counter, element, seed, threshold);
}

static inline bool attention_keeps(int64_t bh, int64_t i, int64_t j, uint64_t seed,
                                   uint32_t threshold) {
  const Words counter = {{static_cast<uint32_t>(j / 8), static_cast<uint32_t>(i),
                          static_cast<uint32_t>(bh), 0x61747465}};
  return keeps(counter, static_cast<uint64_t>(j), seed, threshold);
}

}  // namespace LLMKERN_ISA
}  // namespace llmkern
