// LayerNorm and RMSNorm forward; formulas: llmkern/norm.h, layout: norm.cuh.
//
// norm_fwd: the row stays in registers, so the variance is that of the centred values at no further
// read. Bytes moved: x, residual, z, y once; weight and bias once a group, exact kernels: once a
// block.
#include <cfloat>

#include "kernels.h"
#include "launch.cuh"
#include "norm_exact.cuh"

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
  bool plain;  // z is x, and not wanted
};

// z of a pack of columns of a row, rounded as it is stored.
template <class X, class T, int N>
__device__ inline void load_z(const FwdParams& p, int64_t row, int col, float (&z)[N]) {
  const NormScalars& s = p.s;
  load_pack(static_cast<const X*>(p.x) + row * p.x_stride, col, s.cols, s.vector, z);
  if (s.dropout.threshold != 0) drop_pack(s.dropout, row * s.cols + col, z);
  if (p.residual != nullptr) {
    float r[N];
    load_pack(static_cast<const T*>(p.residual) + row * p.residual_stride, col, s.cols, s.vector,
              r);
#pragma unroll
    for (int i = 0; i < N; ++i) z[i] += r[i];
    round_to(z, T{});
  }
}

// z becomes z - mean; gives the sum of its squares. Columns that do not exist become 0.
template <int N>
__device__ inline float centre(float (&z)[N], float mean, int col, const NormScalars& s) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < N; ++i) z[i] -= mean;
  clear_missing(z, col, s);
#pragma unroll
  for (int i = 0; i < N; ++i) sum += z[i] * z[i];
  return sum;
}

template <class T, int N>
__device__ inline void store_y(const FwdParams& p, int64_t row, int col, bool vector,
                               const float (&centred)[N], float rstd, const float (&w)[N],
                               const float (&b)[N]) {
  float y[N];
#pragma unroll
  for (int i = 0; i < N; ++i) y[i] = centred[i] * rstd * w[i] + b[i];
  store_pack(static_cast<T*>(p.y) + row * p.s.cols, col, p.s.cols, vector, y);
}

__device__ inline void store_statistics(const FwdParams& p, int64_t row, float mean, float rstd) {
  if (p.mean != nullptr) p.mean[row] = mean;
  if (p.rstd != nullptr) p.rstd[row] = rstd;
}

template <int N>
__device__ inline void load_affine(const FwdParams& p, int col, float (&w)[N], float (&b)[N]) {
  load_scale(p.s, p.weight, col, w);
#pragma unroll
  for (int i = 0; i < N; ++i) b[i] = 0.0f;
  if (p.bias != nullptr) load_pack_as(p.s.weight_dtype, p.bias, col, p.s.cols, p.s.vector, b);
}

// Whether the rounding of the mean may show in a row whose centred elements have these squares, or
// its sum overflowed. Such a row is centred again by offset_mean; so is one of zeros, which has no
// need of it, unless the caller looks. No row is, for rms.
__device__ inline bool may_be_lost(const NormScalars& s, float mean, float square) {
  return !(square > fmaf(mean * s.lost, mean, s.lost_from));
}

// The differences from `from` of a pack of columns, summed and scaled.
template <int N>
__device__ inline float offset_sum(const float (&z)[N], float from, int col, const NormScalars& s) {
  float d[N];
#pragma unroll
  for (int i = 0; i < N; ++i) d[i] = fmaf(z[i], kOffsetScale, -from * kOffsetScale);
  clear_missing(d, col, s);
  return sum_of(d);
}

__device__ inline float offset_mean(float first, float sum, const NormScalars& s) {
  return fmaf(sum, s.inv_cols * (1.0f / kOffsetScale), first);
}

// The mean of a row that is read for it. A thread's differences are from its own first element, so
// that one read is enough. active: others still take part in the sums.
template <class X, class T>
__device__ inline float row_mean(const FwdParams& p, int64_t row, int lane, bool active,
                                 GroupSum& total) {
  constexpr int N = kPackOf<X, T>;
  const NormScalars& s = p.s;
  const int end = active ? s.cols : 0;
  float own = 0.0f, sum = 0.0f, count = 0.0f;
  for (int col = lane * N; col < end; col += total.lanes * N) {
    float z[N];
    load_z<X, T>(p, row, col, z);
    if (col == lane * N) own = z[0];
    sum += offset_sum(z, own, col, s);
    count += static_cast<float>(min(N, s.cols - col));
  }
  const float first = total(lane == 0 ? own : 0.0f);
  sum = fmaf(count, own * kOffsetScale - first * kOffsetScale, sum);
  return offset_mean(first, total(sum), s);
}

