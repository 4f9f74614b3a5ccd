// LayerNorm and RMSNorm backward; formulas: llmkern/norm.h, layout: norm.cuh. With
// xhat = (z - mean) rstd and g = dy w:
//
//   dz = rstd (g - xhat mean(g xhat) - mean(g)) (+ dz that reached z itself);  dx = drop(dz)
//   dweight = sum over rows of dy xhat;  dbias = sum over rows of dy
//
// (rms: without mean(g)). The weight gradients of a group's rows stay in registers, warps of a
// block are added in shared memory one after another, blocks by column_sums: no atomics, so the
// result does not depend on scheduling.
#include "columns.cuh"
#include "kernels.h"
#include "launch.cuh"
#include "norm_exact.cuh"

namespace llmkern {
namespace {

struct BwdParams {
  NormScalars s;
  const void* z;
  int64_t z_stride;
  const void* weight;
  const float *mean, *rstd;
  const void* dy;
  int64_t dy_stride;
  const void* dz;
  void *dx, *dresidual;
  float* partial;  // null, or [blocks][2][cols]: sums of dy xhat, of dy
  bool sums[2];    // which of the two are wanted
  int lanes, rows_per_group;
};

template <class T, int N>
__device__ inline void load_xhat_dy(const BwdParams& p, int64_t row, int col, float mean,
                                    float rstd, float (&xhat)[N], float (&dy)[N]) {
  const NormScalars& s = p.s;
  load_pack(static_cast<const T*>(p.z) + row * p.z_stride, col, s.cols, s.vector, xhat);
  load_pack(static_cast<const T*>(p.dy) + row * p.dy_stride, col, s.cols, s.vector, dy);
#pragma unroll
  for (int i = 0; i < N; ++i) xhat[i] = (xhat[i] - mean) * rstd;
  clear_missing(xhat, col, s);
}

struct Means {
  float gx, g;  // of g xhat, of g (0 for rms)
};

// g = dy w.
template <class X, class T, int N>
__device__ inline void store_gradient(const BwdParams& p, int64_t row, int col, bool vector,
                                      float rstd, Means mean, const float (&xhat)[N],
                                      const float (&g)[N]) {
  const NormScalars& s = p.s;
  const float slope = -mean.gx * rstd;
  float d[N];
#pragma unroll
  for (int i = 0; i < N; ++i) d[i] = fmaf(xhat[i], slope, (g[i] - mean.g) * rstd);
  if (p.dz != nullptr) {
    float dz[N];
    load_pack(static_cast<const T*>(p.dz) + row * s.cols, col, s.cols, vector, dz);
#pragma unroll
    for (int i = 0; i < N; ++i) d[i] += dz[i];
  }
  if (p.dresidual != nullptr) {
    store_pack(static_cast<T*>(p.dresidual) + row * s.cols, col, s.cols, vector, d);
  }
  if (s.dropout.threshold != 0) drop_pack(s.dropout, row * s.cols + col, d);
  store_pack(static_cast<X*>(p.dx) + row * s.cols, col, s.cols, vector, d);
}

// Adds v of the block's groups, which hold the same columns, and stores the sums: first within a
// warp, then from warp to warp through shared memory, from which all threads write the row 16
// bytes each. Quad h of slot l is float4 h * (width + 4) + l: a warp's writes are contiguous, and
// its reads, in the order of the row, take the halves of packs of eight from banks 64 bytes apart.
// kExact: columns are those of exact kernels.
template <bool kExact, int kPacks, int N>
__device__ inline void store_sums(int lanes, int cols, float* row, float (&v)[kPacks][N]) {
  if (lanes < kWarp) {
#pragma unroll
    for (int c = 0; c < kPacks; ++c) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        for (int step = lanes; step < kWarp; step *= 2) {
          v[c][i] += __shfl_xor_sync(kAllLanes, v[c][i], step);
        }
      }
    }
  }
  constexpr int kQuads = N / 4;
  const int width = max(lanes, kWarp);  // threads that hold distinct sums
  const int turns = lanes > kWarp ? 1 : kRowThreads / kWarp;
  const int own = lanes > kWarp ? 0 : threadIdx.x / kWarp;
  const int slot = lanes > kWarp ? threadIdx.x : threadIdx.x % kWarp;
  auto carry = reinterpret_cast<float4*>(shared_bytes);
  for (int turn = 0; turn < turns; ++turn) {
    __syncthreads();
    if (turn != own) continue;
#pragma unroll
    for (int h = 0; h < kPacks * kQuads; ++h) {
      float* mine = v[h / kQuads] + 4 * (h % kQuads);
      float4& place = carry[h * (width + 4) + slot];
      if (turn > 0) {
        const float4 sum = place;
        mine[0] += sum.x, mine[1] += sum.y, mine[2] += sum.z, mine[3] += sum.w;
      }
      place = make_float4(mine[0], mine[1], mine[2], mine[3]);
    }
  }
  __syncthreads();
  const bool vector = cols % 4 == 0;
  for (int q = threadIdx.x; q * 4 < cols; q += blockDim.x) {
    const int pack = q / kQuads, warps = pack / kWarp;
    const int c = kExact ? warps % kPacks : pack / lanes;
    const int holder = kExact ? warps / kPacks * kWarp + pack % kWarp : pack % lanes;
    const float4 sum = carry[(c * kQuads + q % kQuads) * (width + 4) + holder];
    store_quad(row, q * 4, cols, vector, sum);
  }
}

