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

// Weights are 2^(score - base), scores times log2 e. A row's base follows its maximum only when
// that has grown by more than 2^kSlack: the weights stay far below the largest float16, and most
// tiles spare the sums so far their new scale.
constexpr float kSlack = 8.0f;
constexpr float kNoBase = -1.5e38f;  // below any score, and finite: hidden scores are -inf

// Running base and sum of a lane's two rows.
struct Softmax {
  float base[2] = {kNoBase, kNoBase};
  float sum[2] = {0.0f, 0.0f};  // of this lane's columns

  // s becomes the weights; sums so far and `out` shrink to the new base.
  template <int kBlocks>
  __device__ void update(float (&s)[kKeys / 8][4], float (&out)[kBlocks][4], float scale_log2) {
    float shrink[2];
    bool grown[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float most = fmaxf(s[0][2 * half], s[0][2 * half + 1]);
#pragma unroll
      for (int j = 1; j < kKeys / 8; ++j) {
        most = fmaxf(most, fmaxf(s[j][2 * half], s[j][2 * half + 1]));
      }
      most = fmaxf(most, ptx::shfl_sync_bfly<1>(most));
      most = fmaxf(most, ptx::shfl_sync_bfly<2>(most)) * scale_log2;
      grown[half] = most > base[half] + kSlack;
      const float next = grown[half] ? most : base[half];
      shrink[half] = ptx::ex2_approx_ftz_f32(base[half] - next);
      base[half] = next;
    }
    if (__any_sync(kAllLanes, grown[0] || grown[1])) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        sum[half] *= shrink[half];
#pragma unroll
        for (int j = 0; j < kBlocks; ++j) {
          out[j][2 * half] *= shrink[half];
          out[j][2 * half + 1] *= shrink[half];
        }
      }
    }
#pragma unroll
    for (int j = 0; j < kKeys / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        s[j][e] = ptx::ex2_approx_ftz_f32(fmaf(s[j][e], scale_log2, -base[e / 2]));
        sum[e / 2] += s[j][e];
      }
    }
  }
};

// Scores of the pairs that f(half, column) rejects become -inf.
template <class F>
__device__ inline void hide_unless(float (&s)[kKeys / 8][4], F&& f) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int j = 0; j < kKeys / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        if (!f(half, j * 8 + e)) s[j][2 * half + e] = -INFINITY;
      }
    }
  }
}

__device__ inline void hide(const AttentionParams& p, int batch, int j0, const Band (&bands)[2],
                            float (&s)[kKeys / 8][4]) {
  const Band band[2] = {bands[0].of_lane(), bands[1].of_lane()};
  // Under a causal mask alone every row begins before the tile.
  if (__all_sync(kAllLanes, bands[0].low <= 0 && bands[1].low <= 0)) {
    hide_unless(s, [&](int half, int c) { return band[half].ends_after(c); });
  } else {
    hide_unless(s, [&](int half, int c) { return band[half].sees(c); });
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
  const int i1 = i0 + kBlockRows - 1;
  const Range tiles = key_tiles<kKeys>(p, i0, min(i1, p.q_len - 1));
  const Range whole_tiles = whole_key_tiles<kKeys>(p, i0, i1);
  using Loader = RowLoader<T, kD, kKeys>;
  const int j_first = tiles.first * kKeys;
  Loader k_rows(shared + Shared::kK, k, p.k.row, j_first, p.head_dim);
  Loader v_rows(shared + Shared::kV, v, p.v.row, j_first, p.value_dim);
  const int end_whole = keep == nullptr ? min(tiles.end, p.kv_len / kKeys) : 0;
  const auto load = [&](Loader& rows, int tile, uint32_t stage) {
    if (tile < end_whole) {
      rows.load_whole(stage);
    } else if (tile < tiles.end) {
      rows.load(stage, tile * kKeys, p.kv_len, keep);
    }
    ptx::cp_async_commit_group();
  };
  load_rows<T, kD, kBlockRows>(shared + Shared::kQ, q, p.q.row, i0, p.q_len, p.head_dim);
  ptx::cp_async_commit_group();
  load(k_rows, tiles.first, 0);
  load(v_rows, tiles.first, 0);
  const float scale_log2 = p.scale * kLog2E;
  Softmax softmax;
  float out[kD / 8][4] = {};
  uint32_t q_fragments[kD / 16][4];
  ptx::cp_async_wait_group<2>();
  __syncthreads();
  load_fragments<kD>(q_fragments, q_rows, lanes);
  uint32_t stage = 0;
  for (int tile = tiles.first; tile < tiles.end; ++tile, stage ^= Shared::kTile) {
    const int j0 = tile * kKeys;
    float s[kKeys / 8][4];
    ptx::cp_async_wait_group<1>();  // K of this tile is here, V may be under way
    __syncthreads();
    load(k_rows, tile + 1, stage ^ Shared::kTile);
    multiply_fragments<T, kD, kKeys>(s, q_fragments, shared + Shared::kK + stage, lanes);
    const bool whole = whole_tiles.has(tile);
    Band bands[2];
    if (!whole) {
      bands[0] = keys_of(p, row0 + g, j0);
      bands[1] = keys_of(p, row0 + g + 8, j0);
      hide(p, batch, j0, bands, s);
    }
    softmax.update(s, out, scale_log2);
    if (p.dropout.threshold != 0) {
      drop_keys<kKeys>(p, batch * p.heads + head, row0, j0, s, 1.0f);
    }
    ptx::cp_async_wait_group<1>();
    const uint32_t v_tile = Shared::kV + stage;
    bool plain = true;
    if (whole) {
      __syncthreads();
    } else {
      plain = band_covers(p, i0, i1, j0, j0 + kKeys - 1);
      plain |= barrier_all_finite(plain ? 0 : own_exponents<T, kD, kKeys>(shared_bytes + v_tile));
    }
    load(v_rows, tile + 1, stage ^ Shared::kTile);
    accumulate_seen<T, kD, kKeys>(out, s, v_tile, lanes, plain, bands);
  }
  ptx::cp_async_wait_group<0>();
  __syncthreads();
  float scale[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float sum = softmax.sum[half];
    sum += ptx::shfl_sync_bfly<1>(sum);
    sum += ptx::shfl_sync_bfly<2>(sum);
    scale[half] = sum == 0.0f ? 0.0f : p.dropout.scale / sum;
    const int row = row0 + g + half * 8;
    if (threadIdx.x % 4 == 0 && row < p.q_len) {
      p.lse[(static_cast<int64_t>(batch) * p.heads + head) * p.q_len + row] =
          sum == 0.0f ? -INFINITY : softmax.base[half] * kLn2 + __logf(sum);
    }
  }
  store_rows<Shared::kQ, T, kD>(warp * kWarpRows, p.out, batch, head, row0, p.q_len, p.value_dim,
                                out, scale[0], scale[1]);
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
