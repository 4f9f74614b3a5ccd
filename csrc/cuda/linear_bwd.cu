// The pass over dy in front of the two backward products of a linear layer (LinearBwdArgs in
// llmkern/gemm.h): the derivative of dropout, gate and activation, and the bias gradients.
//
// A thread owns 16 bytes of the columns and walks down the rows of its part, so its bias sums stay
// in registers; threads of a block that do not fit beside each other take parts of their own.
#include "activation.cuh"
#include "columns.cuh"
#include "kernels.h"
#include "launch.cuh"
#include "philox.cuh"

namespace llmkern {
namespace {

constexpr int kThreads = 128;
constexpr int kMaxParts = 256;

struct LinearBwdParams {
  int64_t rows;
  int cols;
  bool vector;
  Activation activation;
  const void* dy;
  int64_t dy_stride;
  const void* preact[2];
  Dropout dropout;
  void* g[2];
  float* partial;  // null, or [parts][2][cols]
  bool sums[2];    // which of the two are wanted
  int lanes;       // threads beside each other; the others are further parts
  int64_t part_rows;
};

template <class T, int N>
__device__ inline void gradient(const LinearBwdParams& p, int64_t row, int col, float (&g)[N],
                                float (&gu)[N]) {
  load_pack(static_cast<const T*>(p.dy) + row * p.dy_stride, col, p.cols, p.vector, g);
  if (p.dropout.threshold != 0) drop_pack(p.dropout, row * p.cols + col, g);
  if (p.activation == Activation::kNone) return;
  float z[N], u[N];
  load_pack(static_cast<const T*>(p.preact[0]) + row * p.cols, col, p.cols, p.vector, z);
  if (p.preact[1] != nullptr) {
    load_pack(static_cast<const T*>(p.preact[1]) + row * p.cols, col, p.cols, p.vector, u);
    float a[N];
#pragma unroll
    for (int i = 0; i < N; ++i) a[i] = z[i];
    activate(p.activation, a);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      gu[i] = g[i] * a[i];
      g[i] *= u[i];
    }
  }
  derive(p.activation, z);
#pragma unroll
  for (int i = 0; i < N; ++i) g[i] *= z[i];
}

template <class T>
__global__ void __launch_bounds__(kThreads) linear_bwd_kernel(const LinearBwdParams p) {
  constexpr int N = kPackOf<T>;
  const int lane = threadIdx.x % p.lanes, groups = kThreads / p.lanes;
  const int64_t part = static_cast<int64_t>(blockIdx.x) * groups + threadIdx.x / p.lanes;
  const int first_col = blockIdx.y * p.lanes * N, col = first_col + lane * N;
  float sum[2][N] = {};
  const int64_t first = part * p.part_rows;
  const int64_t end = col < p.cols ? min(first + p.part_rows, p.rows) : first;
  for (int64_t row = first; row < end; ++row) {
    float g[N], gu[N] = {};
    gradient<T>(p, row, col, g, gu);
    if (p.g[0] != nullptr) {
      store_pack(static_cast<T*>(p.g[0]) + row * p.cols, col, p.cols, p.vector, g);
    }
    if (p.g[1] != nullptr) {
      store_pack(static_cast<T*>(p.g[1]) + row * p.cols, col, p.cols, p.vector, gu);
    }
#pragma unroll
    for (int i = 0; i < N; ++i) {
      sum[0][i] += g[i];
      sum[1][i] += gu[i];
    }
  }
  if (p.partial == nullptr) return;
  float* partial = p.partial + part * 2 * p.cols;
  for (int which = 0; which < 2; ++which) {
    if (!p.sums[which]) continue;
    store_columns<kThreads>(partial + which * p.cols, first_col, p.cols, p.lanes, sum[which]);
  }
}

struct Plan {
  int lanes;
  int64_t blocks, parts, part_rows;
};

// 8 rows or more a part, so that partial sums stay a small part of the bytes moved.
Plan plan_of(DType dtype, int64_t rows, int64_t cols) {
  const int64_t packs = ceil_div(cols, pack_of(dtype));
  Plan plan{1, 0, 0, 0};
  while (plan.lanes < packs && plan.lanes < kThreads) plan.lanes *= 2;
  const int64_t groups = kThreads / plan.lanes;
  const int64_t most = ceil_div(rows, 8) < kMaxParts ? ceil_div(rows, 8) : kMaxParts;
  plan.blocks = ceil_div(most, groups);
  plan.parts = plan.blocks * groups;
  plan.part_rows = ceil_div(rows, plan.parts);
  return plan;
}

}  // namespace

int64_t linear_bwd_scratch(DType dtype, int64_t rows, int64_t cols) {
  return rows * cols == 0 ? 0 : 2 * cols * plan_of(dtype, rows, cols).parts;
}

void linear_bwd(const LinearBwdArgs& a, const Place& place) {
  if (a.cols == 0) return;
  const Plan plan = a.rows == 0 ? Plan{} : plan_of(a.dtype, a.rows, a.cols);
  const bool sums[2] = {a.dbias[0] != nullptr, a.dbias[1] != nullptr};
  if (a.rows > 0) {
    const auto aligned = [&](const void* p, int64_t stride) {
      return is_vector(p, stride, a.dtype);
    };
    const bool vector = a.cols % pack_of(a.dtype) == 0 && aligned(a.dy, a.dy_stride) &&
                        aligned(a.preact[0], a.cols) && aligned(a.preact[1], a.cols) &&
                        aligned(a.g[0], a.cols) && aligned(a.g[1], a.cols);
    const LinearBwdParams p{a.rows,
                            static_cast<int>(a.cols),
                            vector,
                            a.activation,
                            a.dy,
                            a.dy_stride,
                            {a.preact[0], a.preact[1]},
                            dropout_of(a.drop_threshold, a.seed),
                            {a.g[0], a.g[1]},
                            sums[0] || sums[1] ? static_cast<float*>(a.scratch) : nullptr,
                            {sums[0], sums[1]},
                            plan.lanes,
                            plan.part_rows};
    const dim3 grid(plan.blocks, ceil_div(a.cols, plan.lanes * pack_of(a.dtype)));
    dispatch_dtype(a.dtype, [&](auto t) {
      launch("linear_bwd", linear_bwd_kernel<decltype(t)>, grid, kThreads, columns_bytes(kThreads),
             place, p);
    });
  }
  for (int kind = 0; kind < 2; ++kind) {
    if (a.dbias[kind] == nullptr) continue;
    column_sums({static_cast<const float*>(a.scratch) + kind * a.cols, 2 * a.cols,
                 static_cast<int>(plan.parts), static_cast<int>(a.cols), a.dtype, a.dbias[kind]},
                place);
  }
}

}  // namespace llmkern
