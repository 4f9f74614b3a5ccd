// The loops around the register tile, from outside in: slices of columns (packed B fits a shared
// cache), blocks of rows x groups of columns (tasks), chunks of k (a packed block of A fits the
// second-level cache), tiles. A task sums all of K in its own scratch, then hands whole row
// stretches to the epilogue, which writes each output once.
//
// Van Zee and van de Geijn, "BLIS: A framework for rapidly instantiating BLAS functionality", 2015.
#pragma once

#include "gemm_epilogue.h"
#include "gemm_pack.h"
#include "gemm_plan.h"

namespace llmkern {
namespace LLMKERN_ISA {

// One side of the product: one or two matrices [rows, k] that share sizes.
template <class T>
struct Operand {
  const T* p[2];
  int64_t stride[2][2];
  bool two;
  const T* at(int part, int64_t row, int64_t k) const {
    const int q = two ? part : 0;
    return p[q] + row * stride[q][0] + k * stride[q][1];
  }
  int64_t row_stride(int part) const { return stride[two ? part : 0][0]; }
  int64_t k_stride(int part) const { return stride[two ? part : 0][1]; }
};

// Packs columns [first, first + panels) of all parts of the lane operand, whole K.
template <class T, class C = Compute<T>>
void pack_slice(const GemmPlan& p, const Operand<T>& b, int64_t first, int64_t panels, C* packed) {
  constexpr int64_t kNR = Tile<C>::kCols, kPanels = 4, kSteps = 512;
  const int64_t groups = ceil_div(panels, kPanels), steps = ceil_div(p.k, kSteps);
  run_tasks(p.threads, (b.two ? 2 : 1) * groups * steps, [&](int64_t task, int) {
    const int part = static_cast<int>(task / (groups * steps));
    const int64_t panel = task / steps % groups * kPanels, k = task % steps * kSteps;
    const int64_t col = (first + panel) * kNR;
    const int64_t cols = min_of(min_of(panels - panel, kPanels) * kNR, p.cols - col);
    pack<C, kNR>(b.at(part, col, k), b.row_stride(part), b.k_stride(part), cols,
                 min_of(kSteps, p.k - k), packed + part * p.b_part + panel * p.b_panel + k * kNR,
                 p.b_panel);
  });
}

// Panels [row, row_end) x [col, col_end) of a task, in the slice that starts at panel `first`.
struct Block {
  int64_t row, row_end, col, col_end, first;
};

// One chunk of k of one part. With the block of A packed, a panel of B meets all its tiles while it
// is in the first-level cache; rows of A that are read in place meet all of B instead.
template <bool kInPlace, class T, class C = Compute<T>>
void multiply_chunk(const GemmPlan& p, const Operand<T>& a, int part, const Block& t, int64_t k,
                    int64_t kc, const C* a_packed, const C* b_packed, const TileOutput<C>& out) {
  constexpr int64_t kMR = Tile<C>::kRows, kNR = Tile<C>::kCols;
  const int64_t rows = t.row_end - t.row, cols = t.col_end - t.col;
  const int64_t outer = kInPlace ? rows : cols, inner = kInPlace ? cols : rows;
  // Each tile asks for its share of the next panel of B, so that it has come when its turn comes.
  const int64_t share = kInPlace ? 0 : ceil_div(kNR * sizeof(C), rows);
  for (int64_t o = 0; o < outer; ++o) {
    for (int64_t i = 0; i < inner; ++i) {
      const int64_t r = kInPlace ? o : i, c = kInPlace ? i : o;
      const int64_t row = (t.row + r) * kMR, col = (t.first + t.col + c) * kNR;
      const int height = static_cast<int>(min_of(kMR, p.rows - row));
      const int width = static_cast<int>(min_of(kNR, p.cols - col));
      const C* const b = b_packed + (t.col + c) * p.b_panel + k * kNR;
      const char* const next = reinterpret_cast<const char*>(b + (kInPlace ? 0 : p.b_panel));
      const Ahead ahead{next + r * kc * share, share};
      const auto tile = [&](auto rows_of_a) {
        const TileOutput<C> at = out.at(r * kMR, c * kNR);
        if (height == kMR && width == kNR)
          micro_kernel<kMR, Tile<C>::kVectors>(kc, rows_of_a, b, at, ahead);
        else
          micro_kernel_edge<C>(height, width, kc, rows_of_a, b, at, ahead);
      };
      if constexpr (kInPlace)
        tile(StridedRows<C>{a.at(part, row, k), a.row_stride(part)});
      else
        tile(PackedRows<C>{a_packed + r * p.a_panel});
    }
  }
}

// Nothing but a bias follows the product and every tile has room for NR columns in y: the last
// chunk's tiles are the store.
template <class T, class C = Compute<T>>
bool tiles_store(const GemmPlan& p, const LinearEpilogue& e) {
  return std::is_same_v<T, C> && !p.narrow && p.parts == 1 && p.cols % Tile<C>::kCols == 0 &&
         e.activation == Activation::kNone && !e.preact[0] && !e.residual && !e.drop_threshold;
}

// Columns of the sums become rows of the output (narrow).
template <class C>
void turn(const C* sum, int64_t sum_stride, int64_t rows, int64_t cols, C* out) {
  using V = Vec<C>;
  constexpr int kLanes = V::kLanes;
  const int64_t even_rows = rows - rows % kLanes, even_cols = cols - cols % kLanes;
  for (int64_t i = 0; i < even_rows; i += kLanes) {
    for (int64_t j = 0; j < even_cols; j += kLanes) {
      V t[kLanes];
      for (int l = 0; l < kLanes; ++l) t[l] = V::load(sum + (i + l) * sum_stride + j);
      transpose(t);
      for (int l = 0; l < kLanes; ++l) t[l].store(out + (j + l) * rows + i);
    }
  }
  for (int64_t j = 0; j < cols; ++j)
    for (int64_t i = j < even_cols ? even_rows : 0; i < rows; ++i)
      out[j * rows + i] = sum[i * sum_stride + j];
}

template <class T, class C = Compute<T>>
void run_block(const GemmPlan& p, const GemmArgs& g, const Operand<T>& a, const Block& t,
               const C* b_packed, C* scratch) {
  constexpr int64_t kMR = Tile<C>::kRows, kNR = Tile<C>::kCols;
  C* const a_packed = scratch;
  C* const sum = scratch + p.a_block;
  C* const turned = sum + p.parts * p.sum_part;
  const int64_t row = t.row * kMR, rows = min_of(t.row_end * kMR, p.rows) - row;
  const int64_t col = (t.first + t.col) * kNR;
  const int64_t cols = min_of((t.first + t.col_end) * kNR, p.cols) - col;
  const bool direct = tiles_store<T>(p, g.epilogue);
  for (int64_t c = 0; c < p.chunks; ++c) {
    const int64_t k = cut(p.k, p.chunks, c), kc = cut(p.k, p.chunks, c + 1) - k;
    for (int part = 0; part < p.parts; ++part) {
      C* const sums = sum + part * p.sum_part;
      TileOutput<C> out{k > 0 ? sums : nullptr, p.sum_stride, sums, p.sum_stride, nullptr};
      if constexpr (std::is_same_v<T, C>) {
        if (direct && c == p.chunks - 1) {
          const T* const bias = static_cast<const T*>(g.epilogue.bias[0]);
          out.out = static_cast<T*>(g.epilogue.y) + row * g.epilogue.y_stride + col;
          out.out_stride = g.epilogue.y_stride;
          out.bias = bias ? bias + col : nullptr;
        }
      }
      const C* const b = b_packed + (a.two ? 0 : part) * p.b_part;
      if constexpr (std::is_same_v<T, C>) {
        if (p.narrow) {
          multiply_chunk<true>(p, a, part, t, k, kc, a_packed, b, out);
          continue;
        }
      }
      if (part == 0 || a.two)
        pack<C, kMR>(a.at(part, row, k), a.row_stride(part), a.k_stride(part), rows, kc, a_packed,
                     p.a_panel);
      multiply_chunk<false>(p, a, part, t, k, kc, a_packed, b, out);
    }
  }
  if (direct) return;
  if (!p.narrow)
    return epilogue_block<T>(g.epilogue, g.shape.gated, g.shape.n, sum, sum + p.sum_part,
                             p.sum_stride, row, rows, col, cols);
  for (int part = 0; part < p.parts; ++part)
    turn(sum + part * p.sum_part, p.sum_stride, rows, cols, turned + part * p.turned);
  epilogue_block<T>(g.epilogue, g.shape.gated, g.shape.n, turned, turned + p.turned, rows, col,
                    cols, row, rows);
}

template <class T>
void gemm_blocked(const GemmArgs& g) {
  using C = Compute<T>;
  const GemmShape& s = g.shape;
  const GemmPlan p = gemm_plan<C>(s, gemm_threads(s));
  const Operand<T> x{
      {static_cast<const T*>(g.a), nullptr}, {{s.a_stride[0], s.a_stride[1]}, {0, 0}}, false};
  const Operand<T> w{{static_cast<const T*>(g.b[0]), static_cast<const T*>(g.b[1])},
                     {{s.b_stride[0][0], s.b_stride[0][1]}, {s.b_stride[1][0], s.b_stride[1][1]}},
                     s.gated};
  const Operand<T>& a = p.narrow ? w : x;
  const Operand<T>& b = p.narrow ? x : w;
  C* const packed = static_cast<C*>(g.scratch);
  C* const threads = packed + (b.two ? 2 : 1) * p.b_part;
  for (int64_t slice = 0; slice < p.slices; ++slice) {
    const int64_t first = cut(p.col_panels, p.slices, slice);
    const int64_t panels = cut(p.col_panels, p.slices, slice + 1) - first;
    pack_slice(p, b, first, panels, packed);
    // Neighbouring tasks share a block of rows' columns of B, which is what stays in a shared
    // cache.
    run_tasks(p.threads, p.row_blocks * p.col_blocks, [&](int64_t task, int thread) {
      const int64_t r = task % p.row_blocks, c = task / p.row_blocks;
      const Block t{cut(p.row_panels, p.row_blocks, r), cut(p.row_panels, p.row_blocks, r + 1),
                    cut(panels, p.col_blocks, c), cut(panels, p.col_blocks, c + 1), first};
      run_block(p, g, a, t, packed, threads + thread * p.thread);
    });
  }
}

}  // namespace LLMKERN_ISA
}  // namespace llmkern
