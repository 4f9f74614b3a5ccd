// Shared by norm_fwd.cu and norm_bwd.cu: how rows are laid over threads, and sums over a row.
//
// A group of `lanes` threads (a power of two) holds one row in registers, kRowPacks packs of eight
// elements a thread: pack c of thread l is columns 8 (c * lanes + l) .. + 7, so that neighbouring
// threads read neighbouring 16 bytes. A block holds threads / lanes groups, each group several rows
// one after another with the weights kept in registers. Rows longer than kMaxRowCols are read again
// for each pass by a block of kLoopThreads (the *_loop kernels).
#pragma once

#include "common.cuh"
#include "llmkern/norm.h"
#include "philox.cuh"

namespace llmkern {

constexpr int kRowPacks = 4;
constexpr int kRowThreads = 128;  // of a block, where a row does not need more
constexpr int kMaxRowThreads = 256;
constexpr int kMaxRowCols = kMaxRowThreads * kRowPacks * kPack;
constexpr int kLoopThreads = 256;
constexpr int kReduceSlots = kMaxRowThreads / kWarp;

struct RowPlan {
  int lanes;           // threads a row
  int threads;         // a block
  int rows_per_group;  // one after another
};

// Fewest threads that hold the row; at least a warp where there are that many packs, so that no
// thread holds several packs while others idle.
inline RowPlan row_plan(int64_t cols, int rows_per_group) {
  const int64_t packs = ceil_div(cols, kPack);
  int lanes = 1;
  while (lanes < packs && lanes < kWarp) lanes *= 2;
  while (lanes * kRowPacks < packs) lanes *= 2;
  return {lanes, lanes > kRowThreads ? lanes : kRowThreads, rows_per_group};
}

// Sum over the group's threads, the same value in each, in an order that depends on `lanes` alone.
// Groups of more than a warp meet in shared memory; successive sums take turns between two sets of
// slots, so one barrier a sum is enough.
struct GroupSum {
  float* slots;  // [2][kReduceSlots]
  int lanes;
  int turn = 0;

  __device__ float operator()(float v) {
    for (int step = min(lanes, kWarp) / 2; step > 0; step /= 2) {
      v += __shfl_xor_sync(kAllLanes, v, step);
    }
    if (lanes <= kWarp) return v;
    float* mine = slots + turn * kReduceSlots;
    turn ^= 1;
    const int warp = threadIdx.x / kWarp, warps = lanes / kWarp;
    if (threadIdx.x % kWarp == 0) mine[warp] = v;
    __syncthreads();
    const int first = warp / warps * warps;
    float sum = 0.0f;
    for (int w = first; w < first + warps; ++w) sum += mine[w];
    return sum;
  }
};

struct RowPlace {
  int lane;       // in the group
  int64_t group;  // over the grid
};

__device__ inline RowPlace row_place(int lanes) {
  const int groups = blockDim.x / lanes;
  return {static_cast<int>(threadIdx.x) % lanes,
          static_cast<int64_t>(blockIdx.x) * groups + threadIdx.x / lanes};
}

// What the device needs of NormShape.
struct NormScalars {
  int64_t rows;
  int cols;
  float eps, inv_cols;
  bool rms, unit_offset, vector;
  DType weight_dtype;
  Dropout dropout;
};

inline NormScalars norm_scalars(const NormShape& s, bool vector) {
  return {s.rows,
          static_cast<int>(s.cols),
          static_cast<float>(s.eps),
          static_cast<float>(1.0 / static_cast<double>(s.cols)),
          s.rms,
          s.unit_offset,
          vector && s.cols % kPack == 0,
          s.weight_dtype,
          dropout_of(s.drop_threshold, s.seed)};
}

// Columns of a pack that do not exist become 0; there are none where packs are whole.
__device__ inline void clear_missing(float (&v)[kPack], int col, const NormScalars& s) {
  if (s.vector) return;
#pragma unroll
  for (int i = 0; i < kPack; ++i) {
    if (col + i >= s.cols) v[i] = 0.0f;
  }
}

// The scale of eight columns: weight, + 1 with unit_offset, 1 without a weight.
__device__ inline void load_scale(const NormScalars& s, const void* weight, int col,
                                  float (&w)[kPack]) {
  if (weight != nullptr) load_pack_as(s.weight_dtype, weight, col, s.cols, s.vector, w);
#pragma unroll
  for (int i = 0; i < kPack; ++i) {
    w[i] = weight == nullptr ? 1.0f : s.unit_offset ? w[i] + 1.0f : w[i];
  }
}

// f(X{}, T{}): dtypes of x and of everything else.
template <class F>
void dispatch_norm(const NormShape& s, F&& f) {
  dispatch_dtype(s.x_dtype, [&](auto x) {
    if constexpr (sizeof(x) == sizeof(float)) {
      f(x, x);
    } else if (s.dtype == DType::kFloat32) {
      f(x, float{});
    } else {
      f(x, x);
    }
  });
}

}  // namespace llmkern
