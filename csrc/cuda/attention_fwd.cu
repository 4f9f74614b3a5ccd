// Attention forward in one pass over the keys with a running softmax (Dao, "FlashAttention-2",
// 2023); formulas: llmkern/attention.h, tiles: attention.cuh.
//
// A block owns 64 queries of one head and walks over the tiles of 64 keys that they see. K and V
// are double-buffered: while one tile is multiplied the next arrives. Only tiles that the band's
// edge, the end of the keys or a key mask cuts pay for masking.
#include "attention_cut.cuh"
#include "attention_launch.cuh"
#include "kernels.h"

namespace llmkern {
namespace {

constexpr int kKeys = 64;

// Running maximum (of unscaled scores) and sum of a lane's two rows.
struct Softmax {
  float top[2] = {-INFINITY, -INFINITY};
  float sum[2] = {0.0f, 0.0f};  // of this lane's columns

  // s becomes exp(scale (s - top)); sums so far and `out` shrink to the new maximum. Hidden
  // scores are -inf.
  template <int kBlocks>
  __device__ void update(float (&s)[kKeys / 8][4], float (&out)[kBlocks][4], float scale_log2) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float most = top[half];
#pragma unroll
      for (int j = 0; j < kKeys / 8; ++j) {
        most = fmaxf(most, fmaxf(s[j][2 * half], s[j][2 * half + 1]));
      }
      most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, 1));
      most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, 2));
      const float base = most == -INFINITY ? 0.0f : most * scale_log2;
      const float shrink = ptx::ex2_approx_ftz_f32(top[half] * scale_log2 - base);
      top[half] = most;
      float total = 0.0f;
#pragma unroll
      for (int j = 0; j < kKeys / 8; ++j) {
#pragma unroll
        for (int e = 2 * half; e < 2 * half + 2; ++e) {
          s[j][e] = ptx::ex2_approx_ftz_f32(fmaf(s[j][e], scale_log2, -base));
          total += s[j][e];
        }
      }
      sum[half] = sum[half] * shrink + total;
#pragma unroll
      for (int j = 0; j < kBlocks; ++j) {
        out[j][2 * half] *= shrink;
        out[j][2 * half + 1] *= shrink;
      }
    }
  }
};

__device__ inline void hide(const AttentionParams& p, int batch, int j0, const Band (&bands)[2],
                            float (&s)[kKeys / 8][4]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const Band band = bands[half].of_lane();
#pragma unroll
    for (int j = 0; j < kKeys / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        if (!band.sees(j * 8 + e)) s[j][2 * half + e] = -INFINITY;
      }
    }
  }
  if (p.key_mask == nullptr) return;
  const uint64_t kept = kept_keys(p, batch, j0);
#pragma unroll
  for (int j = 0; j < kKeys / 8; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (!(kept >> (j * 8 + e % 2) & 1)) s[j][e] = -INFINITY;
    }
  }
}

template <int kD>
struct FwdShared {
  static constexpr int kTile = kKeys * kD * 2;
  static constexpr int kQ = 0, kK = kBlockRows * kD * 2, kV = kK + 2 * kTile;
  static constexpr int kBytes = kV + 2 * kTile;
};

