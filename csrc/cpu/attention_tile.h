// The one micro-kernel of attention, forward and backward:
//
//   emit(m, v, sum_k A(m, k) * B[k][v])      m < rows, v = vectors along the lanes of B and C
//
// A is read by scalar broadcast, from storage of the compute type, in either order (AOrder). Row k
// of B is contiguous and starts at b + k * ldb. The caller's Emit says what becomes of a finished
// sum: StoreTo overwrites C, AddTo adds to it, RescaleAddTo multiplies C by a factor per lane
// first.
//
// A register tile is kRows x kVecs vectors: 6 x 2 of the 16 AVX2 registers (12 chains; 2 FMA ports
// x 4 cycles need 8), 14 x 2 of the 32 AVX-512 registers; the rest holds B and one broadcast of A.
// Sums over k run in order of k in one chain, whatever the tile an element falls in: a result does
// not depend on how rows and lanes are cut.
#pragma once

#include "simd/vec.h"

namespace llmkern {
namespace LLMKERN_ISA {

// kRowMajor: A(m, k) = a[m * lda + k].  kColMajor: A(m, k) = a[k * lda + m].
enum class AOrder { kRowMajor, kColMajor };

template <class C>
struct AttentionTile {
  static constexpr int kVecs = 2;
  static constexpr int kLanes = kVecs * Vec<C>::kLanes;  // lanes of a panel
  static constexpr int kRows = Vec<float>::kLanes == 16 ? 14 : 6;
};

// What to do with a finished sum of row m, vector v of a panel. put_n writes n lanes only. A panel
// at lane offset l is reached by shifted(l).
template <class C>
struct StoreTo {
  C* c;
  int64_t ldc;
  StoreTo shifted(int64_t l) const { return {c + l, ldc}; }
  void put(int64_t m, int v, Vec<C> sum) const { sum.store(c + m * ldc + v * Vec<C>::kLanes); }
  void put_n(int64_t m, int v, Vec<C> sum, int n) const {
    sum.store_n(c + m * ldc + v * Vec<C>::kLanes, n);
  }
};

template <class C>
struct AddTo {
  C* c;
  int64_t ldc;
  AddTo shifted(int64_t l) const { return {c + l, ldc}; }
  void put(int64_t m, int v, Vec<C> sum) const {
    C* p = c + m * ldc + v * Vec<C>::kLanes;
    (Vec<C>::load(p) + sum).store(p);
  }
  void put_n(int64_t m, int v, Vec<C> sum, int n) const {
    C* p = c + m * ldc + v * Vec<C>::kLanes;
    (Vec<C>::load_n(p, n) + sum).store_n(p, n);
  }
};

template <class C>
struct RescaleAddTo {
  C* c;
  int64_t ldc;
  const C* factor;  // one per lane
  RescaleAddTo shifted(int64_t l) const { return {c + l, ldc, factor + l}; }
  void put(int64_t m, int v, Vec<C> sum) const {
    const int l = v * Vec<C>::kLanes;
    C* p = c + m * ldc + l;
    Vec<C>::fma(Vec<C>::load(p), Vec<C>::load(factor + l), sum).store(p);
  }
  void put_n(int64_t m, int v, Vec<C> sum, int n) const {
    const int l = v * Vec<C>::kLanes;
    C* p = c + m * ldc + l;
    Vec<C>::fma(Vec<C>::load_n(p, n), Vec<C>::load_n(factor + l, n), sum).store_n(p, n);
  }
};

// R rows x NV vectors, over the whole depth; with kTail the last vector has `tail` lanes and no
// other lane of B is read. m0 is handed to emit: the rows are m0 .. m0 + R - 1 of C, and `a` points
// at A(m0, 0).
template <AOrder kOrder, int R, int NV, bool kTail, class C, class Emit>
static inline void tile(int64_t depth, const C* a, int64_t lda, const C* b, int64_t ldb, int tail,
                        int64_t m0, Emit emit) {
  using V = Vec<C>;
  V acc[R][NV];
#pragma GCC unroll 16
  for (int m = 0; m < R; ++m) {
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) acc[m][v] = V::zero();
  }
#pragma GCC unroll 2
  for (int64_t k = 0; k < depth; ++k) {
    V row[NV];
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) {
      const C* p = b + k * ldb + v * V::kLanes;
      row[v] = kTail && v == NV - 1 ? V::load_n(p, tail) : V::load(p);
    }
#pragma GCC unroll 16
    for (int m = 0; m < R; ++m) {
      const V x = V::broadcast(kOrder == AOrder::kRowMajor ? a + m * lda + k : a + k * lda + m);
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v) acc[m][v] = V::fma(x, row[v], acc[m][v]);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < R; ++m) {
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) {
      if (kTail && v == NV - 1) {
        emit.put_n(m0 + m, v, acc[m][v], tail);
      } else {
        emit.put(m0 + m, v, acc[m][v]);
      }
    }
  }
}

