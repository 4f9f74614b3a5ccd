// Parts of a product cut along k: which products are cut, and their sums with the epilogue.
//
// For 16-bit y a thread reads the same four columns of two rows, 16 bytes each, so a warp's reads
// are contiguous; then neighbours exchange halves, and each has eight columns of one row, as the
// epilogue and its 16-byte stores want them. Parts are added in their order: the result depends on
// the shape alone.
#include "gemm_join.cuh"

#include "launch.cuh"

namespace llmkern {
namespace {

constexpr int kThreads = 128;

__device__ inline void add_to(float (&sum)[4], const float* from) {
  const float4 v = *reinterpret_cast<const float4*>(from);
  sum[0] += v.x, sum[1] += v.y, sum[2] += v.z, sum[3] += v.w;
}

// The pack of eight columns from `col` on of row `row` + lane % 2.
__device__ inline void load_sums(const JoinParams& p, int64_t row, int64_t col, float (&v)[kPack]) {
  const bool odd = threadIdx.x % 2 != 0;
  const int64_t part_step = p.m * p.stride, row_step = row + 1 < p.m ? p.stride : 0;
  const float* from = p.partial + min(row, p.m - 1) * p.stride + col + (odd ? 4 : 0);
  float rows[2][4] = {};
#pragma unroll 4
  for (int part = 0; part < p.parts; ++part, from += part_step) {
    add_to(rows[0], from);
    add_to(rows[1], from + row_step);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float other = __shfl_xor_sync(kAllLanes, odd ? rows[0][i] : rows[1][i], 1);
    v[i] = odd ? other : rows[0][i];
    v[4 + i] = odd ? rows[1][i] : other;
  }
}

// Four columns of a row.
__device__ inline void load_sums(const JoinParams& p, int64_t row, int64_t col, float (&v)[4]) {
  const int64_t part_step = p.m * p.stride;
  const float* from = p.partial + min(row, p.m - 1) * p.stride + col;
#pragma unroll
  for (int i = 0; i < 4; ++i) v[i] = 0.0f;
#pragma unroll 2
  for (int part = 0; part < p.parts; ++part, from += part_step) add_to(v, from);
}

// Rows that neighbouring threads take together.
template <class T>
constexpr int kRowsOf = kPackOf<T> / 4;

template <class T>
__global__ void __launch_bounds__(kThreads) gemm_join_kernel(const JoinParams p) {
  constexpr int N = kPackOf<T>, kRows = kRowsOf<T>;
  const unsigned packs = (p.n + N - 1) / N;
  // Few: small products are cut.
  const unsigned place = (blockIdx.x * kThreads + threadIdx.x) / kRows;
  const int64_t row = place / packs * kRows, own = row + threadIdx.x % kRows;
  const int col = static_cast<int>(place % packs) * N;
  float z[N], u[N];
  if (p.epilogue.gated) {
    const int64_t first = col / kPack * (2 * kPack) + col % kPack;
    load_sums(p, row, first, z);
    load_sums(p, row, first + kPack, u);
  } else {
    load_sums(p, row, col, z);
  }
  if (own >= p.m) return;
  if (p.epilogue.plain) {
    if (p.epilogue.bias[0] != nullptr) {
      float bias[N];
      load_vector(static_cast<const T*>(p.epilogue.bias[0]) + col, bias);
#pragma unroll
      for (int i = 0; i < N; ++i) z[i] += bias[i];
    }
    store_vector(static_cast<T*>(p.epilogue.y) + own * p.epilogue.y_stride + col, z);
    return;
  }
  const auto columns = load_columns<T>(p.epilogue, col, p.n);
  finish_pack<T>(p.epilogue, columns, own, z, u);
}

// Tiles that keep a card of about 108 multiprocessors busy.
constexpr int64_t kEnough = 96;
// Of k in a part at least, 16-bit elements: shorter ones spend more on sums than on products.
constexpr int64_t kLeastPart = 256;
constexpr int64_t kMostParts = 8;

int64_t parts_of(int64_t tiles, int64_t k, int64_t least) {
  int64_t parts = kEnough / tiles;
  if (parts > k / least) parts = k / least;
  if (parts > kMostParts) parts = kMostParts;
  return parts > 1 ? parts : 1;
}

}  // namespace

// Large tiles read less and spend fewer instructions a product; small ones, and parts of k, keep
// the card busy.
GemmPlan gemm_plan(DType dtype, int64_t m, int64_t n, int64_t k, bool gated) {
  const int64_t columns = gated ? 2 * n : n, size = size_of(dtype);
  const auto tiles = [&](int64_t block) { return ceil_div(m, block) * ceil_div(columns, block); };
  const int64_t least = kLeastPart * 2 / size, unit = 64 / size;
  const int64_t large = tiles(128), small = tiles(64);
  const int64_t large_parts = parts_of(large, k, least);
  // Where a large tile would be a quarter empty or more, small ones multiply less.
  const bool fits = 4 * large * 3 <= 4 * small;
  const int block = fits && large * large_parts >= kEnough * 3 / 4 ? 128 : 64;
  const int64_t parts = block == 128 ? large_parts : parts_of(small, k, least);
  const int64_t part_k = ceil_div(ceil_div(k, parts), unit) * unit;
  return {block, static_cast<int>(k == 0 ? 1 : ceil_div(k, part_k)), part_k};
}

void gemm_join(const JoinParams& p, DType dtype, const Place& place) {
  dispatch_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    const int64_t rows = kRowsOf<T>;
    const int64_t threads = ceil_div(p.m, rows) * ceil_div(p.n, int64_t{kPackOf<T>}) * rows;
    launch("gemm_join", gemm_join_kernel<T>, dim3(ceil_div(threads, kThreads)), kThreads, 0, place,
           p);
  });
}

}  // namespace llmkern
