// The pass over dy in front of the two backward products of a linear layer (LinearBwdArgs in
// llmkern/gemm.h): the derivative of dropout, gate and activation, and the bias gradients.
//
// A thread owns eight columns and walks down the rows of its part, so its bias sums stay in
// registers; threads of a block that do not fit beside each other take parts of their own.
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
  int lanes;       // threads beside each other; the others are further parts
  int64_t part_rows;
};

template <class T>
__device__ inline void gradient(const LinearBwdParams& p, int64_t row, int col, float (&g)[kPack],
                                float (&gu)[kPack]) {
  load_pack(static_cast<const T*>(p.dy) + row * p.dy_stride, col, p.cols, p.vector, g);
  if (p.dropout.threshold != 0) drop_pack(p.dropout, row * p.cols + col, g);
  if (p.activation == Activation::kNone) return;
  float z[kPack], u[kPack];
  load_pack(static_cast<const T*>(p.preact[0]) + row * p.cols, col, p.cols, p.vector, z);
  if (p.preact[1] != nullptr) {
    load_pack(static_cast<const T*>(p.preact[1]) + row * p.cols, col, p.cols, p.vector, u);
    float a[kPack];
#pragma unroll
    for (int i = 0; i < kPack; ++i) a[i] = z[i];
    activate(p.activation, a);
#pragma unroll
    for (int i = 0; i < kPack; ++i) {
      gu[i] = g[i] * a[i];
      g[i] *= u[i];
    }
  }
  derive(p.activation, z);
#pragma unroll
  for (int i = 0; i < kPack; ++i) g[i] *= z[i];
}

template <class T>
__global__ void __launch_bounds__(kThreads) linear_bwd_kernel(const LinearBwdParams p) {
  const int lane = threadIdx.x % p.lanes, groups = kThreads / p.lanes;
  const int64_t part = static_cast<int64_t>(blockIdx.x) * groups + threadIdx.x / p.lanes;
  const int col = (blockIdx.y * p.lanes + lane) * kPack;
  if (col >= p.cols) return;
  float sum[2][kPack] = {};
  const int64_t first = part * p.part_rows, end = min(first + p.part_rows, p.rows);
  for (int64_t row = first; row < end; ++row) {
    float g[kPack], gu[kPack] = {};
    gradient<T>(p, row, col, g, gu);
    if (p.g[0] != nullptr) {
      store_pack(static_cast<T*>(p.g[0]) + row * p.cols, col, p.cols, p.vector, g);
    }
    if (p.g[1] != nullptr) {
      store_pack(static_cast<T*>(p.g[1]) + row * p.cols, col, p.cols, p.vector, gu);
    }
#pragma unroll
    for (int i = 0; i < kPack; ++i) {
      sum[0][i] += g[i];
      sum[1][i] += gu[i];
    }
  }
  if (p.partial == nullptr) return;
  float* partial = p.partial + part * 2 * p.cols;
  store_pack(partial, col, p.cols, p.cols % kPack == 0, sum[0]);
  store_pack(partial + p.cols, col, p.cols, p.cols % kPack == 0, sum[1]);
}

struct Plan {
  int lanes;
  int64_t blocks, parts, part_rows;
};

// 8 rows or more a part, so that partial sums stay a small part of the bytes moved.
Plan plan_of(int64_t rows, int64_t cols) {
  const int64_t packs = ceil_div(cols, kPack);
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

int64_t linear_bwd_scratch(int64_t rows, int64_t cols) {
  return rows * cols == 0 ? 0 : 2 * cols * plan_of(rows, cols).parts;
}

void linear_bwd(const LinearBwdArgs& a, const Place& place) {
  if (a.cols == 0) return;
  const Plan plan = a.rows == 0 ? Plan{} : plan_of(a.rows, a.cols);
  const bool sums = a.dbias[0] != nullptr || a.dbias[1] != nullptr;
  if (a.rows > 0) {
    const auto aligned = [&](const void* p, int64_t stride) {
      return is_vector(p, stride, a.dtype);
    };
    const bool vector = a.cols % kPack == 0 && aligned(a.dy, a.dy_stride) &&
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
                            sums ? static_cast<float*>(a.scratch) : nullptr,
                            plan.lanes,
                            plan.part_rows};
    const dim3 grid(plan.blocks, ceil_div(a.cols, static_cast<int64_t>(plan.lanes) * kPack));
    dispatch_dtype(a.dtype, [&](auto t) {
      launch("linear_bwd", linear_bwd_kernel<decltype(t)>, grid, kThreads, 0, place, p);
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