template <class X, class T>
__global__ void __launch_bounds__(kMaxRowThreads) norm_bwd_kernel(const BwdParams p) {
  constexpr int N = kPackOf<X, T>, kPacks = kRowElements / N;
  const NormScalars& s = p.s;
  const RowPlace place = row_place(p.lanes);
  const int lane = place.lane;
  GroupSum total(shared_bytes, p.lanes);
  float w[kPacks][N], dw[kPacks][N] = {}, db[kPacks][N] = {};
#pragma unroll
  for (int c = 0; c < kPacks; ++c) {
    const int col = (c * p.lanes + lane) * N;
    if (col < s.cols) load_scale(s, p.weight, col, w[c]);
  }
  for (int r = 0; r < p.rows_per_group; ++r) {
    const int64_t row = place.group * p.rows_per_group + r;
    const bool active = row < s.rows;  // others still take part in the sums
    const auto here = [&](int c) { return active && (c * p.lanes + lane) * N < s.cols; };
    const float mean = active && !s.rms ? p.mean[row] : 0.0f;
    const float rstd = active ? p.rstd[row] : 0.0f;
    float xhat[kPacks][N], g[kPacks][N];
    float sum_gx = 0.0f, sum_g = 0.0f;
#pragma unroll
    for (int c = 0; c < kPacks; ++c) {
      if (!here(c)) continue;
      load_xhat_dy<T>(p, row, (c * p.lanes + lane) * N, mean, rstd, xhat[c], g[c]);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        dw[c][i] += g[c][i] * xhat[c][i];
        db[c][i] += g[c][i];
        g[c][i] *= w[c][i];
        sum_gx += g[c][i] * xhat[c][i];
        sum_g += g[c][i];
      }
    }
    if (p.dx == nullptr) continue;
    const Means means{total(sum_gx) * s.inv_cols, s.rms ? 0.0f : total(sum_g) * s.inv_cols};
#pragma unroll
    for (int c = 0; c < kPacks; ++c) {
      if (!here(c)) continue;
      store_gradient<X, T>(p, row, (c * p.lanes + lane) * N, s.vector, rstd, means, xhat[c], g[c]);
    }
  }
  float* partial = p.partial + static_cast<int64_t>(blockIdx.x) * 2 * s.cols;
  if (p.sums[0]) store_sums<false>(p.lanes, s.cols, partial, dw);
  if (p.sums[1]) store_sums<false>(p.lanes, s.cols, partial + s.cols, db);
}