// A lane's packs of z of one row, kept where it is wanted; gives their sum (0 for rms). here(c):
// whether the lane has pack c of this row.
template <class X, class T, int kPacks, int N, class Here>
__device__ inline float load_row(const FwdParams& p, int64_t row, int lane, Here&& here,
                                 float (&z)[kPacks][N]) {
  const NormScalars& s = p.s;
  const auto each = [&](auto&& f) {
#pragma unroll
    for (int c = 0; c < kPacks; ++c) {
      if (here(c)) f((c * p.lanes + lane) * N, z[c]);
    }
  };
  each([&](int col, float(&v)[N]) { load_z<X, T>(p, row, col, v); });
  if (p.z != nullptr) {
    T* kept = static_cast<T*>(p.z) + row * s.cols;
    each([&](int col, float(&v)[N]) { store_pack(kept, col, s.cols, s.vector, v); });
  }
  float sum = 0.0f;
  if (!s.rms) each([&](int, float(&v)[N]) { sum += sum_of(v); });
  return sum;
}

template <class X, class T>
__global__ void __launch_bounds__(kMaxRowThreads) norm_fwd_kernel(const FwdParams p) {
  constexpr int N = kPackOf<X, T>, kPacks = kRowElements / N;
  const NormScalars& s = p.s;
  const RowPlace place = row_place(p.lanes);
  const int lane = place.lane;
  GroupSum total(shared_bytes, p.lanes);
  float w[kPacks][N], b[kPacks][N];
#pragma unroll
  for (int c = 0; c < kPacks; ++c) {
    const int col = (c * p.lanes + lane) * N;
    if (col < s.cols) load_affine(p, col, w[c], b[c]);
  }
  for (int r = 0; r < p.rows_per_group; ++r) {
    const int64_t row = place.group * p.rows_per_group + r;
    const bool active = row < s.rows;  // others still take part in the sums
    const auto here = [&](int c) { return active && (c * p.lanes + lane) * N < s.cols; };
    float z[kPacks][N];
    const float sum = load_row<X, T>(p, row, lane, here, z);
    // Finite, so that row_mean can still move what it centred.
    float mean = s.rms ? 0.0f : fmaxf(fminf(total(sum) * s.inv_cols, FLT_MAX), -FLT_MAX);
    float square = 0.0f;
#pragma unroll
    for (int c = 0; c < kPacks; ++c) {
      if (here(c)) square += centre(z[c], mean, (c * p.lanes + lane) * N, s);
    }
    square = total(square);
    const bool lost = may_be_lost(s, mean, square) && mean != 0.0f;
    if (__any_sync(kAllLanes, lost)) {
      const float better = row_mean<X, T>(p, row, lane, active, total);
      const float shift = lost ? better - mean : 0.0f;
      float again = 0.0f;
#pragma unroll
      for (int c = 0; c < kPacks; ++c) {
        if (here(c)) again += centre(z[c], shift, (c * p.lanes + lane) * N, s);
      }
      again = total(again);
      if (lost) mean = better, square = again;
    }
    const float rstd = rsqrtf(square * s.inv_cols + s.eps);
    if (active && lane == 0) store_statistics(p, row, mean, rstd);
#pragma unroll
    for (int c = 0; c < kPacks; ++c) {
      if (here(c)) store_y<T>(p, row, (c * p.lanes + lane) * N, s.vector, z[c], rstd, w[c], b[c]);
    }
  }
}

