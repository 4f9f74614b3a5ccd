// Kernels with a bug each, chosen by the template argument, for tests/test_emulator_bugs.py. A line
// that a report must name has `caught:` and the bugs' names, or follows such a comment.
#include <cuda_runtime.h>

enum Bug {
  kNone,
  kNoBarrierAfterWait,
  kLaxWait,
  kNoWait,
  kRowBound,
  kColumnBound,
  kStageNeverFilled,
  kWrongStage,
  kNoBarrierBeforeReuse,
  kShiftedStore,
  kScratchReused,
  kPartialsPastEnd,
  kDivergentShuffle,
  kNoWarpBarrier,
  kNoFence,
  kWrongMask,
  kUnswizzled,
};

constexpr int kTile = 32;

__device__ void copy16(float* to, const float* from, bool inside) {
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(to));
  const int bytes = inside ? 16 : 0;
  // caught: kRowBound kNoBarrierBeforeReuse
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(bytes)
               : "memory");
}
__device__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kGroups>
__device__ void wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

// c[m, n] = a[m, k] b[k, n] by 256 threads, two stages; k a multiple of 32, n of 4.
template <int kBug>
__device__ void gemm(const float* a, const float* b, float* c, int m, int n, int k) {
  __shared__ __align__(16) float sa[2][kTile][kTile], sb[2][kTile][kTile];
  const int x = threadIdx.x % 8 * 4, y = threadIdx.x / 8;
  const int row = blockIdx.y * kTile + y, column = blockIdx.x * kTile + x;
  const auto fill = [&](int step) {
    copy16(&sa[step % 2][y][x], a + row * k + step * kTile + x, kBug == kRowBound || row < m);
    copy16(&sb[step % 2][y][x], b + (step * kTile + y) * n + column, column < n);
  };
  float sum[4] = {};
  fill(0);
  commit();
  for (int step = 0; step < k / kTile; ++step) {
    if (step + 1 < k / kTile && !(kBug == kStageNeverFilled && step == 0)) fill(step + 1);
    commit();
    if (kBug != kNoWait) wait<kBug == kLaxWait ? 2 : 1>();
    if (kBug != kNoBarrierAfterWait) __syncthreads();
    const int stage = (step + (kBug == kWrongStage)) % 2;
    for (int i = 0; i < kTile; ++i) {
      const float left =
          sa[stage][y]
            [i];  // caught: kNoBarrierAfterWait kLaxWait kNoWait kStageNeverFilled kWrongStage
      for (int j = 0; j < 4; ++j)
        sum[j] += left * sb[stage][i][x + j];  // caught: kNoBarrierAfterWait
    }
    if (kBug != kNoBarrierBeforeReuse) __syncthreads();
  }
  const int shift = kBug == kShiftedStore ? kTile : 0;
  for (int j = 0; j < 4; ++j) {
    const bool inside = kBug == kColumnBound ? column + j <= n : column + j < n;
    if (row < m && inside)
      c[(row + shift) * n + column + j] = sum[j];  // caught: kColumnBound kShiftedStore
  }
}

// out = {sum, sum of squares about the mean}; a float of shared memory for each warp.
template <int kBug>
__device__ float block_sum(float v) {
  extern __shared__ float partial[];
  const int warps = blockDim.x / 32;
  if (kBug != kDivergentShuffle || threadIdx.x % 32 < 16) {
    for (int step = 16; step > 0; step /= 2)
      v += __shfl_xor_sync(0xffffffffu, v, step);  // caught: kDivergentShuffle
  }
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = v;  // caught: kScratchReused kSmallShared
  __syncthreads();
  float sum = 0;
  for (int i = 0; i < warps + (kBug == kPartialsPastEnd); ++i)
    sum += partial[i];  // caught: kScratchReused kPartialsPastEnd
  if (kBug != kScratchReused) __syncthreads();
  return sum;
}
template <int kBug>
__device__ void moments(const float* x, float* out, int n) {
  const float v = threadIdx.x < n ? x[threadIdx.x] : 0;
  const float sum = block_sum<kBug>(v);
  const float centred = threadIdx.x < n ? v - sum / n : 0;
  const float squares = block_sum<kBug>(centred * centred);
  if (threadIdx.x == 0) {
    out[0] = sum;
    out[1] = squares;
  }
}

