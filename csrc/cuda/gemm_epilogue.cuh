// From the accumulators to y: the float tile goes through shared memory, so that each thread ends
// up with eight columns of a row: one 16-byte store, one Philox call, one branch on the activation.
//
// Layout of the tile [kRows][kCols] of floats: 16-byte unit u of a row (columns 4u .. 4u + 3), with
// c = u / 2 and h = u % 2, stands at unit (c ^ 4h ^ (row % 4)) + h * kCols / 8 of its row. Banks
// repeat every eight units, so, modulo 8,
//   - a fragment store (16 lanes: 4 rows, both h, one c) hits c ^ 4h ^ row: eight distinct units,
//     each filled by two lanes;
//   - a read of one half h by 8 lanes (one row, c .. c + 7) hits eight distinct units.
// Gated: blocks of eight columns of the product alternate between z and u; they are parted here, z
// in the first half of the row.
#pragma once

#include "activation.cuh"
#include "common.cuh"
#include "llmkern/gemm.h"
#include "philox.cuh"

namespace llmkern {

struct EpilogueParams {
  Activation activation;
  bool gated, vector;
  bool plain;  // vector, and at most a bias is added to one product
  const void* bias[2];
  void* preact[2];
  const void* residual;
  int64_t residual_stride;
  Dropout dropout;
  void* y;
  int64_t y_stride;
};

inline EpilogueParams epilogue_params(const LinearEpilogue& e, const GemmShape& s) {
  const auto aligned = [&](const void* p, int64_t stride) { return is_vector(p, stride, s.dtype); };
  const bool vector = s.n % kPack == 0 && aligned(e.bias[0], 0) && aligned(e.bias[1], 0) &&
                      aligned(e.preact[0], s.n) && aligned(e.preact[1], s.n) &&
                      aligned(e.residual, e.residual_stride) && aligned(e.y, e.y_stride);
  const bool plain = vector && !s.gated && e.activation == Activation::kNone &&
                     e.preact[0] == nullptr && e.residual == nullptr && e.drop_threshold == 0;
  return {e.activation,
          s.gated,
          vector,
          plain,
          {e.bias[0], e.bias[1]},
          {e.preact[0], e.preact[1]},
          e.residual,
          e.residual_stride,
          dropout_of(e.drop_threshold, e.seed),
          e.y,
          e.y_stride};
}

// Byte offset of 16-byte unit h (0, 1) of block c of a row.
template <int kCols>
__device__ inline int tile_offset(int row, int c, int h) {
  static_assert(kCols % 64 == 0, "a row is a whole number of bank cycles");
  return row * kCols * 4 + ((c ^ (4 * h) ^ (row & 3)) + h * (kCols / 8)) * 16;
}

// Where block c (eight columns) of the product stands in the tile.
template <int kCols>
__device__ inline int tile_block(bool gated, int c) {
  return gated ? (c >> 1) + (c & 1) * (kCols / 16) : c;
}

// row_bytes: where the row starts; swizzle: row % 4.
template <int kCols>
__device__ inline void read_block(const uint8_t* row_bytes, int swizzle, int c, float (&v)[kPack]) {
  const int low = tile_offset<kCols>(swizzle, c, 0) - swizzle * kCols * 4;
  const int high = tile_offset<kCols>(swizzle, c, 1) - swizzle * kCols * 4;
  const float4 a = *reinterpret_cast<const float4*>(row_bytes + low);
  const float4 b = *reinterpret_cast<const float4*>(row_bytes + high);
  v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w;
  v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
}

// A thread's eight columns and what it needs at each row of them.
struct Columns {
  int col, n;
  float bias[2][kPack];
};

template <class T>
__device__ inline Columns load_columns(const EpilogueParams& e, int col, int n) {
  Columns c{col, n, {}};
#pragma unroll
  for (int which = 0; which < 2; ++which) {
    if (e.bias[which] == nullptr) continue;
    load_pack(static_cast<const T*>(e.bias[which]), col, n, e.vector, c.bias[which]);
  }
  return c;
}

// z (or u): the product with its bias, kept if backward wants it.
template <class T>
__device__ inline void add_bias(const EpilogueParams& e, const Columns& c, int which, int64_t row,
                                float (&v)[kPack]) {
  if (e.bias[which] != nullptr) {
#pragma unroll
    for (int i = 0; i < kPack; ++i) v[i] += c.bias[which][i];
  }
  if (e.preact[which] != nullptr) {
    store_pack(static_cast<T*>(e.preact[which]) + row * c.n, c.col, c.n, e.vector, v);
  }
}

template <class T>
__device__ inline void finish_pack(const EpilogueParams& e, const Columns& c, int64_t row,
                                   float (&z)[kPack], float (&u)[kPack]) {
  add_bias<T>(e, c, 0, row, z);
  activate(e.activation, z);
  if (e.gated) {
    add_bias<T>(e, c, 1, row, u);
#pragma unroll
    for (int i = 0; i < kPack; ++i) z[i] *= u[i];
  }
  if (e.dropout.threshold != 0) drop_pack(e.dropout, row * c.n + c.col, z);
  if (e.residual != nullptr) {
    load_pack(static_cast<const T*>(e.residual) + row * e.residual_stride, c.col, c.n, e.vector, u);
#pragma unroll
    for (int i = 0; i < kPack; ++i) z[i] += u[i];
  }
  store_pack(static_cast<T*>(e.y) + row * e.y_stride, c.col, c.n, e.vector, z);
}

// The tile whose first element is (row0, col0) of y, by all threads of the block.
template <class T, int kRows, int kCols, int kThreads>
__device__ inline void finish_tile(const EpilogueParams& e, const uint8_t* tile, int64_t row0,
                                   int64_t m, int col0, int n) {
  static_assert(kCols == 64 || kCols == 128, "a row is 8 or 16 packs");
  const int shift = (kCols == 128 ? 4 : 3) - (e.gated ? 1 : 0);  // packs of a row of y, as 2^shift
  const int c = threadIdx.x & ((1 << shift) - 1), step = kThreads >> shift;
  static_assert((kThreads >> 4) % 4 == 0, "the rows of a thread have the same swizzle");
  const int first = threadIdx.x >> shift;
  const int64_t end = m - row0 < kRows ? m - row0 : kRows;
  if (col0 + c * kPack >= n) return;
  const Columns columns = load_columns<T>(e, col0 + c * kPack, n);
  const uint8_t* at = tile + first * kCols * 4;
  for (int row = first; row < end; row += step, at += step * kCols * 4) {
    float z[kPack], u[kPack];
    read_block<kCols>(at, first & 3, c, z);
    if (e.gated) read_block<kCols>(at, first & 3, c + kCols / 16, u);
    finish_pack<T>(e, columns, row0 + row, z, u);
  }
}

// Adds the bias to a warp's fragments: blocks of eight columns, of which this lane holds two from
// `col` on; n is a multiple of 8.
template <class T, int kRows, int kBlocks>
__device__ inline void add_bias_pairs(const void* bias, int col, int n,
                                      float (&sum)[kRows][kBlocks][4]) {
#pragma unroll
  for (int j = 0; j < kBlocks; ++j) {
    if (col + j * 8 >= n) return;
    const auto pair =
        *reinterpret_cast<const uint32_t*>(static_cast<const T*>(bias) + col + j * 8);
    const float low = low_half(pair, T{}), high = high_half(pair, T{});
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      sum[i][j][0] += low, sum[i][j][1] += high;
      sum[i][j][2] += low, sum[i][j][3] += high;
    }
  }
}