// z of a row whose x it holds: dropout, residual, and z where it is wanted.
template <class T, int kPacks, int N>
__device__ inline void finish_z(const FwdParams& p, int64_t row, int first, float (&z)[kPacks][N]) {
  const int64_t at = row * p.s.cols + first;
  drop_packs(p.s.dropout, at, z);
  if (p.residual == nullptr) {
    store_packs<T>(p.z, at, z);
    return;
  }
  add_packs<T>(p.residual, row * p.residual_stride + first, z);
  ExactPacks<T, kPacks> rounded;
  rounded.pack(z);
  rounded.unpack(z);
  if (p.z != nullptr) {
    rounded.store_global(ptx::global_address(static_cast<T*>(p.z) + at));
  }
}

// z becomes z - mean, which it gives; 0 for rms.
template <int kPacks, int N>
__device__ inline float centre_row(float (&z)[kPacks][N], const NormScalars& s, GroupSum& total) {
  if (s.rms) return 0.0f;
  float sum = sum_of(z[0]);
#pragma unroll
  for (int c = 1; c < kPacks; ++c) sum += sum_of(z[c]);
  const float mean = total.of_warps(sum) * s.inv_cols;
  for_each(z, [&](float& v, int, int) { v -= mean; });
  return mean;
}

// The same by offset_mean.
template <int kPacks, int N>
__device__ inline float centre_row_again(float (&z)[kPacks][N], const NormScalars& s,
                                         GroupSum& total, int lane) {
  const float first = total.of_warps(lane == 0 ? z[0][0] : 0.0f);
  float sum = 0.0f;
#pragma unroll
  for (int c = 0; c < kPacks; ++c) sum += offset_sum(z[c], first, 0, s);
  const float mean = offset_mean(first, total.of_warps(sum), s);
  for_each(z, [&](float& v, int, int) { v -= mean; });
  return mean;
}

template <int kPacks, int N>
__device__ inline float squares_of(const float (&z)[kPacks][N]) {
  float sum = dot_of(z[0], z[0]);
#pragma unroll
  for (int c = 1; c < kPacks; ++c) sum += dot_of(z[c], z[c]);
  return sum;
}

// The next row is on its way while one is computed.
template <class T, int kPacks>
__global__ void __launch_bounds__(kMaxRowThreads) norm_fwd_exact_kernel(const FwdParams p) {
  constexpr int N = kPackOf<T>;
  const NormScalars& s = p.s;
  const RowPlace place = row_place(p.lanes);
  const int first = exact_column<kPacks, N>(place.lane);
  GroupSum total(shared_bytes, p.lanes);
  float affine[2][kPacks][N];
  load_vectors<T>(s, {p.weight, p.bias}, p.lanes, first, affine);
  int64_t row = place.group * p.rows_per_group;
  const int64_t end = min(row + p.rows_per_group, s.rows);
  if (row >= end) return;
  constexpr int64_t kSize = sizeof(T);
  const int64_t x_step = p.x_stride * kSize, y_step = s.cols * kSize;
  uint64_t x = ptx::global_address(p.x) + row * x_step + first * kSize;
  uint64_t y = ptx::global_address(p.y) + row * y_step + first * kSize;
  ExactPacks<T, kPacks> raw;
  raw.load_global(x);
  while (true) {
    float z[kPacks][N];
    raw.unpack(z);
    const bool last = row + 1 == end;
    if (!last) raw.load_global(x += x_step);
    if (!p.plain) finish_z<T>(p, row, first, z);
    float mean = centre_row(z, s, total);
    float square = total.of_warps(squares_of(z));
    if (may_be_lost(s, mean, square) && __any_sync(kAllLanes, mean != 0.0f)) {
      ExactPacks<T, kPacks> again;
      again.load_global(last ? x : x - x_step);
      again.unpack(z);
      if (!p.plain) finish_z<T>(p, row, first, z);
      mean = centre_row_again(z, s, total, place.lane);
      square = total.of_warps(squares_of(z));
    }
    const float rstd = rsqrtf(square * s.inv_cols + s.eps);
    if (place.lane == 0) store_statistics(p, row, mean, rstd);
    for_each(z, [&](float& v, int c, int i) { v = v * rstd * affine[0][c][i] + affine[1][c][i]; });
    ExactPacks<T, kPacks> packed;
    packed.pack(z);
    packed.store_global(y);
    if (last) return;
    ++row;
    y += y_step;
  }
}

