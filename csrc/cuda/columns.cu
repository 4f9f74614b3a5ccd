// Adds partial column sums: a warp's lanes read 32 neighbouring columns, the block's warps take
// turns at the parts, and the first warp adds the warps' sums in their order.
#include "columns.cuh"

#include "kernels.h"
#include "launch.cuh"

namespace llmkern {
namespace {

constexpr int kSumWarps = 8;

__global__ void __launch_bounds__(kSumWarps* kWarp) column_sums_kernel(const ColumnSumsParams p) {
  auto sums = reinterpret_cast<float(*)[kWarp]>(shared_bytes);  // [kSumWarps]
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int col = blockIdx.x * kWarp + lane;
  float sum = 0.0f;
  if (col < p.cols) {
    for (int part = warp; part < p.parts; part += kSumWarps) {
      sum += p.partial[part * p.part_stride + col];
    }
  }
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp != 0 || col >= p.cols) return;
  for (int w = 1; w < kSumWarps; ++w) sum += sums[w][lane];
  if (p.dtype == DType::kFloat32) {
    static_cast<float*>(p.out)[col] = sum;
  } else if (p.dtype == DType::kBFloat16) {
    static_cast<BFloat16*>(p.out)[col] = from_float<BFloat16>(sum);
  } else {
    static_cast<Float16*>(p.out)[col] = from_float<Float16>(sum);
  }
}

}  // namespace

void column_sums(const ColumnSumsParams& p, const Place& place) {
  launch("column_sums", column_sums_kernel, dim3(ceil_div(p.cols, kWarp)), kSumWarps * kWarp,
         kSumWarps * kWarp * sizeof(float), place, p);
}

// Any kernel would do: all are compiled for the same targets.
void require_kernels(const Place& place) {
  cudaFuncAttributes attributes{};
  check(cudaSetDevice(place.device), "column_sums");
  check(cudaFuncGetAttributes(&attributes, column_sums_kernel), "column_sums");
}

}  // namespace llmkern
