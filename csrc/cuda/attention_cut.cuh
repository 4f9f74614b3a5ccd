// Weighted sums over a tile that the band cuts: some rows see a column that others do not. The
// weight of a hidden pair is 0, but on tensor cores 0 * NaN is NaN; a NaN or Inf in a hidden row
// must not reach the sum. So each thread looks through the units of such a tile that it copied
// itself, before the barrier that hands the tile over; a tile that holds a NaN or Inf, which is
// rare, is added up pair by pair. (Rows past the end and masked-out keys are 0 in the tile.)
#pragma once

#include "attention.cuh"

namespace llmkern {

__device__ inline uint32_t exponent_bits(BFloat16) { return 0x7f80u; }
__device__ inline uint32_t exponent_bits(Float16) { return 0x7c00u; }

// Sets bit 15 or 31 of the result where a half of a word of this thread's units has all exponent
// bits set: adding the lowest of them carries out of the exponent.
template <class T, int kD, int kRows, int kThreads = kAttentionThreads>
__device__ inline uint32_t own_exponents(const uint8_t* tile) {
  constexpr int kUnits = kD / 8, kStep = kThreads / kUnits;
  const uint32_t mask = exponent_bits(T{}) * 0x10001u, one = mask & ~(mask << 1);
  uint32_t found = 0;
#pragma unroll
  for (int i = 0; i < kRows / kStep; ++i) {
    const int at = row_offset<kD>(threadIdx.x / kUnits + i * kStep, threadIdx.x % kUnits);
    const uint4 raw = *reinterpret_cast<const uint4*>(tile + at);
    found |= ((raw.x & mask) + one) | ((raw.y & mask) + one) | ((raw.z & mask) + one) |
             ((raw.w & mask) + one);
  }
  return found;
}

// The barrier that hands over tiles; whether all that threads found in theirs is finite.
__device__ inline bool barrier_all_finite(uint32_t found) {
  return !__syncthreads_or((found & 0x80008000u) != 0);
}

// sum + weight * value; a weight of 0 keeps out Inf, which 0 * Inf = NaN would not.
__device__ inline float add_weighted(float sum, float weight, float value) {
  return weight == 0.0f && value == value ? sum : sum + weight * value;
}

template <class T, int kD, int kN>
__device__ inline void accumulate_pairs(float (&sum)[kD / 8][4], const float (&p)[kN / 8][4],
                                        const uint8_t* tile, const Band (&band)[2]) {
  const int lane = threadIdx.x % kWarp, t = lane % 4;
  float weights[kN / 8][4];  // indexed at run time: in local memory
#pragma unroll
  for (int j = 0; j < kN / 8; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) weights[j][e] = p[j][e];
  }
#pragma unroll 1
  for (int c = 0; c < kN; ++c) {
    const int holder = lane / 4 * 4 + c % 8 / 2;
    const float w0 = __shfl_sync(kAllLanes, weights[c / 8][c % 2], holder);
    const float w1 = __shfl_sync(kAllLanes, weights[c / 8][2 + c % 2], holder);
    const bool sees0 = band[0].sees(c), sees1 = band[1].sees(c);
#pragma unroll
    for (int j = 0; j < kD / 8; ++j) {
      const uint32_t pair = *reinterpret_cast<const uint32_t*>(tile + row_offset<kD>(c, j) + t * 4);
      const float low = low_half(pair, T{}), high = high_half(pair, T{});
      if (sees0) {
        sum[j][0] = add_weighted(sum[j][0], w0, low);
        sum[j][1] = add_weighted(sum[j][1], w0, high);
      }
      if (sees1) {
        sum[j][2] = add_weighted(sum[j][2], w1, low);
        sum[j][3] = add_weighted(sum[j][3], w1, high);
      }
    }
  }
}

// accumulate, of a tile at byte `offset` of shared memory. plain: the band hides nothing in it, or
// it is finite.
template <class T, int kD, int kN>
__device__ inline void accumulate_seen(float (&sum)[kD / 8][4], const float (&p)[kN / 8][4],
                                       uint32_t offset, const Lanes<kD>& lanes, bool plain,
                                       const Band (&band)[2]) {
  if (plain) {
    accumulate<T, kD, kN>(sum, p, shared_address(shared_bytes) + offset, lanes);
  } else {
    accumulate_pairs<T, kD, kN>(sum, p, shared_bytes + offset, band);
  }
}

}  // namespace llmkern
