// Philox4x32-7 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) under the
// counter contract of llmkern/random.py: one call decides eight elements.
#pragma once

#include <cstdint>

namespace llmkern {

constexpr int kPhiloxRounds = 7;
constexpr uint32_t kFlatStream = 0x666C6174;
constexpr uint32_t kAttentionStream = 0x61747465;

struct PhiloxWords {
  uint32_t w[4];
};

__device__ inline PhiloxWords philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3,
                                     uint64_t seed) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint32_t lo0 = 0xD2511F53u * c0, hi0 = __umulhi(0xD2511F53u, c0);
    const uint32_t lo1 = 0xCD9E8D57u * c2, hi1 = __umulhi(0xCD9E8D57u, c2);
    c0 = hi1 ^ c1 ^ k0;
    c1 = lo1;
    c2 = hi0 ^ c3 ^ k1;
    c3 = lo0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// Bit d: the d-th of the eight 16-bit decisions keeps its element.
__device__ inline uint32_t keep_bits(const PhiloxWords& words, uint32_t threshold) {
  uint32_t bits = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    bits |= ((words.w[i] & 0xffffu) >= threshold ? 1u : 0u) << (2 * i);
    bits |= ((words.w[i] >> 16) >= threshold ? 1u : 0u) << (2 * i + 1);
  }
  return bits;
}

__device__ inline uint32_t flat_counter_bits(uint64_t counter, uint64_t seed, uint32_t threshold) {
  return keep_bits(philox(static_cast<uint32_t>(counter), static_cast<uint32_t>(counter >> 32), 0,
                          kFlatStream, seed),
                   threshold);
}

// Bits of the N elements from `index` on of the flat stream; from two counters where they are not
// all of one.
template <int N>
__device__ inline uint32_t flat_keep_bits(uint64_t index, uint64_t seed, uint32_t threshold) {
  uint32_t bits = flat_counter_bits(index >> 3, seed, threshold);
  const uint32_t shift = index & 7;
  if (shift + N > 8) bits |= flat_counter_bits((index >> 3) + 1, seed, threshold) << 8;
  return bits >> shift;
}

// Dropout of consecutive elements: dropped ones are 0, whatever they were.
struct Dropout {
  uint32_t threshold;  // of 65536; 0: no dropout
  float scale;
  const int64_t* seed;
};

inline Dropout dropout_of(uint32_t threshold, const int64_t* seed) {
  const float kept = static_cast<float>(65536 - static_cast<int64_t>(threshold));
  return {threshold, kept > 0.0f ? 65536.0f / kept : 0.0f, seed};
}

template <int N>
__device__ inline void drop_pack(const Dropout& d, uint64_t index, float (&v)[N]) {
  static_assert(N <= 8, "a counter decides eight elements");
  const uint32_t bits = flat_keep_bits<N>(index, static_cast<uint64_t>(*d.seed), d.threshold);
#pragma unroll
  for (int i = 0; i < N; ++i) v[i] = (bits >> i) & 1u ? v[i] * d.scale : 0.0f;
}

// The same where index is a multiple of N: all decisions are of one counter, and are taken where
// they are used.
template <int N>
__device__ inline void drop_aligned_pack(const Dropout& d, uint64_t index, float (&v)[N]) {
  static_assert(N == 4 || N == 8, "a counter's elements or half of them");
  const uint64_t counter = index >> 3;
  const PhiloxWords words =
      philox(static_cast<uint32_t>(counter), static_cast<uint32_t>(counter >> 32), 0, kFlatStream,
             static_cast<uint64_t>(*d.seed));
  const bool second = N == 4 && (index & 4) != 0;
#pragma unroll
  for (int i = 0; i < N / 2; ++i) {
    const uint32_t word = second ? words.w[i + 4 - N / 2] : words.w[i];
    v[2 * i] = (word & 0xffffu) >= d.threshold ? v[2 * i] * d.scale : 0.0f;
    v[2 * i + 1] = (word >> 16) >= d.threshold ? v[2 * i + 1] * d.scale : 0.0f;
  }
}

}  // namespace llmkern