// One block a row; z is computed again for each of the three passes.
template <class X, class T>
__global__ void __launch_bounds__(kLoopThreads) norm_fwd_loop_kernel(const FwdParams p) {
  constexpr int N = kPackOf<X, T>;
  const NormScalars& s = p.s;
  const int64_t row = blockIdx.x;
  const int first = threadIdx.x * N, step = kLoopThreads * N;
  GroupSum total(shared_bytes, kLoopThreads);
  float mean = s.rms ? 0.0f : row_mean<X, T>(p, row, threadIdx.x, true, total);
  float z[N], square = 0.0f, rest = 0.0f;
  for (int col = first; col < s.cols; col += step) {
    load_z<X, T>(p, row, col, z);
    square += centre(z, mean, col, s);
#pragma unroll
    for (int i = 0; i < N; ++i) rest += z[i];
  }
  // Where the first element stands far from the others, the mean has the rounding of its distance.
  const float shift = total(rest) * s.inv_cols;
  if (!s.rms && isfinite(shift)) mean += shift;
  const float rstd = rsqrtf(total(square) * s.inv_cols + s.eps);
  if (threadIdx.x == 0) store_statistics(p, row, mean, rstd);
  for (int col = first; col < s.cols; col += step) {
    float w[N], b[N];
    load_z<X, T>(p, row, col, z);
    if (p.z != nullptr) store_pack(static_cast<T*>(p.z) + row * s.cols, col, s.cols, s.vector, z);
    load_affine(p, col, w, b);
    centre(z, mean, col, s);
    store_y<T>(p, row, col, s.vector, z, rstd, w, b);
  }
}

// Weights are read once a group: more rows a group save bytes, once there are warps for a large
// card (4 on each of 128 multiprocessors).
int fwd_rows_per_group(int64_t rows, int64_t warps_a_row) {
  constexpr int64_t kEnough = 512;
  int rows_per_group = 1;
  while (rows_per_group < 16 && rows * warps_a_row >= 2 * rows_per_group * kEnough) {
    rows_per_group *= 2;
  }
  return rows_per_group;
}

FwdParams fwd_params(const NormFwdArgs& a, int pack, const RowPlan& plan) {
  const NormShape& s = a.shape;
  const bool vector =
      is_vector(a.x, a.x_stride, s.x_dtype) && is_vector(a.residual, a.residual_stride, s.dtype) &&
      is_vector(a.weight, 0, s.weight_dtype) && is_vector(a.bias, 0, s.weight_dtype) &&
      is_vector(a.z, s.cols, s.dtype) && is_vector(a.y, s.cols, s.dtype);
  return {norm_scalars(s, pack, vector),
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
          plan.rows_per_group,
          a.residual == nullptr && a.z == nullptr && s.drop_threshold == 0};
}

}  // namespace

void norm_fwd(const NormFwdArgs& a, const Place& place) {
  const NormShape& s = a.shape;
  if (s.rows == 0 || s.cols == 0) return;
  dispatch_norm(s, [&](auto x, auto t) {
    using X = decltype(x);
    using T = decltype(t);
    constexpr int N = kPackOf<X, T>;
    RowPlan plan = row_plan(s.cols, N, 1);
    plan.rows_per_group = fwd_rows_per_group(s.rows, ceil_div(plan.lanes, kWarp));
    const FwdParams params = fwd_params(a, N, plan);
    if (s.cols > kMaxRowCols) {
      launch("norm_fwd_loop", norm_fwd_loop_kernel<X, T>, dim3(s.rows), kLoopThreads, kReduceBytes,
             place, params);
      return;
    }
    const dim3 grid(ceil_div(s.rows, plan.threads / plan.lanes * plan.rows_per_group));
    const size_t staged = staged_bytes(s, plan.lanes, 2);
    const bool exact = dispatch_exact<X, T>(s, plan, params.s.vector, [&](auto packs) {
      launch("norm_fwd", norm_fwd_exact_kernel<T, packs.value>, grid, plan.threads,
             kReduceBytes + staged, place, params);
    });
    if (exact) return;
    launch("norm_fwd", norm_fwd_kernel<X, T>, grid, plan.threads, kReduceBytes, place, params);
  });
}

}  // namespace llmkern