template <class T, int kD>
__global__ void __launch_bounds__(kAttentionThreads) attention_fwd_kernel(const AttentionParams p) {
  using Shared = FwdShared<kD>;
  const int batch = blockIdx.z, head = blockIdx.y;
  // The last queries see most keys under a causal mask: they start first.
  const int i0 = (gridDim.x - 1 - blockIdx.x) * kBlockRows;
  const int warp = threadIdx.x / kWarp, g = threadIdx.x % kWarp / 4;
  const int row0 = i0 + warp * kWarpRows;
  const uint32_t shared = shared_address(shared_bytes);
  const uint32_t q_rows = shared + Shared::kQ + warp * kWarpRows * kD * 2;
  const T* q = slab<T>(p.q, batch, head);
  const T* k = slab<T>(p.k, batch, head / p.group);
  const T* v = slab<T>(p.v, batch, head / p.group);
  const uint8_t* keep =
      p.key_mask == nullptr ? nullptr : p.key_mask + static_cast<int64_t>(batch) * p.kv_len;
  const Lanes<kD> lanes;
  const Range tiles = key_tiles<kKeys>(p, i0, min(i0 + kBlockRows, p.q_len) - 1);
  const auto load_k = [&](int tile) {
    if (tile < tiles.end) {
      load_rows<T, kD, kKeys>(shared + Shared::kK + tile % 2 * Shared::kTile, k, p.k.row,
                              tile * kKeys, p.kv_len, p.head_dim, keep);
    }
    ptx::cp_async_commit_group();
  };
  const auto load_v = [&](int tile) {
    if (tile < tiles.end) {
      load_rows<T, kD, kKeys>(shared + Shared::kV + tile % 2 * Shared::kTile, v, p.v.row,
                              tile * kKeys, p.kv_len, p.value_dim, keep);
    }
    ptx::cp_async_commit_group();
  };
  load_rows<T, kD, kBlockRows>(shared + Shared::kQ, q, p.q.row, i0, p.q_len, p.head_dim);
  load_k(tiles.first);
  load_v(tiles.first);
  const float scale_log2 = p.scale * kLog2E;
  Softmax softmax;
  float out[kD / 8][4] = {};
  for (int tile = tiles.first; tile < tiles.end; ++tile) {
    const int j0 = tile * kKeys;
    float s[kKeys / 8][4];
    ptx::cp_async_wait_group<1>();  // K of this tile is here, V may be under way
    __syncthreads();
    load_k(tile + 1);
    multiply_rows<T, kD, kKeys>(s, q_rows, shared + Shared::kK + tile % 2 * Shared::kTile, lanes);
    const Band bands[2] = {keys_of(p, row0 + g, j0), keys_of(p, row0 + g + 8, j0)};
    const int i1 = i0 + kBlockRows - 1, j1 = j0 + kKeys - 1;
    if (!all_see(p, i0, i1, j0, j1)) hide(p, batch, j0, bands, s);
    softmax.update(s, out, scale_log2);
    if (p.dropout.threshold != 0) {
      drop_keys<kKeys>(p, batch * p.heads + head, row0, j0, s, 1.0f);
    }
    ptx::cp_async_wait_group<1>();
    const uint32_t v_tile = Shared::kV + tile % 2 * Shared::kTile;
    const bool covered = band_covers(p, i0, i1, j0, j1);
    const bool finite =
        barrier_all_finite(covered ? 0 : own_exponents<T, kD, kKeys>(shared_bytes + v_tile));
    load_v(tile + 1);
    accumulate_seen<T, kD, kKeys>(out, s, v_tile, lanes, covered || finite, bands);
  }
  ptx::cp_async_wait_group<0>();
  __syncthreads();  // without tiles, Q is still arriving where the rows are put now
  float scale[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float sum = softmax.sum[half];
    sum += __shfl_xor_sync(kAllLanes, sum, 1);
    sum += __shfl_xor_sync(kAllLanes, sum, 2);
    scale[half] = sum == 0.0f ? 0.0f : p.dropout.scale / sum;
    const int row = row0 + g + half * 8;
    if (threadIdx.x % 4 == 0 && row < p.q_len) {
      p.lse[(static_cast<int64_t>(batch) * p.heads + head) * p.q_len + row] =
          sum == 0.0f ? -INFINITY : softmax.top[half] * p.scale + __logf(sum);
    }
  }
  store_rows<T, kD>(shared_bytes + Shared::kQ + warp * kWarpRows * kD * 2, p.out, batch, head, row0,
                    p.q_len, p.value_dim, out, scale);
}

}  // namespace

void attention_fwd(const AttentionFwdArgs& a, const Place& place) {
  AttentionParams p = attention_params(a.shape, a.in);
  if (a.shape.batch * a.shape.heads * a.shape.q_len == 0) return;
  p.out = rows_at(a.out, a.out_stride);
  p.lse = static_cast<float*>(a.lse);
  const dim3 grid(ceil_div(p.q_len, kBlockRows), p.heads, a.shape.batch);
  dispatch_attention(a.shape, [&](auto t, auto d) {
    constexpr int kD = d.value;
    launch("attention_fwd", attention_fwd_kernel<decltype(t), kD>, grid, kAttentionThreads,
           FwdShared<kD>::kBytes, place, p);
  });
}

}  // namespace llmkern
