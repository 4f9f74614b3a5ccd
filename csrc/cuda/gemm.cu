// Matrix products on tensor cores, of 16-bit operands or of floats rounded to TF32, with the
// epilogue of gemm_epilogue.cuh; formulas: llmkern/gemm.h.
//
// A block of four warps computes a kBlock x kBlock tile of the product, each warp a quarter of it
// in float accumulators (mma m16n8k16), from kStages tiles along k that are under way at a time:
// one barrier for each 32 of k. Gated products put blocks of eight rows of the two weight matrices
// side by side, so a tile holds z and u of the same elements.
#include "gemm_epilogue.cuh"
#include "gemm_tile.cuh"
#include "kernels.h"
#include "launch.cuh"

namespace llmkern {
namespace {

constexpr int kStages = 4;
constexpr int kRaster = 8;  // tiles along m that share their columns of B in the second-level cache

struct GemmParams {
  Operand a, b;
  int64_t m;
  int n, k;
  int tiles_m, tiles_n;
  EpilogueParams epilogue;
};

__device__ inline void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                           BFloat16) {
  ptx::mma_m16n8k16_bf16(d, a, b0, b1);
}
__device__ inline void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                           Float16) {
  ptx::mma_m16n8k16_f16(d, a, b0, b1);
}

__device__ inline void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, float) {
  ptx::mma_m16n8k8_tf32(d, a, b0, b1);
}

// Fragments as mma takes them.
template <class T, int kCount>
__device__ inline void round_fragments(uint32_t (&r)[kCount][4], T) {
  if constexpr (sizeof(T) == sizeof(float)) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
#pragma unroll
      for (int e = 0; e < 4; ++e) r[i][e] = ptx::cvt_rna_tf32_f32(__uint_as_float(r[i][e]));
    }
  }
}

struct TilePlace {
  int m, n;
};

// Blocks in order walk down kRaster tiles of m before the next tile of n.
__device__ inline TilePlace tile_place(const GemmParams& p) {
  const int band = kRaster * p.tiles_n, first = blockIdx.x / band * kRaster;
  const int height = min(kRaster, p.tiles_m - first), in_band = blockIdx.x % band;
  return {first + in_band % height, in_band / height};
}

template <class T, bool kOuterA, bool kOuterB, int kBlock>
struct Gemm {
  static constexpr int kWarpTile = kBlock / 2;
  static constexpr int kBlocks = kWarpTile / 16;  // 16 x 16 blocks along each side of a warp's tile
  static constexpr int kStageBytes = Tile<kOuterA, kBlock>::kBytes + Tile<kOuterB, kBlock>::kBytes;
  static constexpr int kSharedBytes = kStages * kStageBytes;
  static_assert(kBlock * kBlock * 4 <= kSharedBytes, "the epilogue's tile reuses the stages");

  float sum[kBlocks][2 * kBlocks][4] = {};

  // One stage: kLineBytes of k.
  __device__ void multiply(uint32_t stage, const Fragments<kOuterA, kBlock, true>& a_of,
                           const Fragments<kOuterB, kBlock, false>& b_of) {
#pragma unroll
    for (int step = 0; step < kLineBytes / 32; ++step) {
      uint32_t a[kBlocks][4], b[kBlocks][4];
#pragma unroll
      for (int i = 0; i < kBlocks; ++i) a_of.load(a[i], stage, i, step);
#pragma unroll
      for (int j = 0; j < kBlocks; ++j) {
        b_of.load(b[j], stage + Tile<kOuterA, kBlock>::kBytes, j, step);
      }
      round_fragments(a, T{});
      round_fragments(b, T{});
#pragma unroll
      for (int i = 0; i < kBlocks; ++i) {
#pragma unroll
        for (int j = 0; j < kBlocks; ++j) {
          mma(sum[i][2 * j], a[i], b[j][0], b[j][1], T{});
          mma(sum[i][2 * j + 1], a[i], b[j][2], b[j][3], T{});
        }
      }
    }
  }

  __device__ void to_shared(bool gated, int row0, int col0) const {
    const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int j = 0; j < 2 * kBlocks; ++j) {
      const int c = tile_block<kBlock>(gated, col0 / 8 + j);
#pragma unroll
      for (int i = 0; i < kBlocks; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = row0 + i * 16 + half * 8 + g;
          const int at = tile_offset<kBlock>(row, c, t / 2) + t % 2 * 8;
          *reinterpret_cast<float2*>(shared_bytes + at) =
              make_float2(sum[i][j][2 * half], sum[i][j][2 * half + 1]);
        }
      }
    }
  }
};