// Height of the next register tile when `left` rows remain. A remainder of 1 to 3 rows would run on
// 2 to 6 chains, so it takes rows from the last full tile.
template <class C>
static inline int tile_rows(int64_t left) {
  constexpr int kRows = AttentionTile<C>::kRows, kHalf = kRows == 14 ? 8 : 4;
  if (left == kRows || left >= kRows + 4) return kRows;
  if (left >= kHalf) return kHalf;
  return left >= 4 ? 4 : left >= 2 ? 2 : 1;
}

// One lane panel of NV vectors, any number of rows.
template <AOrder kOrder, int NV, bool kTail, class C, class Emit>
static void panel(int64_t rows, int64_t depth, const C* a, int64_t lda, const C* b, int64_t ldb,
                  int tail, const Emit& emit) {
  constexpr int kRows = AttentionTile<C>::kRows;
  int64_t m = 0;
  while (m < rows) {
    const C* am = a + (kOrder == AOrder::kRowMajor ? m * lda : m);
    const int r = tile_rows<C>(rows - m);
    switch (r) {
      case kRows:
        tile<kOrder, kRows, NV, kTail>(depth, am, lda, b, ldb, tail, m, emit);
        break;
      case 8:
        tile<kOrder, 8, NV, kTail>(depth, am, lda, b, ldb, tail, m, emit);
        break;
      case 4:
        tile<kOrder, 4, NV, kTail>(depth, am, lda, b, ldb, tail, m, emit);
        break;
      case 2:
        tile<kOrder, 2, NV, kTail>(depth, am, lda, b, ldb, tail, m, emit);
        break;
      default:
        tile<kOrder, 1, NV, kTail>(depth, am, lda, b, ldb, tail, m, emit);
    }
    m += r;
  }
}

// C[rows][lanes] from A[rows][depth] and B[depth][lanes], any sizes: full panels, then one of one
// or two vectors with a masked tail. Touches nothing outside the given rows and lanes.
template <AOrder kOrder, class C, class Emit>
static inline void tile_matmul(int64_t rows, int64_t lanes, int64_t depth, const C* a, int64_t lda,
                               const C* b, int64_t ldb, const Emit& emit) {
  constexpr int kLanes = AttentionTile<C>::kLanes, kVec = Vec<C>::kLanes;
  int64_t l = 0;
  for (; l + kLanes <= lanes; l += kLanes) {
    panel<kOrder, 2, false>(rows, depth, a, lda, b + l, ldb, 0, emit.shifted(l));
  }
  const int left = static_cast<int>(lanes - l);
  if (left == 0) return;
  if (left < kVec) {
    panel<kOrder, 1, true>(rows, depth, a, lda, b + l, ldb, left, emit.shifted(l));
  } else if (left == kVec) {
    panel<kOrder, 1, false>(rows, depth, a, lda, b + l, ldb, 0, emit.shifted(l));
  } else {
    panel<kOrder, 2, true>(rows, depth, a, lda, b + l, ldb, left - kVec, emit.shifted(l));
  }
}

}  // namespace LLMKERN_ISA
}  // namespace llmkern
