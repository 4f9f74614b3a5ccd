// Philox4x32-7 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011: 7 rounds
// pass BigCrush), one counter per lane. The counter contract, shared by every backend, is
// llmkern/random.py.
#pragma once

#include "vec.h"

namespace llmkern {
namespace LLMKERN_ISA {

constexpr int kPhiloxRounds = 7;
constexpr int kDecisionsPerCounter = 8;  // 16 bits each

// c[0..3]: in the counter words, out the random words.
static inline void philox(VecU c[4], uint64_t seed) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    VecU lo0, hi0, lo1, hi1;
    VecU::mul_wide(VecU::set1(0xD2511F53u), c[0], &lo0, &hi0);
    VecU::mul_wide(VecU::set1(0xCD9E8D57u), c[2], &lo1, &hi1);
    c[0] = hi1 ^ c[1] ^ VecU::set1(k0);
    c[1] = lo1;
    c[2] = hi0 ^ c[3] ^ VecU::set1(k1);
    c[3] = lo0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

}  // namespace LLMKERN_ISA
}  // namespace llmkern