template <class T, bool kOuterA, bool kOuterB, int kBlock>
__global__ void __launch_bounds__(kGemmThreads) gemm_kernel(const GemmParams p) {
  using G = Gemm<T, kOuterA, kOuterB, kBlock>;
  const TilePlace place = tile_place(p);
  const int parts = p.epilogue.gated ? 2 : 1;
  const int row0 = place.m * kBlock, col0 = place.n * (kBlock / parts);
  const int warp = threadIdx.x / kWarp;
  const int warp_row = warp % 2 * G::kWarpTile, warp_col = warp / 2 * G::kWarpTile;
  Loader<T, kOuterA, kBlock> load_a(p.a, row0, 1, p.k);
  Loader<T, kOuterB, kBlock> load_b(p.b, col0, parts, p.k);
  const Fragments<kOuterA, kBlock, true> a_of(warp_row);
  const Fragments<kOuterB, kBlock, false> b_of(warp_col);
  const uint32_t stages = shared_address(shared_bytes);
  constexpr int kBlockK = kLineBytes / static_cast<int>(sizeof(T));
  const int blocks_k = (p.k + kBlockK - 1) / kBlockK;
  const auto load = [&](int block) {
    if (block < blocks_k) {
      const uint32_t stage = stages + block % kStages * G::kStageBytes;
      load_a(stage);
      load_b(stage + Tile<kOuterA, kBlock>::kBytes);
    }
    ptx::cp_async_commit_group();  // an empty group too: the count below stays the same
  };
  G product;
  for (int block = 0; block < kStages - 1; ++block) load(block);
  for (int block = 0; block < blocks_k; ++block) {
    ptx::cp_async_wait_group<kStages - 2>();
    // All of this block has arrived, and every warp is done with the stage that is loaded next.
    __syncthreads();
    load(block + kStages - 1);
    product.multiply(stages + block % kStages * G::kStageBytes, a_of, b_of);
  }
  ptx::cp_async_wait_group<0>();
  __syncthreads();
  product.to_shared(p.epilogue.gated, warp_row, warp_col);
  __syncthreads();
  finish_tile<T, kBlock, kBlock, kGemmThreads>(p.epilogue, shared_bytes, row0, p.m, col0, p.n);
}

// Large tiles read less; small ones keep a card of about 108 multiprocessors busy.
constexpr int64_t kEnoughTiles = 96;

int pick_block(const GemmShape& s) {
  const int64_t columns = s.gated ? 2 * s.n : s.n;
  return ceil_div(s.m, 128) * ceil_div(columns, 128) >= kEnoughTiles ? 128 : 64;
}

// Strides of a matrix [rows, k]: whether k is not the contiguous dim, and the other stride.
bool is_outer(const int64_t (&stride)[2]) { return stride[1] != 1; }
int64_t line_stride(const int64_t (&stride)[2]) { return stride[is_outer(stride) ? 1 : 0]; }

template <class T, bool kOuterA, bool kOuterB, int kBlock>
void run(const GemmArgs& g, const Place& place) {
  const GemmShape& s = g.shape;
  const int64_t width = s.gated ? kBlock / 2 : kBlock;
  GemmParams p{};
  p.a = {{g.a, nullptr}, {line_stride(s.a_stride), 0}, static_cast<int>(s.m)};
  p.b = {{g.b[0], g.b[1]},
         {line_stride(s.b_stride[0]), s.gated ? line_stride(s.b_stride[1]) : 0},
         static_cast<int>(s.n)};
  p.m = s.m;
  p.n = static_cast<int>(s.n);
  p.k = static_cast<int>(s.k);
  p.tiles_m = static_cast<int>(ceil_div(s.m, kBlock));
  p.tiles_n = static_cast<int>(ceil_div(s.n, width));
  p.epilogue = epilogue_params(g.epilogue, s);
  launch("gemm", gemm_kernel<T, kOuterA, kOuterB, kBlock>,
         dim3(static_cast<unsigned>(p.tiles_m) * p.tiles_n), kGemmThreads,
         Gemm<T, kOuterA, kOuterB, kBlock>::kSharedBytes, place, p);
}

template <class T, int kBlock>
void run_layout(const GemmArgs& g, const Place& place) {
  const bool outer_a = is_outer(g.shape.a_stride), outer_b = is_outer(g.shape.b_stride[0]);
  if (outer_a) return run<T, true, true, kBlock>(g, place);
  outer_b ? run<T, false, true, kBlock>(g, place) : run<T, false, false, kBlock>(g, place);
}

template <class T>
void run_type(const GemmArgs& g, const Place& place) {
  pick_block(g.shape) == 128 ? run_layout<T, 128>(g, place) : run_layout<T, 64>(g, place);
}

void run_tf32(const GemmArgs& g, const Place& place) {
  pick_block(g.shape) == 128 ? run<float, false, false, 128>(g, place)
                             : run<float, false, false, 64>(g, place);
}

}  // namespace

void gemm(const GemmArgs& g, bool tf32, const Place& place) {
  if (g.shape.m == 0 || g.shape.n == 0) return;
  if (g.shape.dtype == DType::kFloat32) return tf32 ? run_tf32(g, place) : gemm_ieee(g, place);
  g.shape.dtype == DType::kBFloat16 ? run_type<BFloat16>(g, place) : run_type<Float16>(g, place);
}

}  // namespace llmkern
