// How a product is cut. Three ways, chosen by shape alone:
//
//   kBlocked   both operands packed: B whole (a slice of columns at a time), A block by block
//   kNarrow    few rows, k contiguous in the weight: the roles swap. x is packed, and the weight's
//              rows are the broadcast operand, read where they are: each weight is read once and
//              not copied (16-bit weights are widened in cache-sized blocks)
//   kVector    very few rows: bound by the memory that holds the weight, so nothing is packed
//
// K is cut into chunks that depend on K alone; chunk sums are added in order. Rows and columns are
// cut to suit the threads, which no element's sum can see.
#pragma once

#include "gemm_microkernel.h"
#include "llmkern/gemm.h"
#include "parallel.h"

namespace llmkern {
namespace LLMKERN_ISA {

// A panel of B of kDepth steps (16 KB with AVX2) stays in the first-level cache while it meets the
// kBlockRows rows of a packed block of A (192 KB), which stays in the second.
constexpr int64_t kDepth = 256;
constexpr int64_t kBlockRows = 192;
constexpr int64_t kGroupCols = 768;                // columns that a block of A meets
constexpr int64_t kSliceBytes = int64_t{1} << 24;  // of packed B at a time
constexpr int64_t kNarrowRows = 192;
constexpr int64_t kVectorRows = 4;
constexpr int64_t kVectorCols = 64, kVectorMaxCols = 1024;  // columns of a task of kVector
constexpr int64_t kSerialWork = int64_t{1} << 18;  // multiply-adds that do not pay for a fork
constexpr int64_t kTasksPerThread = 3;

enum class GemmPath { kBlocked, kNarrow, kVector };

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
// Where part i of `parts` even parts of n begins.
inline int64_t cut(int64_t n, int64_t parts, int64_t i) { return n * i / parts; }

// dim 0: the weight's rows (n) are contiguous; dim 1: k is.
inline bool weight_contiguous(const GemmShape& s, int dim) {
  return s.b_stride[0][dim] == 1 && (!s.gated || s.b_stride[1][dim] == 1);
}

inline GemmPath gemm_path(const GemmShape& s) {
  const bool along_k = weight_contiguous(s, 1);
  if (s.m <= kVectorRows && (along_k || weight_contiguous(s, 0))) return GemmPath::kVector;
  return along_k && s.m <= kNarrowRows && s.n > s.m ? GemmPath::kNarrow : GemmPath::kBlocked;
}

inline int gemm_threads(const GemmShape& s) {
  return s.m * s.n * s.k <= kSerialWork ? 1 : max_threads();
}

// Blocked and narrow: rows of the broadcast operand x columns of the lane operand.
struct GemmPlan {
  bool narrow;
  int parts;  // 2 when gated
  int threads;
  int64_t rows, cols, k, chunks;
  int64_t row_panels, col_panels;          // MR rows, NR columns each
  int64_t slices, row_blocks, col_blocks;  // slices of columns; blocks inside one
  int64_t block_panels, group_panels;      // the largest block's
  // Sizes in scratch, in compute-type values.
  int64_t b_panel, b_part, a_panel, a_block, sum_stride, sum_part, turned, thread, total;
};

// Splits rows and columns until there is work for all threads, in blocks as square as the packing
// of A allows (a column split packs A again).
template <class C>
void cut_blocks(GemmPlan* p, int64_t slice_panels) {
  constexpr int64_t kMR = Tile<C>::kRows, kNR = Tile<C>::kCols;
  p->row_blocks = ceil_div(p->row_panels * kMR, kBlockRows);
  p->col_blocks = ceil_div(slice_panels * kNR, kGroupCols);
  const int64_t wanted = p->threads == 1 ? 1 : p->threads * kTasksPerThread;
  while (p->row_blocks * p->col_blocks < wanted) {
    const int64_t rows = p->row_panels / p->row_blocks, cols = slice_panels / p->col_blocks;
    if (rows < 2 && cols < 2) break;
    if (cols < 2 || (rows >= 2 && rows * kMR * 4 >= cols * kNR))
      ++p->row_blocks;
    else
      ++p->col_blocks;
  }
  if (p->col_blocks % p->threads != 0)
    p->row_blocks = min_of(p->row_panels, round_up(p->row_blocks, p->threads));
  p->block_panels = ceil_div(p->row_panels, p->row_blocks);
  p->group_panels = ceil_div(slice_panels, p->col_blocks);
}

template <class C>
GemmPlan gemm_plan(const GemmShape& s, int threads) {
  constexpr int64_t kMR = Tile<C>::kRows, kNR = Tile<C>::kCols, kLine = 64 / sizeof(C);
  GemmPlan p{};
  p.narrow = gemm_path(s) == GemmPath::kNarrow;
  p.parts = s.gated ? 2 : 1;
  p.threads = threads;
  p.rows = p.narrow ? s.n : s.m;
  p.cols = p.narrow ? s.m : s.n;
  p.k = s.k;
  p.chunks = max_of<int64_t>(1, ceil_div(s.k, kDepth));
  p.row_panels = ceil_div(p.rows, kMR);
  p.col_panels = ceil_div(p.cols, kNR);
  p.b_panel = round_up(s.k * kNR, kLine);
  const int64_t lane_parts = p.narrow ? 1 : p.parts;
  const int64_t fit = kSliceBytes / sizeof(C) / max_of<int64_t>(1, lane_parts * p.b_panel);
  p.slices = ceil_div(p.col_panels, max_of<int64_t>(fit, 1));
  const int64_t slice_panels = ceil_div(p.col_panels, p.slices);
  cut_blocks<C>(&p, slice_panels);
  p.b_part = slice_panels * p.b_panel;
  p.a_panel = panel_size<C, kMR>(ceil_div(s.k, p.chunks));
  p.a_block = p.block_panels * p.a_panel;
  // Not a power of two: rows of sums that are 4 KB apart would share a cache set.
  p.sum_stride = p.group_panels * kNR + kLine;
  p.sum_part = p.block_panels * kMR * p.sum_stride;
  p.turned = p.narrow ? round_up(p.block_panels * kMR * p.cols, kLine) : 0;
  p.thread = p.a_block + p.parts * (p.sum_part + p.turned);
  p.total = lane_parts * p.b_part + threads * p.thread;
  return p;
}

// A task's columns in kVector, and its scratch: x in the compute type, then each thread's sums.
struct VectorPlan {
  int threads;
  int64_t cols, x, thread, total;
};

inline VectorPlan vector_plan(const GemmShape& s, int threads) {
  const int64_t even = round_up(ceil_div(s.n, threads * kTasksPerThread), kVectorCols);
  VectorPlan p{};
  p.threads = threads;
  p.cols = min_of(max_of(even, kVectorCols), kVectorMaxCols);
  p.x = round_up(s.m * s.k, kVectorCols);
  p.thread = (s.gated ? 2 : 1) * s.m * p.cols;
  p.total = p.x + threads * p.thread;
  return p;
}

template <class F>
void run_tasks(int threads, int64_t tasks, const F& f) {
  if (threads > 1) return parallel_for(tasks, f);
  for (int64_t t = 0; t < tasks; ++t) f(t, 0);
}

}  // namespace LLMKERN_ISA
}  // namespace llmkern
