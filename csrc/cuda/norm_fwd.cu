// LayerNorm and RMSNorm forward; formulas: llmkern/norm.h, layout: norm.cuh.
//
// norm_fwd: the row stays in registers, so the variance is that of the centred values at no further
// read. Bytes moved: x, residual, z, y once; weight and bias once a group.
#include "kernels.h"
#include "launch.cuh"
#include "norm.cuh"

namespace llmkern {
namespace {

struct FwdParams {
  NormScalars s;
  const void* x;
  int64_t x_stride;
  const void* residual;
  int64_t residual_stride;
  const void *weight, *bias;
  void *z, *y;
  float *mean, *rstd;
  int lanes, rows_per_group;
};

// z of eight columns of a row, rounded as it is stored.
template <class X, class T>
__device__ inline void load_z(const FwdParams& p, int64_t row, int col, float (&z)[kPack]) {
  const NormScalars& s = p.s;
  load_pack(static_cast<const X*>(p.x) + row * p.x_stride, col, s.cols, s.vector, z);
  if (s.dropout.threshold != 0) drop_pack(s.dropout, row * s.cols + col, z);
  if (p.residual != nullptr) {
    float r[kPack];
    load_pack(static_cast<const T*>(p.residual) + row * p.residual_stride, col, s.cols, s.vector,
              r);
#pragma unroll
    for (int i = 0; i < kPack; ++i) z[i] += r[i];
    round_to(z, T{});
  }
}

// z becomes z - mean; gives the sum of its squares. Columns that do not exist become 0; kWhole:
// there are none.
template <bool kWhole>
__device__ inline float centre(float (&z)[kPack], float mean, int col, const NormScalars& s) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kPack; ++i) z[i] -= mean;
  if (!kWhole) clear_missing(z, col, s);
#pragma unroll
  for (int i = 0; i < kPack; ++i) sum += z[i] * z[i];
  return sum;
}

__device__ inline float sum_of(const float (&z)[kPack]) {
  return ((z[0] + z[1]) + (z[2] + z[3])) + ((z[4] + z[5]) + (z[6] + z[7]));
}

template <class T>
__device__ inline void store_y(const FwdParams& p, int64_t row, int col, bool vector,
                               const float (&centred)[kPack], float rstd, const float (&w)[kPack],
                               const float (&b)[kPack]) {
  float y[kPack];
#pragma unroll
  for (int i = 0; i < kPack; ++i) y[i] = centred[i] * rstd * w[i] + b[i];
  store_pack(static_cast<T*>(p.y) + row * p.s.cols, col, p.s.cols, vector, y);
}

__device__ inline void store_statistics(const FwdParams& p, int64_t row, float mean, float rstd) {
  if (p.mean != nullptr) p.mean[row] = mean;
  if (p.rstd != nullptr) p.rstd[row] = rstd;
}

__device__ inline void load_affine(const FwdParams& p, int col, float (&w)[kPack],
                                   float (&b)[kPack]) {
  load_scale(p.s, p.weight, col, w);
#pragma unroll
  for (int i = 0; i < kPack; ++i) b[i] = 0.0f;
  if (p.bias != nullptr) load_pack_as(p.s.weight_dtype, p.bias, col, p.s.cols, p.s.vector, b);
}

// A lane's packs of z of one row, kept where it is wanted; gives their sum (0 for rms). here(c):
// whether the lane has pack c of this row.
template <class X, class T, int kPacks, bool kVector, class Here>
__device__ inline float load_row(const FwdParams& p, int64_t row, int lane, Here&& here,
                                 float (&z)[kPacks][kPack]) {
  const NormScalars& s = p.s;
  const bool vector = kVector || s.vector;
  const auto each = [&](auto&& f) {
#pragma unroll
    for (int c = 0; c < kPacks; ++c) {
      if (here(c)) f((c * p.lanes + lane) * kPack, z[c]);
    }
  };
  const X* x = static_cast<const X*>(p.x) + row * p.x_stride;
  each([&](int col, float(&v)[kPack]) { load_pack(x, col, s.cols, vector, v); });
  if (s.dropout.threshold != 0) {
    each([&](int col, float(&v)[kPack]) { drop_pack(s.dropout, row * s.cols + col, v); });
  }
  if (p.residual != nullptr) {
    const T* residual = static_cast<const T*>(p.residual) + row * p.residual_stride;
    each([&](int col, float(&v)[kPack]) {
      float r[kPack];
      load_pack(residual, col, s.cols, vector, r);
#pragma unroll
      for (int i = 0; i < kPack; ++i) v[i] += r[i];
      round_to(v, T{});
    });
  }
  if (p.z != nullptr) {
    T* kept = static_cast<T*>(p.z) + row * s.cols;
    each([&](int col, float(&v)[kPack]) { store_pack(kept, col, s.cols, vector, v); });
  }
  float sum = 0.0f;
  if (!s.rms) each([&](int, float(&v)[kPack]) { sum += sum_of(v); });
  return sum;
}

