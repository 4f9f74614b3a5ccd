// Shared by norm_fwd.cu and norm_bwd.cu: how rows are laid over threads, and sums over a row.
//
// A group of `lanes` threads holds one row in registers, up to kRowElements of them a thread in
// packs of N = 4 or 8 (kPackOf): pack c of thread l is columns N (c * lanes + l) .. + N - 1, so
// that neighbouring threads read neighbouring 16 bytes. Up to 32 lanes (a power of two) several
// groups share a block; longer rows have a block each. Each group takes several rows one after
// another with the weights kept in registers. Rows longer than kMaxRowCols are read again for each
// pass by a block of kLoopThreads (the *_loop kernels).
//
// Exact kernels (norm_exact.cuh) are for widths of which each thread has 24 or 32 columns:
// multiples of 768 up to 6144 and of 1024 up to 8192. They lay columns out in their own way.
#pragma once

#include "common.cuh"
#include "llmkern/norm.h"
#include "philox.cuh"

namespace llmkern {

constexpr int kRowElements = 32;  // of a row in a thread, at most
constexpr int kRowThreads = 128;  // of a block, where a row does not need more
constexpr int kMaxRowThreads = 256;
constexpr int kMaxRowCols = kMaxRowThreads * kRowElements;
constexpr int kLoopThreads = 256;
constexpr int kReduceSlots = kMaxRowThreads / kWarp;
constexpr int kReduceBytes = 2 * kReduceSlots * sizeof(float);

struct RowPlan {
  int lanes;           // threads a row
  int threads;         // a block
  int rows_per_group;  // one after another
  int exact;           // columns of every thread; 0: not all have the same
};

// Fewest threads that hold the row; at least a warp where there are that many packs, so that no
// thread holds several packs while others idle.
inline RowPlan row_plan(int64_t cols, int pack, int rows_per_group) {
  const int64_t packs = ceil_div(cols, pack), most = kRowElements / pack;
  int lanes = 1, exact = 0;
  while (lanes < packs && lanes < kWarp) lanes *= 2;
  if (packs > kWarp * most) lanes = static_cast<int>(ceil_div(packs, kWarp * most)) * kWarp;
  for (int each : {24, 32}) {
    const int64_t unit = kWarp * each;
    if (cols % unit == 0 && cols / unit <= kMaxRowThreads / kWarp) exact = each;
  }
  if (exact > 0) lanes = static_cast<int>(cols) / exact;
  return {lanes, lanes > kWarp ? lanes : kRowThreads, rows_per_group, exact};
}

// Sums over the group's threads, the same value in each, in an order that depends on `lanes` alone.
// A block's warps meet in shared memory; successive sums take turns between two sets of slots, so
// one barrier a sum is enough.
struct GroupSum {
  float* slots;  // [2][kReduceSlots], 16-byte aligned; those without a warp hold 0
  int lanes;
  int turn = 0;

  __device__ GroupSum(uint8_t* shared, int lanes)
      : slots(reinterpret_cast<float*>(shared)), lanes(lanes) {
    if (lanes <= kWarp) return;
    if (threadIdx.x < 2 * kReduceSlots) slots[threadIdx.x] = 0.0f;
    __syncthreads();
  }

  __device__ float operator()(float v) {
    if (lanes >= kWarp) return of_warps(v);
    for (int step = lanes / 2; step > 0; step /= 2) v += __shfl_xor_sync(kAllLanes, v, step);
    return v;
  }

  // Where `lanes` are whole warps.
  __device__ float of_warps(float v) {
    v = warp_sum(v);
    if (lanes == kWarp) return v;
    float* mine = slots + turn;
    turn ^= kReduceSlots;
    if (threadIdx.x % kWarp == 0) mine[threadIdx.x / kWarp] = v;
    __syncthreads();
    const float4 a = reinterpret_cast<const float4*>(mine)[0];
    const float4 b = reinterpret_cast<const float4*>(mine)[1];
    return ((a.x + a.y) + (a.z + a.w)) + ((b.x + b.y) + (b.z + b.w));
  }
};
static_assert(kReduceSlots == 8, "GroupSum reads two float4");

struct RowPlace {
  int lane;       // in the group
  int64_t group;  // over the grid
};

__device__ inline RowPlace row_place(int lanes) {
  if (lanes > kWarp) return {static_cast<int>(threadIdx.x), static_cast<int64_t>(blockIdx.x)};
  const int shift = __ffs(lanes) - 1;  // lanes is a power of two
  return {static_cast<int>(threadIdx.x) & (lanes - 1),
          static_cast<int64_t>(blockIdx.x) * (kRowThreads >> shift) + (threadIdx.x >> shift)};
}

template <int N>
__device__ inline float sum_of(const float (&v)[N]) {
  const float sum = (v[0] + v[1]) + (v[2] + v[3]);
  if constexpr (N == 8) return sum + ((v[4] + v[5]) + (v[6] + v[7]));
  return sum;
}

template <int N>
__device__ inline float dot_of(const float (&a)[N], const float (&b)[N]) {
  float sum = a[0] * b[0];
#pragma unroll
  for (int i = 1; i < N; ++i) sum += a[i] * b[i];
  return sum;
}

// A layer norm's row whose variance is below this share of its squared mean asks for a better mean
// than that of its sum: one that is exact where all elements are equal.
constexpr float kLost = 1.0f / (1 << 20);
// Of differences, so that those of any row of finite elements, and their sum, do not overflow.
constexpr float kOffsetScale = 1.0f / (int64_t{1} << 33);

// What the device needs of NormShape.
struct NormScalars {
  int64_t rows;
  int cols;
  float eps, inv_cols;
  float lost, lost_from;  // see may_be_lost
  bool rms, unit_offset, vector;
  DType weight_dtype;
  Dropout dropout;
};

inline NormScalars norm_scalars(const NormShape& s, int pack, bool vector) {
  return {s.rows,
          static_cast<int>(s.cols),
          static_cast<float>(s.eps),
          static_cast<float>(1.0 / static_cast<double>(s.cols)),
          kLost * static_cast<float>(s.cols),
          s.rms ? -1.0f : 0.0f,
          s.rms,
          s.unit_offset,
          vector && s.cols % pack == 0,
          s.weight_dtype,
          dropout_of(s.drop_threshold, s.seed)};
}

// Columns of a pack that do not exist become 0; there are none where packs are whole.
template <int N>
__device__ inline void clear_missing(float (&v)[N], int col, const NormScalars& s) {
  if (s.vector) return;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (col + i >= s.cols) v[i] = 0.0f;
  }
}

// The scale of a pack of columns: weight, + 1 with unit_offset, 1 without a weight.
template <int N>
__device__ inline void load_scale(const NormScalars& s, const void* weight, int col,
                                  float (&w)[N]) {
  if (weight == nullptr) {
#pragma unroll
    for (int i = 0; i < N; ++i) w[i] = 1.0f;
    return;
  }
  load_pack_as(s.weight_dtype, weight, col, s.cols, s.vector, w);
  if (!s.unit_offset) return;
#pragma unroll
  for (int i = 0; i < N; ++i) w[i] += 1.0f;
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
