// float products in float: what torch computes where TF32 is not allowed. Operands may have any
// strides; the epilogue is that of gemm_epilogue.cuh.
//
// 256 threads compute a 64 x 64 tile, 4 x 4 sums each, from tiles of 16 along k that are fetched
// into registers while the one before is used. A sum starts anew after kRun of k and is added to
// the total: the error of a sum grows with its length.
#include "gemm_epilogue.cuh"
#include "kernels.h"
#include "launch.cuh"

namespace llmkern {
namespace {

constexpr int kTile = 64;
constexpr int kDepth = 16;
constexpr int kRun = 256;
constexpr int kThreads = 256;
// Elements a thread fetches of each operand; a line of 68 floats keeps 16-byte alignment and puts
// the 8 k x 4 rows that a warp stores at a time into 32 banks (4 k + row).
constexpr int kFetch = kTile * kDepth / kThreads;
constexpr int kLine = kTile + 4;
static_assert(kThreads == (kTile / 4) * (kTile / 4), "each thread has 4 x 4 sums");

struct Matrix {
  const float* data[2];
  int64_t row_stride[2], k_stride[2];
  int rows;
};

struct IeeeParams {
  Matrix a, b;
  int64_t m;
  int n, k, tiles_m;
  EpilogueParams epilogue;
};

// Where element i of a thread's fetch lies in the tile. Neighbouring lanes follow the contiguous
// dim: 8 k of 4 rows, or 32 rows of one k.
struct FetchPlace {
  int row, k;
};

__device__ inline FetchPlace fetch_place(bool k_contiguous, int i) {
  const int lane = threadIdx.x % kWarp, turn = threadIdx.x / kWarp * kFetch + i;
  if (k_contiguous) return {turn / 2 * 4 + lane / 8, turn % 2 * 8 + lane % 8};
  return {turn % 2 * kWarp + lane, turn / 2};
}

// Eight-row blocks alternate between the two matrices where parts is 2.
__device__ inline void fetch(const Matrix& m, int row0, int parts, int k0, int k_size,
                             float (&v)[kFetch]) {
#pragma unroll
  for (int i = 0; i < kFetch; ++i) {
    const FetchPlace at = fetch_place(m.k_stride[0] == 1, i);
    const int part = parts == 2 ? at.row / 8 % 2 : 0;
    const int row = row0 + (parts == 2 ? at.row / 16 * 8 + at.row % 8 : at.row), k = k0 + at.k;
    const bool inside = row < m.rows && k < k_size;
    v[i] = inside ? m.data[part][row * m.row_stride[part] + k * m.k_stride[part]] : 0.0f;
  }
}

__device__ inline void to_shared(float* lines, bool k_contiguous, const float (&v)[kFetch]) {
#pragma unroll
  for (int i = 0; i < kFetch; ++i) {
    const FetchPlace at = fetch_place(k_contiguous, i);
    lines[at.k * kLine + at.row] = v[i];
  }
}

__device__ inline void multiply(const float* a, const float* b, int ty, int tx,
                                float (&sum)[4][4]) {
#pragma unroll
  for (int k = 0; k < kDepth; ++k) {
    const float4 av = *reinterpret_cast<const float4*>(a + k * kLine + ty * 4);
    const float4 bv = *reinterpret_cast<const float4*>(b + k * kLine + tx * 4);
    const float as[4] = {av.x, av.y, av.z, av.w}, bs[4] = {bv.x, bv.y, bv.z, bv.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) sum[i][j] += as[i] * bs[j];
    }
  }
}

__device__ inline void add_run(float (&total)[4][4], float (&sum)[4][4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      total[i][j] += sum[i][j];
      sum[i][j] = 0.0f;
    }
  }
}

// Two blocks a multiprocessor at least: left to itself ptxas saves registers for four, and spills.
__global__ void __launch_bounds__(kThreads, 2) gemm_ieee_kernel(const IeeeParams p) {
  float* a_lines = reinterpret_cast<float*>(shared_bytes);
  float* b_lines = a_lines + kDepth * kLine;
  const int parts = p.epilogue.gated ? 2 : 1;
  const int row0 = static_cast<int>(blockIdx.x) % p.tiles_m * kTile;
  const int col0 = static_cast<int>(blockIdx.x) / p.tiles_m * (kTile / parts);
  const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
  float total[4][4] = {}, sum[4][4] = {};
  float a[kFetch], b[kFetch];
  fetch(p.a, row0, 1, 0, p.k, a);
  fetch(p.b, col0, parts, 0, p.k, b);
  for (int k0 = 0; k0 < p.k; k0 += kDepth) {
    __syncthreads();
    to_shared(a_lines, p.a.k_stride[0] == 1, a);
    to_shared(b_lines, p.b.k_stride[0] == 1, b);
    __syncthreads();
    if (k0 + kDepth < p.k) {
      fetch(p.a, row0, 1, k0 + kDepth, p.k, a);
      fetch(p.b, col0, parts, k0 + kDepth, p.k, b);
    }
    multiply(a_lines, b_lines, ty, tx, sum);
    if (k0 % kRun == kRun - kDepth) add_run(total, sum);
  }
  add_run(total, sum);
  __syncthreads();
  const int c = tile_block<kTile>(p.epilogue.gated, tx / 2);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    *reinterpret_cast<float4*>(shared_bytes + tile_offset<kTile>(ty * 4 + i, c, tx % 2)) =
        make_float4(total[i][0], total[i][1], total[i][2], total[i][3]);
  }
  __syncthreads();
  finish_tile<float, kTile, kTile, kThreads>(p.epilogue, shared_bytes, row0, p.m, col0, p.n);
}

}  // namespace

void gemm_ieee(const GemmArgs& g, const Place& place) {
  const GemmShape& s = g.shape;
  IeeeParams p{};
  p.a = {{static_cast<const float*>(g.a), nullptr},
         {s.a_stride[0], 0},
         {s.a_stride[1], 0},
         static_cast<int>(s.m)};
  p.b = {{static_cast<const float*>(g.b[0]), static_cast<const float*>(g.b[1])},
         {s.b_stride[0][0], s.b_stride[1][0]},
         {s.b_stride[0][1], s.b_stride[1][1]},
         static_cast<int>(s.n)};
  p.m = s.m;
  p.n = static_cast<int>(s.n);
  p.k = static_cast<int>(s.k);
  p.tiles_m = static_cast<int>(ceil_div(s.m, kTile));
  p.epilogue = epilogue_params(g.epilogue, s);
  const int64_t tiles_n = ceil_div(s.gated ? 2 * s.n : s.n, kTile);
  constexpr size_t kLines = 2 * kDepth * kLine * sizeof(float), kSums = kTile * kTile * 4;
  launch("gemm_ieee", gemm_ieee_kernel, dim3(static_cast<unsigned>(p.tiles_m * tiles_n)), kThreads,
         kLines > kSums ? kLines : kSums, place, p);
}

}  // namespace llmkern