template <class X, class T, int kExact>
__global__ void __launch_bounds__(kMaxRowThreads) norm_fwd_kernel(const FwdParams p) {
  constexpr int kPacks = kExact > 0 ? kExact : kRowPacks;
  const NormScalars& s = p.s;
  const RowPlace place = row_place(p.lanes);
  const int lane = place.lane;
  GroupSum total(shared_bytes, p.lanes);
  float w[kPacks][kPack], b[kPacks][kPack];
#pragma unroll
  for (int c = 0; c < kPacks; ++c) {
    const int col = (c * p.lanes + lane) * kPack;
    if (kExact > 0 || col < s.cols) load_affine(p, col, w[c], b[c]);
  }
  for (int r = 0; r < p.rows_per_group; ++r) {
    const int64_t row = place.group * p.rows_per_group + r;
    const bool active = row < s.rows;  // others still take part in the sums
    if (kExact > 0 && !active) return;
    const auto here = [&](int c) {
      return kExact > 0 || (active && (c * p.lanes + lane) * kPack < s.cols);
    };
    float z[kPacks][kPack];
    const float sum = load_row<X, T, kPacks, (kExact > 0)>(p, row, lane, here, z);
    const float mean = s.rms ? 0.0f : total(sum) * s.inv_cols;
    float square = 0.0f;
#pragma unroll
    for (int c = 0; c < kPacks; ++c) {
      if (here(c)) square += centre<(kExact > 0)>(z[c], mean, (c * p.lanes + lane) * kPack, s);
    }
    const float rstd = rsqrtf(total(square) * s.inv_cols + s.eps);
    if (active && lane == 0) store_statistics(p, row, mean, rstd);
#pragma unroll
    for (int c = 0; c < kPacks; ++c) {
      if (!here(c)) continue;
      store_y<T>(p, row, (c * p.lanes + lane) * kPack, kExact > 0 || s.vector, z[c], rstd, w[c],
                 b[c]);
    }
  }
}

// One block a row; z is computed again for each of the three passes.
template <class X, class T>
__global__ void __launch_bounds__(kLoopThreads) norm_fwd_loop_kernel(const FwdParams p) {
  const NormScalars& s = p.s;
  const int64_t row = blockIdx.x;
  const int first = threadIdx.x * kPack, step = kLoopThreads * kPack;
  GroupSum total(shared_bytes, kLoopThreads);
  float z[kPack];
  float mean = 0.0f, square = 0.0f;
  if (!s.rms) {
    float sum = 0.0f;
    for (int col = first; col < s.cols; col += step) {
      load_z<X, T>(p, row, col, z);
      sum += sum_of(z);
    }
    mean = total(sum) * s.inv_cols;
  }
  for (int col = first; col < s.cols; col += step) {
    load_z<X, T>(p, row, col, z);
    square += centre<false>(z, mean, col, s);
  }
  const float rstd = rsqrtf(total(square) * s.inv_cols + s.eps);
  if (threadIdx.x == 0) store_statistics(p, row, mean, rstd);
  for (int col = first; col < s.cols; col += step) {
    float w[kPack], b[kPack];
    load_z<X, T>(p, row, col, z);
    if (p.z != nullptr) store_pack(static_cast<T*>(p.z) + row * s.cols, col, s.cols, s.vector, z);
    load_affine(p, col, w, b);
    centre<false>(z, mean, col, s);
    store_y<T>(p, row, col, s.vector, z, rstd, w, b);
  }
}

// Weights are read once a group: more rows a group save bytes, once there are groups for a large
// card (4 warps on each of 128 multiprocessors).
int fwd_rows_per_group(int64_t rows) {
  return rows >= 16384 ? 16 : rows >= 8192 ? 8 : rows >= 2048 ? 4 : 1;
}

FwdParams fwd_params(const NormFwdArgs& a, const RowPlan& plan) {
  const NormShape& s = a.shape;
  const bool vector =
      is_vector(a.x, a.x_stride, s.x_dtype) && is_vector(a.residual, a.residual_stride, s.dtype) &&
      is_vector(a.weight, 0, s.weight_dtype) && is_vector(a.bias, 0, s.weight_dtype) &&
      is_vector(a.z, s.cols, s.dtype) && is_vector(a.y, s.cols, s.dtype);
  return {norm_scalars(s, vector),
          a.x,
          a.x_stride,
          a.residual,
          a.residual_stride,
          a.weight,
          a.bias,
          a.z,
          a.y,
          static_cast<float*>(a.mean),
          static_cast<float*>(a.rstd),
          plan.lanes,
          plan.rows_per_group};
}

}  // namespace

void norm_fwd(const NormFwdArgs& a, const Place& place) {
  const NormShape& s = a.shape;
  if (s.rows == 0 || s.cols == 0) return;
  const RowPlan plan = row_plan(s.cols, fwd_rows_per_group(s.rows));
  const size_t shared = 2 * kReduceSlots * sizeof(float);
  dispatch_norm(s, [&](auto x, auto t) {
    using X = decltype(x);
    using T = decltype(t);
    if (s.cols > kMaxRowCols) {
      launch("norm_fwd_loop", norm_fwd_loop_kernel<X, T>, dim3(s.rows), kLoopThreads, shared, place,
             fwd_params(a, plan));
      return;
    }
    const FwdParams params = fwd_params(a, plan);
    const dim3 grid(ceil_div(s.rows, plan.threads / plan.lanes * plan.rows_per_group));
    dispatch_exact<X, T>(plan, params.s.vector, [&](auto exact) {
      launch("norm_fwd", norm_fwd_kernel<X, T, exact.value>, grid, plan.threads, shared, place,
             params);
    });
  });
}

}  // namespace llmkern