// Rows z and dy become xhat and g = dy w, and are added to the weights' sums that are wanted. Gives
// the means of g xhat and of g.
template <int kPacks, int N>
__device__ inline Means sum_row(const BwdParams& p, GroupSum& total, float mean, float rstd,
                                const float (&w)[kPacks][N], float (&xhat)[kPacks][N],
                                float (&g)[kPacks][N], float (&dw)[kPacks][N],
                                float (&db)[kPacks][N]) {
  const NormScalars& s = p.s;
  if (!s.rms) for_each(xhat, [&](float& v, int, int) { v -= mean; });
  for_each(xhat, [&](float& v, int, int) { v *= rstd; });
  if (p.sums[0]) for_each(dw, [&](float& v, int c, int i) { v += g[c][i] * xhat[c][i]; });
  if (p.sums[1]) for_each(db, [&](float& v, int c, int i) { v += g[c][i]; });
  if (p.dx == nullptr) return {};
  for_each(g, [&](float& v, int c, int i) { v *= w[c][i]; });
  float gx = 0.0f;
#pragma unroll
  for (int c = 0; c < kPacks; ++c) gx += dot_of(g[c], xhat[c]);
  const float mean_gx = total.of_warps(gx) * s.inv_cols;
  if (s.rms) return {mean_gx, 0.0f};
  float sum = 0.0f;
#pragma unroll
  for (int c = 0; c < kPacks; ++c) sum += sum_of(g[c]);
  return {mean_gx, total.of_warps(sum) * s.inv_cols};
}

// The next row is on its way while one is computed, where that is of 16 bits: there are no
// registers for floats.
template <class T, int kPacks>
__global__ void __launch_bounds__(kMaxRowThreads) norm_bwd_exact_kernel(const BwdParams p) {
  constexpr int N = kPackOf<T>;
  constexpr bool kAhead = sizeof(T) == 2;
  constexpr int64_t kSize = sizeof(T);
  const NormScalars& s = p.s;
  const RowPlace place = row_place(p.lanes);
  const int first = exact_column<kPacks, N>(place.lane);
  GroupSum total(shared_bytes, p.lanes);
  float w[1][kPacks][N], dw[kPacks][N] = {}, db[kPacks][N] = {};
  load_vectors<T>(s, {p.weight}, p.lanes, first, w);
  int64_t row = place.group * p.rows_per_group;
  const int64_t end = min(row + p.rows_per_group, s.rows);
  uint64_t z_from = ptx::global_address(p.z) + (row * p.z_stride + first) * kSize;
  uint64_t dy_from = ptx::global_address(p.dy) + (row * p.dy_stride + first) * kSize;
  ExactPacks<T, kPacks> z, dy;
  float next_mean = 0.0f, next_rstd = 0.0f;
  const auto load = [&](int64_t of) {
    z.load_global(z_from);
    dy.load_global(dy_from);
    if (!s.rms) next_mean = p.mean[of];
    next_rstd = p.rstd[of];
    z_from += p.z_stride * kSize;
    dy_from += p.dy_stride * kSize;
  };
  if (kAhead && row < end) load(row);
  for (; row < end; ++row) {
    if (!kAhead) load(row);
    float xhat[kPacks][N], g[kPacks][N];
    z.unpack(xhat);
    dy.unpack(g);
    const float mean = next_mean, rstd = next_rstd;
    if (kAhead && row + 1 < end) load(row + 1);
    const Means means = sum_row(p, total, mean, rstd, w[0], xhat, g, dw, db);
    if (p.dx == nullptr) continue;
    const float slope = -means.gx * rstd;
    if (!s.rms) for_each(g, [&](float& v, int, int) { v -= means.g; });
    for_each(g, [&](float& v, int c, int i) { v = fmaf(xhat[c][i], slope, v * rstd); });
    const int64_t at = row * s.cols + first;
    add_packs<T>(p.dz, at, g);
    store_packs<T>(p.dresidual, at, g);
    drop_packs(s.dropout, at, g);
    store_packs<T>(p.dx, at, g);
  }
  float* partial = p.partial + static_cast<int64_t>(blockIdx.x) * 2 * s.cols;
  if (p.sums[0]) store_sums<true>(p.lanes, s.cols, partial, dw);
  if (p.sums[1]) store_sums<true>(p.lanes, s.cols, partial + s.cols, db);
}