// The 16-bit tile in shared memory (row_offset<kSide>) to y, 16 bytes at a time.
template <class T, int kSide, int kThreads>
__device__ inline void copy_tile(const EpilogueParams& e, int64_t row0, int64_t m, int col0,
                                 int n) {
  constexpr int kUnits = kSide / kPack, kStep = kThreads / kUnits;
  static_assert(kStep % 8 == 0, "the rows of a thread have the same swizzle");
  const int unit = threadIdx.x % kUnits, first = threadIdx.x / kUnits;
  if (col0 + unit * kPack >= n) return;
  const uint8_t* from = shared_bytes + row_offset<kSide>(first, unit);
  const int64_t step = kStep * e.y_stride, left = m - row0 - first;
  T* to = static_cast<T*>(e.y) + (row0 + first) * e.y_stride + col0 + unit * kPack;
  const auto copy = [&](int i) {
    *reinterpret_cast<uint4*>(to) =
        *reinterpret_cast<const uint4*>(from + i * kStep * kSide * 2);
    to += step;
  };
  if (m - row0 >= kSide) {
#pragma unroll
    for (int i = 0; i < kSide / kStep; ++i) copy(i);
  } else {
    for (int i = 0; i * kStep < left; ++i) copy(i);
  }
}

}  // namespace llmkern
