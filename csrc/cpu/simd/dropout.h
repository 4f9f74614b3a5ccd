// Dropout decisions of the flat contract (llmkern/random.py): element e of a contiguous tensor
// takes decision e % 8 of the counter (lo32(e / 8), hi32(e / 8), 0, 'flat').
//
// The decisions of a counter are one byte of keep bits, so a run of elements is a bit string in
// memory order; a vector of elements takes its mask from there at any bit offset. On AVX2 the 4
// words of 8 counters cost about 130 instructions for 64 elements, the bits 20 more.
#pragma once

#include "philox.h"

namespace llmkern {
namespace LLMKERN_ISA {

constexpr uint32_t kFlatStream = 0x666c6174u;
constexpr int kFlatBlock = VecU::kLanes * kDecisionsPerCounter;  // elements of one philox call

// counter_lanes(): which counter of a block each lane computes. keep_bytes(): the block's bytes in
// counter order. Lanes are dealt so that the 4x4 transposes inside 128-bit lanes, which bring the
// words of a counter together, leave the counters in order too.
#if defined(__AVX512F__) && defined(__AVX512BW__)

static inline VecU counter_lanes() {
  return {_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15)};
}

static inline void keep_bytes(const VecU word[4], uint32_t threshold, uint8_t* bytes) {
  const __m512i t = _mm512_set1_epi16(static_cast<int16_t>(threshold));
  const __m512i a = _mm512_unpacklo_epi32(word[0].v, word[1].v);
  const __m512i b = _mm512_unpacklo_epi32(word[2].v, word[3].v);
  const __m512i c = _mm512_unpackhi_epi32(word[0].v, word[1].v);
  const __m512i d = _mm512_unpackhi_epi32(word[2].v, word[3].v);
  const uint32_t keep[4] = {_mm512_cmpge_epu16_mask(_mm512_unpacklo_epi64(a, b), t),
                            _mm512_cmpge_epu16_mask(_mm512_unpackhi_epi64(a, b), t),
                            _mm512_cmpge_epu16_mask(_mm512_unpacklo_epi64(c, d), t),
                            _mm512_cmpge_epu16_mask(_mm512_unpackhi_epi64(c, d), t)};
  std::memcpy(bytes, keep, sizeof(keep));
}

#elif defined(__AVX2__)

static inline VecU counter_lanes() { return {_mm256_setr_epi32(0, 1, 4, 5, 2, 3, 6, 7)}; }

static inline void keep_bytes(const VecU word[4], uint32_t threshold, uint8_t* bytes) {
  const __m256i t = _mm256_set1_epi16(static_cast<int16_t>(threshold));
  const auto kept = [&](__m256i v) { return _mm256_cmpeq_epi16(_mm256_max_epu16(v, t), v); };
  const __m256i a = _mm256_unpacklo_epi32(word[0].v, word[1].v);
  const __m256i b = _mm256_unpacklo_epi32(word[2].v, word[3].v);
  const __m256i c = _mm256_unpackhi_epi32(word[0].v, word[1].v);
  const __m256i d = _mm256_unpackhi_epi32(word[2].v, word[3].v);
  const __m256i low =
      _mm256_packs_epi16(kept(_mm256_unpacklo_epi64(a, b)), kept(_mm256_unpackhi_epi64(a, b)));
  const __m256i high =
      _mm256_packs_epi16(kept(_mm256_unpacklo_epi64(c, d)), kept(_mm256_unpackhi_epi64(c, d)));
  const int32_t keep[2] = {_mm256_movemask_epi8(low), _mm256_movemask_epi8(high)};
  std::memcpy(bytes, keep, sizeof(keep));
}

#else

static inline VecU counter_lanes() { return VecU::iota(); }

static inline void keep_bytes(const VecU word[4], uint32_t threshold, uint8_t* bytes) {
  for (int l = 0; l < VecU::kLanes; ++l) {
    uint32_t byte = 0;
    for (int w = 0; w < 4; ++w) {
      byte |= static_cast<uint32_t>((word[w].v[l] & 0xffffu) >= threshold) << (2 * w);
      byte |= static_cast<uint32_t>((word[w].v[l] >> 16) >= threshold) << (2 * w + 1);
    }
    bytes[l] = static_cast<uint8_t>(byte);
  }
}

#endif

// Keep bits of n <= kElements elements from any first element on.
template <int kElements>
struct KeepBits {
  // The first byte may be used from its last bit on; whole blocks are written; masks read 4 bytes.
  uint8_t bytes[kElements / 8 + 1 + VecU::kLanes + 4];
  int first_bit;

  // Mask of the elements first + j, first + j + 1, ...
  template <class Mask>
  Mask mask(int64_t j) const {
    const int64_t bit = first_bit + j;
    uint32_t word;
    std::memcpy(&word, bytes + bit / 8, sizeof(word));
    return Mask::from_bits(word >> (bit % 8));
  }
};

// Factor of a kept element, in the type that it is multiplied in.
template <class C>
static inline C keep_scale(uint32_t threshold) {
  return threshold < 65536 ? C(65536) / static_cast<C>(65536 - threshold) : C(0);
}

struct FlatDropout {
  uint64_t seed;
  uint32_t threshold;  // of 65536; 65536 keeps nothing
  float scale;

  template <int kElements>
  void keep(int64_t first, int64_t n, KeepBits<kElements>* out) const {
    const uint64_t begin = static_cast<uint64_t>(first) / 8;
    const uint64_t end = (static_cast<uint64_t>(first + n) + 7) / 8;
    out->first_bit = static_cast<int>(first % 8);
    uint8_t* bytes = out->bytes;
    if (threshold == 65536) {  // the 16-bit comparison cannot say "none"
      std::memset(bytes, 0, sizeof(out->bytes));
      return;
    }
    for (uint64_t counter = begin; counter < end; counter += VecU::kLanes) {
      const VecU base = VecU::set1(static_cast<uint32_t>(counter));
      const VecU low = base + counter_lanes();
      // A lane's low word wrapped if the top bit went from 1 to 0.
      const VecU carry = (base & (low ^ VecU::set1(0xffffffffu))).shr<31>();
      VecU c[4] = {low, VecU::set1(static_cast<uint32_t>(counter >> 32)) + carry, VecU::set1(0),
                   VecU::set1(kFlatStream)};
      philox(c, seed);
      keep_bytes(c, threshold, bytes);
      bytes += VecU::kLanes;
    }
  }

  // Factors of elements [first, first + n): scale where kept, else 0.
  void fill(int64_t first, int64_t n, float* factor) const {
    constexpr int kChunk = 1024;
    KeepBits<kChunk> bits;
    const VecF kept = VecF::set1(scale);
    for (int64_t begin = 0; begin < n; begin += kChunk) {
      const int64_t count = min_of<int64_t>(kChunk, n - begin);
      keep(first + begin, count, &bits);
      const auto at = [&](int64_t j) {
        return VecF::keep(bits.template mask<VecF::Mask>(j), kept);
      };
      float* out = factor + begin;
      int64_t j = 0;
      for (; j + VecF::kLanes <= count; j += VecF::kLanes) at(j).store(out + j);
      if (j < count) at(j).store_n(out + j, static_cast<int>(count - j));
    }
  }
};

}  // namespace LLMKERN_ISA
}  // namespace llmkern
