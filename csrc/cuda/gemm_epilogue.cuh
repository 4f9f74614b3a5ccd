// From the accumulators to y: the float tile goes through shared memory, so that each thread ends
// up with 16 bytes of a row of y: one store, one Philox call, one branch on the activation.
//
// Layout of the tile [kRows][kCols] of floats: 16-byte unit u of a row (columns 4u .. 4u + 3), with
// c = u / 2 and h = u % 2, stands at unit (c ^ 4h ^ (row % 4)) + h * kCols / 8 of its row. Banks
// repeat every eight units, so, modulo 8,
//   - a fragment store (16 lanes: 4 rows, both h, one c) hits c ^ 4h ^ row: eight distinct units,
//     each filled by two lanes;
//   - a read of one half h by 8 lanes (one row, c .. c + 7) hits eight distinct units, and so does
//     one of both halves of c .. c + 3.
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
  bool plain;  // vector, n a multiple of 8, and at most a bias is added to one product
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
  const bool vector = s.n % pack_of(s.dtype) == 0 && aligned(e.bias[0], 0) &&
                      aligned(e.bias[1], 0) && aligned(e.preact[0], s.n) &&
                      aligned(e.preact[1], s.n) && aligned(e.residual, e.residual_stride) &&
                      aligned(e.y, e.y_stride);
  const bool plain = vector && s.n % kPack == 0 && !s.gated && e.activation == Activation::kNone &&
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

// Columns N * c .. of the product from a row that starts at row_bytes; swizzle: row % 4.
template <int kCols, int N>
__device__ inline void read_block(const uint8_t* row_bytes, int swizzle, int c, float (&v)[N]) {
#pragma unroll
  for (int q = 0; q < N / 4; ++q) {
    const int quad = c * (N / 4) + q;
    const int at = tile_offset<kCols>(swizzle, quad / 2, quad % 2) - swizzle * kCols * 4;
    const float4 a = *reinterpret_cast<const float4*>(row_bytes + at);
    v[4 * q] = a.x, v[4 * q + 1] = a.y, v[4 * q + 2] = a.z, v[4 * q + 3] = a.w;
  }
}

// A thread's columns and what it needs at each row of them.
template <int N>
struct Columns {
  int col, n;
  float bias[2][N];
};

template <class T>
__device__ inline Columns<kPackOf<T>> load_columns(const EpilogueParams& e, int col, int n) {
  Columns<kPackOf<T>> c{col, n, {}};
#pragma unroll
  for (int which = 0; which < 2; ++which) {
    if (e.bias[which] == nullptr) continue;
    load_pack(static_cast<const T*>(e.bias[which]), col, n, e.vector, c.bias[which]);
  }
  return c;
}

// z (or u): the product with its bias, kept if backward wants it.
template <class T, int N>
__device__ inline void add_bias(const EpilogueParams& e, const Columns<N>& c, int which,
                                int64_t row, float (&v)[N]) {
  if (e.bias[which] != nullptr) {
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] += c.bias[which][i];
  }
  if (e.preact[which] != nullptr) {
    store_pack(static_cast<T*>(e.preact[which]) + row * c.n, c.col, c.n, e.vector, v);
  }
}

template <class T, int N>
__device__ inline void finish_pack(const EpilogueParams& e, const Columns<N>& c, int64_t row,
                                   float (&z)[N], float (&u)[N]) {
  add_bias<T>(e, c, 0, row, z);
  activate(e.activation, z);
  if (e.gated) {
    add_bias<T>(e, c, 1, row, u);
#pragma unroll
    for (int i = 0; i < N; ++i) z[i] *= u[i];
  }
  if (e.dropout.threshold != 0) drop_pack(e.dropout, row * c.n + c.col, z);
  if (e.residual != nullptr) {
    load_pack(static_cast<const T*>(e.residual) + row * e.residual_stride, c.col, c.n, e.vector, u);
#pragma unroll
    for (int i = 0; i < N; ++i) z[i] += u[i];
  }
  store_pack(static_cast<T*>(e.y) + row * e.y_stride, c.col, c.n, e.vector, z);
}

// The tile whose first element is (row0, col0) of y, by all threads of the block.
template <class T, int kRows, int kCols, int kThreads>
__device__ inline void finish_tile(const EpilogueParams& e, const uint8_t* tile, int64_t row0,
                                   int64_t m, int col0, int n) {
  constexpr int N = kPackOf<T>, kPacks = kCols / N;
  static_assert(kPacks >= 8 && kPacks <= 32, "a row is 8, 16 or 32 packs");
  // Packs of a row of y, as 2^shift.
  const int shift = (kPacks == 32 ? 5 : kPacks == 16 ? 4 : 3) - (e.gated ? 1 : 0);
  const int c = threadIdx.x & ((1 << shift) - 1), step = kThreads >> shift;
  static_assert((kThreads >> 5) % 4 == 0, "the rows of a thread have the same swizzle");
  const int first = threadIdx.x >> shift;
  const int64_t end = m - row0 < kRows ? m - row0 : kRows;
  if (col0 + c * N >= n) return;
  const auto columns = load_columns<T>(e, col0 + c * N, n);
  const uint8_t* at = tile + first * kCols * 4;
  for (int row = first; row < end; row += step, at += step * kCols * 4) {
    float z[N], u[N];
    read_block<kCols>(at, first & 3, c, z);
    if (e.gated) read_block<kCols>(at, first & 3, c + kPacks / 2, u);
    finish_pack<T>(e, columns, row0 + row, z, u);
  }
}

template <class T>
__device__ inline float2 load_pair(const T* from) {
  const uint32_t pair = *reinterpret_cast<const uint32_t*>(from);
  return make_float2(low_half(pair, T{}), high_half(pair, T{}));
}
__device__ inline float2 load_pair(const float* from) {
  return *reinterpret_cast<const float2*>(from);
}

// Adds the bias to a warp's fragments: blocks of eight columns, of which this lane holds two from
// `col` on; n is a multiple of 8.
template <class T, int kRows, int kBlocks>
__device__ inline void add_bias_pairs(const void* bias, int col, int n,
                                      float (&sum)[kRows][kBlocks][4]) {
#pragma unroll
  for (int j = 0; j < kBlocks; ++j) {
    if (col + j * 8 >= n) return;
    const float2 b = load_pair(static_cast<const T*>(bias) + col + j * 8);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      sum[i][j][0] += b.x, sum[i][j][1] += b.y;
      sum[i][j][2] += b.x, sum[i][j][3] += b.y;
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
    *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from + i * kStep * kSide * 2);
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
