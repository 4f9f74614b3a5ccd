// The register tile of the matrix product:
//
//   out[i][j] = (in[i][j] +) sum over kc of A(i, k) * B(k, j) (+ bias[j]),   i < MR, j < NR
//
// B is a packed panel, NR values a step of k. A is a packed panel (MR values a step) or rows of the
// operand itself. There is no branch in k, and an element is
// one chain of fused multiply-adds over k, whatever its place in the tile: results do not depend on
// how the matrix is cut.
//
// Tile sizes: 12 accumulators + 2 of B + 1 of A of the 16 AVX2 registers (6 x 2 vectors: 12 chains
// cover 4 cycles of latency x 2 ports); 28 + 2 of the 32 AVX-512 registers (14 x 2 vectors, A
// broadcast by the multiply-add itself).
#pragma once

#include "simd/vec.h"

namespace llmkern {
namespace LLMKERN_ISA {

template <class C>
struct Tile {
  static constexpr int kLanes = Vec<C>::kLanes;
  static constexpr int kRows = kLanes * sizeof(C) == 64 ? 14 : 6;  // MR
  static constexpr int kVectors = 2;
  static constexpr int kCols = kVectors * kLanes;  // NR
};

// Where A(i, k) is: packed panels step by MR, rows of the operand by 1.
template <class C>
struct PackedRows {
  const C* p;
  const C* at(int i) const { return p + i; }
  void next() { p += Tile<C>::kRows; }
};
template <class C>
struct StridedRows {
  const C* p;
  int64_t stride;
  const C* at(int i) const { return p + i * stride; }
  void next() { ++p; }
};

static inline void prefetch(const void* p) { __builtin_prefetch(p); }

// Where a tile's sums go: out = (in +) sums (+ bias). in, the sum over earlier k, may be out.
template <class C>
struct TileOutput {
  const C* in;  // null: none
  int64_t in_stride;
  C* out;
  int64_t out_stride;
  const C* bias;  // null: none; else NR values

  TileOutput at(int64_t row, int64_t col) const {
    return {in ? in + row * in_stride + col : nullptr, in_stride, out + row * out_stride + col,
            out_stride, bias ? bias + col : nullptr};
  }
};

// Memory that a later tile reads first: one prefetch a step of k, step bytes apart. A few a step
// leave line-fill buffers to the loads of this tile; all at its start would take them all.
struct Ahead {
  const char* p;
  int64_t step;
};

template <int kRows, int kVectors, class C, class A>
static void micro_kernel(int64_t kc, A a, const C* b, const TileOutput<C>& c, Ahead ahead) {
  using V = Vec<C>;
  constexpr int kLanes = V::kLanes;
  V sum[kRows][kVectors];
#pragma GCC unroll 16  // here and at the end too, else GCC keeps the sums in memory
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) sum[i][j] = V::zero();
  if (c.in)
    for (int i = 0; i < kRows; ++i) prefetch(c.in + i * c.in_stride);
  for (int i = 0; i < kRows; ++i) prefetch(c.out + i * c.out_stride);
#pragma GCC unroll 4
  for (int64_t k = 0; k < kc; ++k) {
    V bk[kVectors];
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) bk[j] = V::load(b + j * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const V ai = V::broadcast(a.at(i));
#pragma GCC unroll 2
      for (int j = 0; j < kVectors; ++j) sum[i][j] = V::fma(ai, bk[j], sum[i][j]);
    }
    prefetch(ahead.p);
    ahead.p += ahead.step;
    a.next();
    b += Tile<C>::kCols;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) {
      const int64_t at = j * kLanes;
      V v = sum[i][j];
      if (c.in) v = V::load(c.in + i * c.in_stride + at) + v;
      if (c.bias) v = v + V::load(c.bias + at);
      v.store(c.out + i * c.out_stride + at);
    }
  }
}

// The same for a tile cut short by the matrix's edge: rows <= MR, cols <= NR. Work is cut to whole
// rows and vectors; in, out and bias still have room for NR columns.
template <class C, class A, int kRows = Tile<C>::kRows>
static void micro_kernel_edge(int rows, int cols, int64_t kc, A a, const C* b,
                              const TileOutput<C>& c, Ahead ahead) {
  if constexpr (kRows > 0) {
    if (rows < kRows)
      micro_kernel_edge<C, A, kRows - 1>(rows, cols, kc, a, b, c, ahead);
    else if (cols <= Tile<C>::kLanes)
      micro_kernel<kRows, 1>(kc, a, b, c, ahead);
    else
      micro_kernel<kRows, Tile<C>::kVectors>(kc, a, b, c, ahead);
  }
}

}  // namespace LLMKERN_ISA
}  // namespace llmkern
