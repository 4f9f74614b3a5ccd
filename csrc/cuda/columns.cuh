// Sums over rows, column by column, in an order that the shape alone decides: kernels write one
// partial sum a block of rows, column_sums adds those up.
#pragma once

#include <cstdint>

#include "common.cuh"
#include "llmkern/dtype.h"
#include "place.h"

namespace llmkern {

struct ColumnSumsParams {
  const float* partial;  // [parts] rows of cols floats, part_stride apart
  int64_t part_stride;
  int parts, cols;
  DType dtype;  // of out
  void* out;    // [cols]
};

// Four columns of a row from `col` on, of which those before `cols` exist.
__device__ inline void store_quad(float* row, int col, int cols, bool vector, float4 v) {
  const float each[4] = {v.x, v.y, v.z, v.w};
  if (vector) {
    // Written so that it stays one store: the compiler may split a float4 into four.
    ptx::st_global_v4(ptx::global_address(row + col), each);
    return;
  }
  for (int i = 0; i < 4 && col + i < cols; ++i) row[col + i] = each[i];
}

// Shared memory of store_columns, as float4.
constexpr int kColumnsPitch = 4;
constexpr size_t columns_bytes(int threads) { return 2 * (threads + kColumnsPitch) * 16; }

// Sums of a block, in groups of `lanes` threads that stand beside each other with N columns each
// from first_col on, to the row of each group. Eight columns go through shared memory, so that a
// warp's stores are contiguous; halves stand so far apart that reads in the order of the row take
// them from different banks. All threads take part.
template <int kThreads, int N>
__device__ inline void store_columns(float* row, int first_col, int cols, int lanes,
                                     const float (&v)[N]) {
  static_assert(N == 4 || N == 8, "16 bytes of floats or of a 16-bit type");
  const int lane = threadIdx.x % lanes;
  const bool vector = cols % 4 == 0;
  if constexpr (N == 4) {
    const int col = first_col + lane * 4;
    if (col < cols) store_quad(row, col, cols, vector, make_float4(v[0], v[1], v[2], v[3]));
    return;
  }
  const auto carry = reinterpret_cast<float4*>(shared_bytes);
  __syncthreads();
#pragma unroll
  for (int h = 0; h < N / 4; ++h) {
    const float* own = v + 4 * h;
    carry[h * (kThreads + kColumnsPitch) + threadIdx.x] =
        make_float4(own[0], own[1], own[2], own[3]);
  }
  __syncthreads();
  for (int q = lane; q < 2 * lanes; q += lanes) {
    const int col = first_col + 4 * q, holder = threadIdx.x - lane + q / 2;
    if (col >= cols) break;
    const float4 sum = carry[q % 2 * (kThreads + kColumnsPitch) + holder];
    store_quad(row, col, cols, vector, sum);
  }
}

void column_sums(const ColumnSumsParams& p, const Place& place);

}  // namespace llmkern
