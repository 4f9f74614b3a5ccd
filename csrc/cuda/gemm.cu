// Matrix products on tensor cores, of 16-bit operands or of floats rounded to TF32, with the
// epilogue of gemm_epilogue.cuh; formulas: llmkern/gemm.h.
//
// A block of four warps computes a kBlock x kBlock tile of the product, each warp a quarter of it
// in float accumulators (mma m16n8k16), from kStages tiles along k that are under way at a time:
// one barrier for each 32 of k. The loop goes through all stages in one turn, so that every
// shared address is a register and a constant. Tiles of 16 bits come by cp.async, floats through
// registers, where they are rounded. Gated products put blocks of eight rows of the two
// weight matrices side by side, so a tile holds z and u of the same elements.
//
// Where there are few tiles and k is long, k is cut into parts, a block each; their float sums are
// added, in order, and finished by gemm_join.cu.
#include "gemm_epilogue.cuh"
#include "gemm_join.cuh"
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
  int part_k;      // of k for each part, whole lines of shared memory but in the last
  float* partial;  // null, or [parts][m][tiles_n * kBlock]
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
  static constexpr bool kRounds = sizeof(T) == sizeof(float);
  using LoadA = std::conditional_t<kRounds, RoundingLoader<kBlock>, Loader<T, kOuterA, kBlock>>;
  using LoadB = std::conditional_t<kRounds, RoundingLoader<kBlock>, Loader<T, kOuterB, kBlock>>;
  using FragmentsA = Fragments<kOuterA, kBlock, true>;
  using FragmentsB = Fragments<kOuterB, kBlock, false>;
  static constexpr int kWarpTile = kBlock / 2;
  static constexpr int kBlocks = kWarpTile / 16;  // 16 x 16 blocks along each side of a warp's tile
  static constexpr int kBlockK = LoadA::kBlockK;
  static constexpr int kBytesA = Tile<kOuterA, kBlock>::kBytes;
  static constexpr int kStageBytes = kBytesA + Tile<kOuterB, kBlock>::kBytes;
  static constexpr int kSharedBytes = kStages * kStageBytes;
  static_assert(kBlock * kBlock * 4 <= kSharedBytes, "the epilogue's tile reuses the stages");

  float sum[kBlocks][2 * kBlocks][4] = {};

  // The tiles at kOffset + offset bytes after the first stage.
  template <int kOffset>
  __device__ void multiply(const FragmentsA& a_of, const FragmentsB& b_of, uint32_t offset) {
    static_for<kLineBytes / 32>([&](auto step) {
      uint32_t a[kBlocks][4], b[kBlocks][4];
      static_for<kBlocks>([&](auto i) {
        a_of.template load<i.value, step.value, kOffset>(a[i.value], offset);
        b_of.template load<i.value, step.value, kOffset>(b[i.value], offset);
      });
#pragma unroll
      for (int i = 0; i < kBlocks; ++i) {
#pragma unroll
        for (int j = 0; j < kBlocks; ++j) {
          mma(sum[i][2 * j], a[i], b[j][0], b[j][1], T{});
          mma(sum[i][2 * j + 1], a[i], b[j][2], b[j][3], T{});
        }
      }
    });
  }

  // All k_size of k, kStages tiles at a time.
  __device__ void run(LoadA& load_a, LoadB& load_b, const FragmentsA& a_of, const FragmentsB& b_of,
                      int k_size) {
    constexpr int kAhead = kStages - 1;
    const int blocks = (k_size + kBlockK - 1) / kBlockK, whole = k_size / kBlockK;
    // The tile `from` after those that the loaders point at, to stage `to`.
    const auto load = [&](auto from, auto to, int block) {
      constexpr int kFrom = from.value, kTo = to.value * kStageBytes;
      if (block < whole) {
        load_a.template load_ahead<kFrom, kTo>();
        load_b.template load_ahead<kFrom, kTo>();
      } else if (block < blocks) {
        load_a.template load_part<kFrom, kTo>(k_size - block * kBlockK);
        load_b.template load_part<kFrom, kTo>(k_size - block * kBlockK);
      }
      ptx::cp_async_commit_group();  // an empty group too: the count below stays the same
    };
    // All of the next tile has arrived, and every warp is done with the stage before it.
    const auto arrive = [] {
      ptx::cp_async_wait_group<kStages - 2>();
      __syncthreads();
    };
    static_for<kAhead>([&](auto stage) { load(stage, stage, stage.value); });
    load_a.end_round(kAhead);
    load_b.end_round(kAhead);
    int block = 0;
#pragma unroll 1
    for (; block + kStages <= blocks; block += kStages) {
      static_for<kStages>([&](auto stage) {
        constexpr int kNext = (stage.value + kAhead) % kStages;
        arrive();
        load(stage, std::integral_constant<int, kNext>{}, block + stage.value + kAhead);
        multiply<stage.value * kStageBytes>(a_of, b_of, 0);
      });
      load_a.end_round(kStages);
      load_b.end_round(kStages);
    }
    // Fewer than kStages are left, all of them under way.
#pragma unroll 1
    for (uint32_t stage = 0; block < blocks; ++block, stage += kStageBytes) {
      arrive();
      ptx::cp_async_commit_group();
      multiply<0>(a_of, b_of, stage);
    }
    ptx::cp_async_wait_group<0>();
    __syncthreads();
  }

  // The same of floats: while a tile is multiplied, the next one, which has come to registers in
  // the meantime, is rounded into its stage, and the one after it is under way.
  __device__ void run_rounding(LoadA& load_a, LoadB& load_b, const FragmentsA& a_of,
                               const FragmentsB& b_of, int k_size) {
    constexpr int kAhead = 2;
    const int blocks = (k_size + kBlockK - 1) / kBlockK, whole = k_size / kBlockK;
    const auto fetch = [&](auto from, int block) {
      if (block < whole) {
        load_a.template fetch_ahead<from.value>();
        load_b.template fetch_ahead<from.value>();
      } else if (block < blocks) {
        load_a.template fetch_part<from.value>(k_size - block * kBlockK);
        load_b.template fetch_part<from.value>(k_size - block * kBlockK);
      }
    };
    // Past the last tile it is an old one again, to a stage that nothing reads.
    const auto put = [&](auto to, uint32_t offset) {
      load_a.template put<to.value * kStageBytes>(offset);
      load_b.template put<to.value * kStageBytes>(offset);
    };
    using std::integral_constant;
    fetch(integral_constant<int, 0>{}, 0);
    put(integral_constant<int, 0>{}, 0);
    fetch(integral_constant<int, 1>{}, 1);
    load_a.end_round(kAhead);
    load_b.end_round(kAhead);
    __syncthreads();
    int block = 0;
#pragma unroll 1
    for (; block + kStages <= blocks; block += kStages) {
      static_for<kStages>([&](auto stage) {
        put(integral_constant<int, (stage.value + 1) % kStages>{}, 0);
        fetch(stage, block + stage.value + kAhead);
        multiply<stage.value * kStageBytes>(a_of, b_of, 0);
        __syncthreads();
      });
      load_a.end_round(kStages);
      load_b.end_round(kStages);
    }
    // Fewer than kStages are left: the third, if there is one, is not yet under way.
#pragma unroll 1
    for (uint32_t stage = 0; block < blocks; ++block, stage += kStageBytes) {
      put(integral_constant<int, 1>{}, stage);
      fetch(integral_constant<int, 0>{}, block + kAhead);
      multiply<0>(a_of, b_of, stage);
      __syncthreads();
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

  // A tile of y with nothing but a bias added. 16-bit elements go through shared memory as they are
  // stored; of floats a quad of lanes has whole sectors as it is.
  __device__ void store_plain(const EpilogueParams& e, int row0, int64_t m, int col0, int n,
                              int warp_row, int warp_col) {
    const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
    if (e.bias[0] != nullptr) add_bias_pairs<T>(e.bias[0], col0 + warp_col + 2 * t, n, sum);
    if constexpr (sizeof(T) == sizeof(float)) {
      store_floats(static_cast<float*>(e.y), row0 + warp_row, m, e.y_stride, col0 + warp_col, n);
    } else {
      const int base = row_offset<kBlock>(warp_row + g, warp_col / 8) + t * 4;
#pragma unroll
      for (int j = 0; j < 2 * kBlocks; ++j) {
        uint8_t* column = shared_bytes + (base ^ (j * kUnit));
#pragma unroll
        for (int i = 0; i < 2 * kBlocks; ++i) {
          const float(&v)[4] = sum[i / 2][j];
          *reinterpret_cast<uint32_t*>(column + i * 8 * kBlock * 2) =
              pack_pair(v[i % 2 * 2], v[i % 2 * 2 + 1], T{});
        }
      }
      __syncthreads();
      copy_tile<T, kBlock, kGemmThreads>(e, row0, m, col0, n);
    }
  }

  // The warp's sums to rows of floats, of which n columns exist, a multiple of 8.
  __device__ void store_floats(float* rows, int64_t row0, int64_t m, int64_t stride, int col0,
                               int n) {
    const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int i = 0; i < 2 * kBlocks; ++i) {
      const int64_t row = row0 + i * 8 + g;
      if (row >= m) continue;
      float* to = rows + row * stride + col0 + 2 * t;
#pragma unroll
      for (int j = 0; j < 2 * kBlocks; ++j) {
        const float(&v)[4] = sum[i / 2][j];
        if (col0 + j * 8 < n) {
          *reinterpret_cast<float2*>(to + j * 8) = make_float2(v[i % 2 * 2], v[i % 2 * 2 + 1]);
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
  const int k0 = blockIdx.y * p.part_k;
  const uint32_t tile_a = shared_address(shared_bytes), tile_b = tile_a + G::kBytesA;
  typename G::LoadA load_a(p.a, tile_a, row0, 1, k0);
  typename G::LoadB load_b(p.b, tile_b, col0, parts, k0);
  G product;
  const typename G::FragmentsA a_of(tile_a, warp_row);
  const typename G::FragmentsB b_of(tile_b, warp_col);
  const int k_size = min(p.part_k, p.k - k0);
  if constexpr (G::kRounds) {
    product.run_rounding(load_a, load_b, a_of, b_of, k_size);
  } else {
    product.run(load_a, load_b, a_of, b_of, k_size);
  }
  if (p.partial != nullptr) {
    const int columns = p.tiles_n * kBlock;
    product.store_floats(p.partial + blockIdx.y * p.m * columns, row0 + warp_row, p.m, columns,
                         place.n * kBlock + warp_col, columns);
    return;
  }
  if (p.epilogue.plain) {
    product.store_plain(p.epilogue, row0, p.m, col0, p.n, warp_row, warp_col);
    return;
  }
  product.to_shared(p.epilogue.gated, warp_row, warp_col);
  __syncthreads();
  finish_tile<T, kBlock, kBlock, kGemmThreads>(p.epilogue, shared_bytes, row0, p.m, col0, p.n);
}

// Strides of a matrix [rows, k]: whether k is not the contiguous dim, and the other stride.
bool is_outer(const int64_t (&stride)[2]) { return stride[1] != 1; }
int line_bytes(const int64_t (&stride)[2], int64_t size) {
  return static_cast<int>(stride[is_outer(stride) ? 1 : 0] * size);
}

template <class T, bool kOuterA, bool kOuterB, int kBlock>
void run(const GemmArgs& g, const GemmPlan& plan, const Place& place) {
  const GemmShape& s = g.shape;
  const int64_t width = s.gated ? kBlock / 2 : kBlock;
  GemmParams p{};
  const int64_t size = sizeof(T);
  p.a = {{g.a, nullptr}, {line_bytes(s.a_stride, size), 0}, static_cast<int>(s.m)};
  p.b = {{g.b[0], g.b[1]},
         {line_bytes(s.b_stride[0], size), s.gated ? line_bytes(s.b_stride[1], size) : 0},
         static_cast<int>(s.n)};
  p.m = s.m;
  p.n = static_cast<int>(s.n);
  p.k = static_cast<int>(s.k);
  p.tiles_m = static_cast<int>(ceil_div(s.m, kBlock));
  p.tiles_n = static_cast<int>(ceil_div(s.n, width));
  p.part_k = static_cast<int>(plan.part_k);
  p.partial = plan.parts > 1 ? static_cast<float*>(g.scratch) : nullptr;
  p.epilogue = epilogue_params(g.epilogue, s);
  const dim3 grid(static_cast<unsigned>(p.tiles_m) * p.tiles_n, static_cast<unsigned>(plan.parts));
  launch("gemm", gemm_kernel<T, kOuterA, kOuterB, kBlock>, grid, kGemmThreads,
         Gemm<T, kOuterA, kOuterB, kBlock>::kSharedBytes, place, p);
  if (plan.parts > 1) {
    gemm_join({p.partial, plan.parts, int64_t{p.tiles_n} * kBlock, p.m, p.n, p.epilogue}, s.dtype,
              place);
  }
}

template <class T, int kBlock>
void run_layout(const GemmArgs& g, const GemmPlan& plan, const Place& place) {
  const bool outer_a = is_outer(g.shape.a_stride), outer_b = is_outer(g.shape.b_stride[0]);
  if (outer_a) return run<T, true, true, kBlock>(g, plan, place);
  outer_b ? run<T, false, true, kBlock>(g, plan, place)
          : run<T, false, false, kBlock>(g, plan, place);
}

template <class T>
void run_type(const GemmArgs& g, const GemmPlan& plan, const Place& place) {
  plan.block == 128 ? run_layout<T, 128>(g, plan, place) : run_layout<T, 64>(g, plan, place);
}

void run_tf32(const GemmArgs& g, const GemmPlan& plan, const Place& place) {
  plan.block == 128 ? run<float, false, false, 128>(g, plan, place)
                    : run<float, false, false, 64>(g, plan, place);
}

}  // namespace

int64_t gemm_scratch(DType dtype, int64_t m, int64_t n, int64_t k, bool gated, bool tf32) {
  if (m * n == 0 || (dtype == DType::kFloat32 && !tf32)) return 0;
  const GemmPlan plan = gemm_plan(dtype, m, n, k, gated);
  if (plan.parts == 1) return 0;
  const int64_t columns = gated ? 2 * n : n;
  return plan.parts * m * ceil_div(columns, plan.block) * plan.block;
}

void gemm(const GemmArgs& g, bool tf32, const Place& place) {
  const GemmShape& s = g.shape;
  if (s.m == 0 || s.n == 0) return;
  if (s.dtype == DType::kFloat32 && !tf32) return gemm_ieee(g, place);
  const GemmPlan plan = gemm_plan(s.dtype, s.m, s.n, s.k, s.gated);
  if (s.dtype == DType::kFloat32) return run_tf32(g, plan, place);
  s.dtype == DType::kBFloat16 ? run_type<BFloat16>(g, plan, place)
                              : run_type<Float16>(g, plan, place);
}

}  // namespace llmkern
