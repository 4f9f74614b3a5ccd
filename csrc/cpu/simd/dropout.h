// Dropout decisions of the flat contract (llmkern/random.py): element e of a contiguous tensor takes
// decision e % 8 of the counter (lo32(e / 8), hi32(e / 8), 0, 'flat').
#pragma once

#include "philox.h"

namespace llmkern {
namespace LLMKERN_ISA {

constexpr uint32_t kFlatStream = 0x666c6174u;
constexpr int kFlatBlock = VecU::kLanes * kDecisionsPerCounter;

struct FlatDropout {
  uint64_t seed;
  uint32_t threshold;
  float scale;

  // Factors of elements [8 * counter, 8 * counter + kFlatBlock): scale where kept, else 0.
  void block(uint64_t counter, float* factor) const {
    alignas(64) uint32_t lo[VecU::kLanes], hi[VecU::kLanes], word[4][VecU::kLanes];
    for (int l = 0; l < VecU::kLanes; ++l) {
      lo[l] = static_cast<uint32_t>(counter + l);
      hi[l] = static_cast<uint32_t>((counter + l) >> 32);
    }
    VecU c[4] = {VecU::load(lo), VecU::load(hi), VecU::set1(0), VecU::set1(kFlatStream)};
    philox(c, seed);
    for (int w = 0; w < 4; ++w) c[w].store(word[w]);
    for (int l = 0; l < VecU::kLanes; ++l) {
      for (int w = 0; w < 4; ++w) {
        factor[l * 8 + w * 2] = (word[w][l] & 0xffffu) >= threshold ? scale : 0.0f;
        factor[l * 8 + w * 2 + 1] = (word[w][l] >> 16) >= threshold ? scale : 0.0f;
      }
    }
  }

  // Factors of elements [first, first + n).
  void fill(int64_t first, int64_t n, float* factor) const {
    alignas(64) float tmp[kFlatBlock];
    uint64_t counter = static_cast<uint64_t>(first) / 8;
    int64_t skip = first % 8;
    while (n > 0) {
      const int64_t take = min_of<int64_t>(n, kFlatBlock - skip);
      if (take == kFlatBlock) {
        block(counter, factor);
      } else {
        block(counter, tmp);
        std::memcpy(factor, tmp + skip, sizeof(float) * static_cast<size_t>(take));
      }
      factor += take;
      n -= take;
      skip = 0;
      counter += VecU::kLanes;
    }
  }
};

}  // namespace LLMKERN_ISA
}  // namespace llmkern