// Each warp reverses its 32 words through shared memory.
template <int kBug>
__device__ void reverse(const float* x, float* y) {
  __shared__ float buffer[4][32];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  buffer[warp][lane] = x[threadIdx.x];
  if (kBug != kNoWarpBarrier) __syncwarp();
  y[threadIdx.x] = buffer[warp][31 - lane];  // caught: kNoWarpBarrier
}

// The block that comes last adds up what the blocks left.
template <int kBug>
__device__ void last_block(const float* x, float* partial, unsigned* tickets, float* out) {
  __shared__ bool last;
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = x[2 * blockIdx.x] + x[2 * blockIdx.x + 1];
    if (kBug != kNoFence) __threadfence();
    last = atomicAdd(tickets, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (!last || threadIdx.x != 0) return;
  float sum = 0;
  for (int i = 0; i < gridDim.x; ++i) sum += partial[i];  // caught: kNoFence
  *out = sum;
}

// Row sums of exp(s) over the keys that a causal mask leaves.
template <int kBug>
__device__ void causal(const float* s, float* out, int n) {
  const int i = threadIdx.x;
  float sum = 0;
  for (int j = 0; j < n; ++j) {
    if (kBug == kWrongMask ? j < i : j <= i) sum += expf(s[i * n + j]);
  }
  out[i] = sum;
}

template <int kBug>
__device__ void transpose(const float* x, float* y) {
  __shared__ float tile[32][kBug == kUnswizzled ? 32 : 33];
  for (int i = threadIdx.y; i < 32; i += 8) tile[i][threadIdx.x] = x[i * 32 + threadIdx.x];
  __syncthreads();
  for (int i = threadIdx.y; i < 32; i += 8) y[i * 32 + threadIdx.x] = tile[threadIdx.x][i];
}

#define KERNEL(name, bug, parameters, ...) \
  extern "C" __global__ void name##_##bug parameters { name<bug>(__VA_ARGS__); }
#define GEMM(bug)                                                                                \
  KERNEL(gemm, bug, (const float* a, const float* b, float* c, int m, int n, int k), a, b, c, m, \
         n, k)
GEMM(kNone)
GEMM(kNoBarrierAfterWait)
GEMM(kLaxWait)
GEMM(kNoWait)
GEMM(kRowBound)
GEMM(kColumnBound)
GEMM(kStageNeverFilled)
GEMM(kWrongStage)
GEMM(kNoBarrierBeforeReuse)
GEMM(kShiftedStore)
#define MOMENTS(bug) KERNEL(moments, bug, (const float* x, float* out, int n), x, out, n)
MOMENTS(kNone)
MOMENTS(kScratchReused)
MOMENTS(kPartialsPastEnd)
MOMENTS(kDivergentShuffle)
KERNEL(reverse, kNone, (const float* x, float* y), x, y)
KERNEL(reverse, kNoWarpBarrier, (const float* x, float* y), x, y)
#define LAST_BLOCK(bug)                                                                       \
  KERNEL(last_block, bug, (const float* x, float* partial, unsigned* tickets, float* out), x, \
         partial, tickets, out)
LAST_BLOCK(kNone)
LAST_BLOCK(kNoFence)
KERNEL(causal, kNone, (const float* s, float* out, int n), s, out, n)
KERNEL(causal, kWrongMask, (const float* s, float* out, int n), s, out, n)
KERNEL(transpose, kNone, (const float* x, float* y), x, y)
KERNEL(transpose, kUnswizzled, (const float* x, float* y), x, y)
