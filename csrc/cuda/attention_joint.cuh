// What a warp does in attention's backward in one pass (attention_bwd_joint.cu): shared memory, and
// products of its keys with 32 queries at a time. Operands of the two products that give S and dP
// are read as they are, of the others transposed, by ldmatrix either way.
#pragma once

#include "attention_cut.cuh"

namespace llmkern {

constexpr int kGroup = 32;  // queries whose scores are in registers at a time

// kWarpsOf: 4 or 8 warps in a block.
template <int kHeadDim, int kWarpsOf>
struct Joint {
  static constexpr int kD = kHeadDim, kWarps = kWarpsOf, kThreads = kWarps * kWarp;
  static constexpr int kTiles = kD == 64 ? 2 : 1;   // of 16 keys, for each warp
  static constexpr int kGroups = kD == 64 ? 2 : 1;  // in a tile of queries
  static constexpr int kQueries = kGroup * kGroups;
  static constexpr int kWarpKeys = kWarpRows * kTiles, kKeys = kWarpKeys * kWarps;
  // Of dQ a warp computes 32 queries x kCols columns.
  static constexpr int kParts = kWarps / kGroups, kCols = kD / kParts;
  static_assert(kCols % 16 == 0, "one ldmatrix has 16 columns of K");
  static constexpr int kRow = kD * 2;
  static constexpr int kTile = kQueries * kRow;
  static constexpr int kK = 0, kV = kKeys * kRow;
  static constexpr int kQ = 2 * kV, kDout = kQ + 2 * kTile;  // two stages each
  static constexpr int kDs = kDout + 2 * kTile;              // [kGroups][kKeys] rows of 64 bytes
  static constexpr int kDsGroup = kKeys * kGroup * 2;
  // A finished tile of dQ takes the place of dS.
  static constexpr int kDsBytes = kGroups * kDsGroup > kTile ? kGroups* kDsGroup : kTile;
  static constexpr int kTerms = kDs + kDsBytes;  // float2 a query, two stages
  static constexpr int kTermsTile = kQueries * 8;
  static constexpr int kTicket = kDs;  // read before dS is written
  static constexpr int kBytes = kTerms + 2 * kTermsTile;
};

// Where unit u of row `key` of dS stands: two rows share a line of 128 bytes, so that both the four
// units of two rows and one unit of eight rows lie in distinct bank groups. Unit u of a row holds
// queries 8 i + 2 u + e at 2 i + e: what lane u of a quad has of it.
__device__ inline int ds_offset(int key, int unit) {
  return key / 2 * 128 + (key % 2 * 4 + (unit ^ (key / 2 % 4))) * 16;
}
__device__ inline int ds_query(int unit, int at) { return at / 2 * 8 + unit * 2 + at % 2; }

// A lane's ldmatrix rows of a tile of kD columns: at[i] for columns 16 i .. and, 128 bytes on,
// 16 (i + 4) .. Tiles start at multiples of 128 bytes, so all follow from one address; it is the
// only one that keeps a register over the loop.
struct Columns {
  uint32_t at[4];

  __device__ explicit Columns(uint32_t first) {
    ptx::keep(first);
#pragma unroll
    for (int i = 0; i < 4; ++i) at[i] = first ^ (i * 32);
  }
};

template <int kStep>
constexpr int kColumnBytes = kStep / 4 * 128;

// s [keys of the warp][kBlocks * 8 queries] += a b^T, kOffset bytes after a and b.
template <class T, class J, int kOffsetA, int kOffsetB, int kBlocks>
__device__ inline void multiply_group(float (&s)[J::kTiles][kBlocks][4], const Columns& a,
                                      const Columns& b) {
  static_for<J::kD / 16>([&](auto step) {
    constexpr int kAt = kColumnBytes<step.value>;
    uint32_t x[J::kTiles][4], y[kBlocks / 2][4];
    static_for<J::kTiles>([&](auto i) {
      ptx::ldmatrix_x4<kOffsetA + kAt + i.value * 16 * J::kRow>(x[i.value], a.at[step.value % 4]);
    });
    static_for<kBlocks / 2>([&](auto j) {
      ptx::ldmatrix_x4<kOffsetB + kAt + j.value * 16 * J::kRow>(y[j.value], b.at[step.value % 4]);
    });
#pragma unroll
    for (int i = 0; i < J::kTiles; ++i) {
#pragma unroll
      for (int j = 0; j < kBlocks; ++j) {
        attention_mma(s[i][j], x[i], y[j / 2][j % 2], y[j / 2][j % 2 + 2], T{});
      }
    }
  });
}

// Weights of the warp's keys for 32 queries, as mma takes them: [keys][queries / 16][4].
template <int kTiles>
using Weights = uint32_t[kTiles][2][4];

// Those of blocks of eight queries from block kFirst on.
template <class T, int kFirst, int kTiles, int kBlocks>
__device__ inline void pack_weights(Weights<kTiles>& w, const float (&s)[kTiles][kBlocks][4]) {
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
#pragma unroll
    for (int j = 0; j < kBlocks; ++j) {
      const int at = kFirst + j;
      w[i][at / 2][at % 2 * 2] = pack_pair(s[i][j][0], s[i][j][1], T{});
      w[i][at / 2][at % 2 * 2 + 1] = pack_pair(s[i][j][2], s[i][j][3], T{});
    }
  }
}