// One block a row, two passes over it; for the input gradient alone.
template <class X, class T>
__global__ void __launch_bounds__(kLoopThreads) norm_bwd_loop_kernel(const BwdParams p) {
  constexpr int N = kPackOf<X, T>;
  const NormScalars& s = p.s;
  const int64_t row = blockIdx.x;
  const int first = threadIdx.x * N, step = kLoopThreads * N;
  GroupSum total(shared_bytes, kLoopThreads);
  const float mean = s.rms ? 0.0f : p.mean[row], rstd = p.rstd[row];
  float xhat[N], dy[N], w[N];
  float gx = 0.0f, g = 0.0f;
  for (int col = first; col < s.cols; col += step) {
    load_xhat_dy<T>(p, row, col, mean, rstd, xhat, dy);
    load_scale(s, p.weight, col, w);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float gi = dy[i] * w[i];
      gx += gi * xhat[i];
      g += gi;
    }
  }
  const Means means{total(gx) * s.inv_cols, s.rms ? 0.0f : total(g) * s.inv_cols};
  for (int col = first; col < s.cols; col += step) {
    load_xhat_dy<T>(p, row, col, mean, rstd, xhat, dy);
    load_scale(s, p.weight, col, w);
#pragma unroll
    for (int i = 0; i < N; ++i) dy[i] *= w[i];
    store_gradient<X, T>(p, row, col, s.vector, rstd, means, xhat, dy);
  }
}

// Weight gradients of long rows: a thread sums a pack of columns over the block's rows.
template <class T>
__global__ void __launch_bounds__(kLoopThreads) norm_bwd_columns_kernel(const BwdParams p) {
  constexpr int N = kPackOf<T>;
  const NormScalars& s = p.s;
  const int first = blockIdx.y * kLoopThreads * N, col = first + threadIdx.x * N;
  float dw[N] = {}, db[N] = {};
  for (int r = 0; r < p.rows_per_group; ++r) {
    const int64_t row = static_cast<int64_t>(blockIdx.x) * p.rows_per_group + r;
    if (row >= s.rows || col >= s.cols) break;
    float xhat[N], dy[N];
    load_xhat_dy<T>(p, row, col, s.rms ? 0.0f : p.mean[row], p.rstd[row], xhat, dy);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      dw[i] += dy[i] * xhat[i];
      db[i] += dy[i];
    }
  }
  float* partial = p.partial + static_cast<int64_t>(blockIdx.x) * 2 * s.cols;
  if (p.sums[0]) store_columns<kLoopThreads>(partial, first, s.cols, kLoopThreads, dw);
  if (p.sums[1]) store_columns<kLoopThreads>(partial + s.cols, first, s.cols, kLoopThreads, db);
}

// Blocks that the weight gradient is summed in: as many as fill a large card; no more than 1 / 36
// of the rows, so that partial sums stay a small part of the bytes moved.
constexpr int kMaxParts = 256;

int64_t bwd_parts(int64_t rows) {
  const int64_t parts = ceil_div(rows, 36);
  return parts < kMaxParts ? parts : kMaxParts;
}

struct BwdPlan {
  int pack;
  RowPlan row;
  int64_t blocks;  // bwd_parts at most
};

BwdPlan bwd_plan(const NormShape& s) {
  if (s.rows == 0) return {};
  const int pack = static_cast<int>(min(pack_of(s.x_dtype), pack_of(s.dtype)));
  RowPlan row = row_plan(s.cols, pack, 1);
  const int64_t groups = s.cols > kMaxRowCols ? 1 : row.threads / row.lanes;
  row.rows_per_group = static_cast<int>(ceil_div(s.rows, bwd_parts(s.rows) * groups));
  return {pack, row, ceil_div(s.rows, groups * row.rows_per_group)};
}

BwdParams bwd_params(const NormBwdArgs& a, const BwdPlan& plan) {
  const NormShape& s = a.shape;
  const bool vector = is_vector(a.z, a.z_stride, s.dtype) &&
                      is_vector(a.dy, a.dy_stride, s.dtype) &&
                      is_vector(a.weight, 0, s.weight_dtype) && is_vector(a.dz, s.cols, s.dtype) &&
                      is_vector(a.dx, s.cols, s.x_dtype) && is_vector(a.dresidual, s.cols, s.dtype);
  const bool sums[2] = {a.dweight != nullptr, a.dbias != nullptr};
  return {norm_scalars(s, plan.pack, vector),
          a.z,
          a.z_stride,
          a.weight,
          static_cast<const float*>(a.mean),
          static_cast<const float*>(a.rstd),
          a.dy,
          a.dy_stride,
          a.dz,
          a.dx,
          a.dresidual,
          sums[0] || sums[1] ? static_cast<float*>(a.scratch) : nullptr,
          {sums[0], sums[1]},
          plan.row.lanes,
          plan.row.rows_per_group};
}

size_t bwd_shared_bytes(const RowPlan& row, size_t staged) {
  const size_t reduce = kReduceBytes + staged;
  const size_t width = row.lanes > kWarp ? row.lanes : kWarp;
  const size_t carry = (width + 4) * kRowElements * sizeof(float);
  return carry > reduce ? carry : reduce;
}

void long_rows(const NormBwdArgs& a, const BwdPlan& plan, const Place& place) {
  const NormShape& s = a.shape;
  const BwdParams params = bwd_params(a, plan);
  if (a.dx != nullptr) {
    dispatch_norm(s, [&](auto x, auto t) {
      launch("norm_bwd_loop", norm_bwd_loop_kernel<decltype(x), decltype(t)>, dim3(s.rows),
             kLoopThreads, kReduceBytes, place, params);
    });
  }
  if (params.partial != nullptr) {
    const dim3 grid(plan.blocks, ceil_div(s.cols, kLoopThreads * pack_of(s.dtype)));
    dispatch_dtype(s.dtype, [&](auto t) {
      launch("norm_bwd_columns", norm_bwd_columns_kernel<decltype(t)>, grid, kLoopThreads,
             columns_bytes(kLoopThreads), place, params);
    });
  }
}

}  // namespace

int64_t norm_bwd_scratch(int64_t rows, int64_t cols) {
  return rows * cols == 0 ? 0 : 2 * cols * bwd_parts(rows);
}

void norm_bwd(const NormBwdArgs& a, const Place& place) {
  const NormShape& s = a.shape;
  if (s.cols == 0) return;
  const BwdPlan plan = bwd_plan(s);
  if (s.rows > 0 && s.cols > kMaxRowCols) {
    long_rows(a, plan, place);
  } else if (s.rows > 0) {
    dispatch_norm(s, [&](auto x, auto t) {
      using X = decltype(x);
      using T = decltype(t);
      const BwdParams params = bwd_params(a, plan);
      const dim3 grid(plan.blocks);
      const int threads = plan.row.threads;
      const size_t shared = bwd_shared_bytes(plan.row, staged_bytes(s, plan.row.lanes, 1));
      const bool exact = dispatch_exact<X, T>(s, plan.row, params.s.vector, [&](auto packs) {
        launch("norm_bwd", norm_bwd_exact_kernel<T, packs.value>, grid, threads, shared, place,
               params);
      });
      if (exact) return;
      launch("norm_bwd", norm_bwd_kernel<X, T>, grid, threads, bwd_shared_bytes(plan.row, 0), place,
             params);
    });
  }
  void* outputs[2] = {a.dweight, a.dbias};
  for (int kind = 0; kind < 2; ++kind) {
    if (outputs[kind] == nullptr) continue;
    column_sums(
        {static_cast<const float*>(a.scratch) + kind * s.cols, 2 * s.cols,
         static_cast<int>(plan.blocks), static_cast<int>(s.cols), s.weight_dtype, outputs[kind]},
        place);
  }
}

}  // namespace llmkern