// sum [keys of the warp][kD] += w times 32 rows.
template <class T, class J, int kOffset>
__device__ inline void accumulate_group(float (&sum)[J::kTiles][J::kD / 8][4],
                                        const Weights<J::kTiles>& w, const Columns& b) {
  static_for<2>([&](auto step) {
    static_for<J::kD / 16>([&](auto j) {
      uint32_t y[4];
      ptx::ldmatrix_x4_trans<kOffset + kColumnBytes<j.value> + step.value * 16 * J::kRow>(
          y, b.at[j.value % 4]);
#pragma unroll
      for (int i = 0; i < J::kTiles; ++i) {
        attention_mma(sum[i][2 * j.value], w[i][step.value], y[0], y[1], T{});
        attention_mma(sum[i][2 * j.value + 1], w[i][step.value], y[2], y[3], T{});
      }
    });
  });
}

// The same of 16 keys, pair by pair, where a row that not all of them see may hold a NaN or Inf.
template <class T, int kD>
__device__ inline void accumulate_seen_pairs(float (&sum)[kD / 8][4], const uint32_t (&w)[2][4],
                                             const uint8_t* rows, const Band (&band)[2]) {
  const int lane = threadIdx.x % kWarp;
  uint32_t words[2][kGroup / 8];  // indexed at run time: in local memory
#pragma unroll
  for (int j = 0; j < kGroup / 8; ++j) {
    words[0][j] = w[j / 2][j % 2 * 2];
    words[1][j] = w[j / 2][j % 2 * 2 + 1];
  }
#pragma unroll 1
  for (int c = 0; c < kGroup; ++c) {
    float weight[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t pair = __shfl_sync(kAllLanes, words[half][c / 8], lane / 4 * 4 + c % 8 / 2);
      weight[half] = c % 2 == 0 ? low_half(pair, T{}) : high_half(pair, T{});
    }
#pragma unroll
    for (int j = 0; j < kD / 8; ++j) {
      const uint32_t pair =
          *reinterpret_cast<const uint32_t*>(rows + row_offset<kD>(c, j) + lane % 4 * 4);
      const float low = low_half(pair, T{}), high = high_half(pair, T{});
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (!band[half].sees(c)) continue;
        sum[j][2 * half] = add_weighted(sum[j][2 * half], weight[half], low);
        sum[j][2 * half + 1] = add_weighted(sum[j][2 * half + 1], weight[half], high);
      }
    }
  }
}

// f(i, j, e) for each element of a lane's scores: those of key tile i and query block j.
template <int kTiles, int kBlocks, class F>
__device__ inline void each_score(F&& f) {
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
#pragma unroll
    for (int j = 0; j < kBlocks; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) f(i, j, e);
    }
  }
}

// One of the terms of a lane's queries, x or y of RowTerms, for kBlocks blocks of eight queries.
template <int kKind, int kBlocks>
struct Terms {
  float of[kBlocks][2];

  __device__ explicit Terms(const uint8_t* shared) {
#pragma unroll
    for (int j = 0; j < kBlocks; ++j) {
      const float4 pair = *reinterpret_cast<const float4*>(shared + j * 64);
      of[j][0] = kKind == 0 ? pair.x : pair.y;
      of[j][1] = kKind == 0 ? pair.z : pair.w;
    }
  }
  __device__ float operator()(int j, int e) const { return of[j][e % 2]; }
};

}  // namespace llmkern
