// The sums of attention's backward in one pass: dK and dV of a warp's keys, in registers, and 32 x
// 32 of dQ, in memory.
#pragma once

#include "attention_joint.cuh"

namespace llmkern {

// What a block knows of its keys.
template <class J>
struct Keys {
  int batch, kv_head, block, j0;
  int own;        // this warp's first key, as a row of the tile
  uint32_t kept;  // bit 2 i + half: that key of this lane exists and is not masked out; kAll

  static constexpr uint32_t kAll = 1u << 31;  // all keys of the warp

  __device__ Keys(const AttentionParams& p, uint32_t ticket) {
    const uint32_t blocks = (p.kv_len + J::kKeys - 1) / J::kKeys;
    const uint32_t unit = ticket / blocks, kv_heads = p.heads / p.group;
    block = ticket % blocks;
    batch = unit / kv_heads;
    kv_head = unit % kv_heads;
    j0 = block * J::kKeys;
    own = threadIdx.x / kWarp * J::kWarpKeys;
    kept = 0;
#pragma unroll
    for (int i = 0; i < 2 * J::kTiles; ++i) {
      const int j = key(i);
      kept |= (j < p.kv_len && (mask(p) == nullptr || mask(p)[j] != 0) ? 1u : 0u) << i;
    }
    if (__all_sync(kAllLanes, kept == (1u << 2 * J::kTiles) - 1)) kept |= kAll;
  }

  // i: 2 * tile + half.
  __device__ int key(int i) const { return j0 + own + i * 8 + threadIdx.x % kWarp / 4; }
  __device__ bool keeps(int i) const { return kept >> i & 1; }
  __device__ const uint8_t* mask(const AttentionParams& p) const {
    return p.key_mask == nullptr ? nullptr : p.key_mask + static_cast<int64_t>(batch) * p.kv_len;
  }
  // Tiles of queries, all of which exist, where the band hides none of these keys.
  __device__ Range whole_tiles(const AttentionParams& p) const {
    const int low = max(j0 + J::kKeys - 1 - p.shift - p.right, 0);
    const int high = min(j0 - p.shift + p.left, p.q_len - 1);
    return {(low + J::kQueries - 1) / J::kQueries, (high + 1) / J::kQueries};
  }
  // Whether queries up to i1 see no key of a later block.
  __device__ bool are_last(const AttentionParams& p, int i1) const {
    return min(i1 + p.shift + p.right, p.kv_len - 1) < j0 + J::kKeys;
  }
  // The warps that have a key which one of the queries i0 .. i0 + 31 sees.
  __device__ Range warps(const AttentionParams& p, int i0) const {
    const int i1 = min(i0 + kGroup, p.q_len) - 1;
    if (i0 > i1) return {0, 0};
    return tiles_of<J::kWarpKeys>(i0 + p.shift - p.left - j0, i1 + p.shift + p.right - j0,
                                  min(p.kv_len - j0, J::kKeys));
  }
};

// A tile of queries of a head; `row` counts rows of AttentionParams::terms.
struct QueryTile {
  int tile, head;
  int64_t row;
};

// This warp's 32 queries x kCols columns of dQ.
template <class T, class J>
struct QuerySums {
  static constexpr int kBlocks = J::kCols / 8;
  using Sum = float[2][kBlocks][4];  // [queries / 16][columns / 8]
  int group, part;
  uint32_t ds, k;  // a lane's ldmatrix rows: of 16 queries of dS, 16 columns of K
  uint32_t own;    // bytes, in memory

  __device__ QuerySums(uint32_t shared, const Lanes<J::kD>& lanes) {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    group = warp / J::kParts;
    part = warp % J::kParts;
    ds = shared + J::kDs + group * J::kDsGroup + ds_offset(lane / 16 * 8 + lane % 8, lane / 8 % 2);
    k = shared + J::kK + (lanes.b_trans ^ (part * J::kCols * 2));
    ptx::keep(ds);
    ptx::keep(k);
    own = (warp * 2 * kBlocks * kWarp + lane) * 16;
    ptx::keep(own);
  }

  // sum += dS K of 16 keys, `kStep` times 16 keys and `row` after the first.
  template <int kStep>
  __device__ void multiply(Sum& sum, int row) const {
    uint32_t a[2][4], b[kBlocks / 2][4];
    static_for<2>([&](auto i) {
      ptx::ldmatrix_x4_trans<kStep * 16 * kGroup * 2>(a[i.value],
                                                      (ds ^ (i.value * 32)) + row * kGroup * 2);
    });
    static_for<kBlocks / 2>([&](auto i) {
      ptx::ldmatrix_x4_trans<kStep * 16 * J::kRow>(b[i.value],
                                                   (k ^ (i.value * 32)) + row * J::kRow);
    });
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int j = 0; j < kBlocks; ++j) {
        attention_mma(sum[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1], T{});
      }
    }
  }

  // Of the keys of some warps: dS of the others was not written.
  __device__ void multiply_some(Sum& sum, const Range& warps) const {
#pragma unroll 1
    for (int row = warps.first * J::kWarpKeys; row < warps.end * J::kWarpKeys;
         row += J::kWarpKeys) {
      static_for<J::kTiles>([&](auto step) { multiply<step.value>(sum, row); });
    }
  }

  // The query of row g + 8 half of 16, relative to the tile.
  __device__ int query(int i, int half) const {
    return group * kGroup + ds_query(2 * i + half, threadIdx.x % kWarp / 4);
  }

  // Key by key, where K holds a NaN or Inf that not all queries see.
  __device__ void multiply_seen(Sum& sum, const AttentionParams& p, int i0, int j0,
                                const Range& warps) const {
    const int g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
    Band band[2][2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) band[i][half] = keys_of(p, i0 + query(i, half), j0);
    }
#pragma unroll 1
    for (int c = warps.first * J::kWarpKeys; c < warps.end * J::kWarpKeys; ++c) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          if (!band[i][half].sees(c)) continue;
          const T weight = *reinterpret_cast<const T*>(shared_bytes + J::kDs + group * J::kDsGroup +
                                                       ds_offset(c, 2 * i + half) + g * 2);
#pragma unroll
          for (int j = 0; j < kBlocks; ++j) {
            const uint32_t pair = *reinterpret_cast<const uint32_t*>(
                shared_bytes + J::kK + row_offset<J::kD>(c, part * kBlocks + j) + t * 4);
            float(&to)[4] = sum[i][j];
            to[2 * half] = add_weighted(to[2 * half], to_float(weight), low_half(pair, T{}));
            to[2 * half + 1] =
                add_weighted(to[2 * half + 1], to_float(weight), high_half(pair, T{}));
          }
        }
      }
    }
  }

  // Adds the keys of a block to what those before it, if any, left in memory.
  template <bool kFirst>
  __device__ void add(const AttentionParams& p, const Keys<J>& keys, const QueryTile& at,
                      bool whole, bool k_finite, bool last) const {
    const int i0 = at.tile * J::kQueries;
    Sum sum = {};
    // 16 bytes a lane, then those of the next fragment.
    auto memory = reinterpret_cast<float4*>(reinterpret_cast<uint8_t*>(p.sums.dq) +
                                            at.row * (J::kD * 4) + own);
    if (!kFirst) {
#pragma unroll
      for (int i = 0; i < 2 * kBlocks; ++i) {
        const float4 before = memory[i * kWarp];
        float(&to)[4] = sum[i / kBlocks][i % kBlocks];
        to[0] = before.x, to[1] = before.y, to[2] = before.z, to[3] = before.w;
      }
    }
    if (whole) {
      static_for<J::kKeys / 16>([&](auto step) { multiply<step.value>(sum, 0); });
    } else {
      const Range warps = keys.warps(p, i0 + group * kGroup);
      if (k_finite) {
        multiply_some(sum, warps);
      } else {
        multiply_seen(sum, p, i0, keys.j0, warps);
      }
    }
    if (last) return store(p, keys.batch, at.head, i0, sum);
#pragma unroll
    for (int i = 0; i < 2 * kBlocks; ++i) {
      const float(&of)[4] = sum[i / kBlocks][i % kBlocks];
      memory[i * kWarp] = make_float4(of[0], of[1], of[2], of[3]);
    }
  }

  // A place in this warp's part of dQ where dS was: rows of kCols, 16 bytes at a time. Both one
  // unit of eight rows and the units of the rows of a line of 128 bytes lie in distinct bank
  // groups.
  __device__ int scratch(int row, int unit) const {
    constexpr int kLine = 8 / kBlocks;  // rows
    return threadIdx.x / kWarp * (kGroup * J::kCols * 2) + row / kLine * 128 +
           (row % kLine * kBlocks + (unit ^ (row / kLine % kBlocks))) * 16;
  }

  // All warps are done with dS when they are here.
  __device__ void store(const AttentionParams& p, int batch, int head, int i0,
                        const Sum& sum) const {
    static_assert(kGroup * J::kCols * 2 * J::kWarps <= J::kDsBytes, "the scratch of all warps");
    const int lane = threadIdx.x % kWarp;
    __syncthreads();
#pragma unroll
    for (int j = 0; j < kBlocks; ++j) {
      uint8_t* to = shared_bytes + J::kDs + scratch(lane / 4, j) + lane % 4 * 4;
#pragma unroll
      for (int i = 0; i < 4; ++i) {  // rows of 16 i / 2: 8 rows on, the swizzle is the same
        const float(&of)[4] = sum[i / 2][j];
        *reinterpret_cast<uint32_t*>(to + i * 8 * J::kCols * 2) =
            pack_pair(of[i % 2 * 2] * p.scale, of[i % 2 * 2 + 1] * p.scale, T{});
      }
    }
    __syncwarp();
    constexpr int kRows = kWarp / kBlocks;  // at a time
    const int unit = lane % kBlocks, col = part * J::kCols + unit * 8;
    const uint8_t* from = shared_bytes + J::kDs + scratch(lane / kBlocks, unit);
    T* dq = const_cast<T*>(slab<T>(p.dq, batch, head)) + col;
#pragma unroll
    for (int i = 0; i < kGroup / kRows; ++i) {
      const int m = lane / kBlocks + i * kRows;  // 8 u + g, of a unit u and a place in it
      const int row = i0 + group * kGroup + ds_query(m / 8, m % 8);
      if (row < p.q_len && col < p.head_dim) {
        *reinterpret_cast<uint4*>(dq + row * p.dq.row) =
            *reinterpret_cast<const uint4*>(from + i * kRows * J::kCols * 2);
      }
    }
  }
};

// This warp's part of dK and dV of a group of 32 queries; leaves dS in shared memory.
template <class T, class J>
struct KeySums {
  static constexpr int kTiles = J::kTiles;
  float dk[kTiles][J::kD / 8][4] = {}, dv[kTiles][J::kD / 8][4] = {};
  float scale_log2;
  uint32_t kv, q;      // a lane's ldmatrix rows: of the keys, and of the first group of queries
  uint32_t ds, terms;  // bytes; of the first group

  __device__ KeySums(const AttentionParams& p, uint32_t shared, int own, const Lanes<J::kD>& lanes)
      : scale_log2(p.scale * kLog2E),
        kv(shared + own * J::kRow + lanes.a),
        q(shared + J::kQ + lanes.a),
        ds(J::kDs + ds_offset(own + threadIdx.x % kWarp / 4, threadIdx.x % 4)),
        terms(J::kTerms + threadIdx.x % 4 * 16) {
    ptx::keep(kv);
    ptx::keep(q);
    ptx::keep(ds);
    ptx::keep(terms);
  }

  // Queries `first` .. + 31 of a tile that starts at `start`, at `stage` rows of the stages. whole:
  // all of them exist and see these keys, but for those that are masked out; plain: no NaN or Inf
  // in them.
  __device__ void add(const AttentionParams& p, const Keys<J>& keys, int head, int start, int first,
                      uint32_t stage, bool whole, bool plain) {
    constexpr int kBlocks = kGroup / 8;
    constexpr int kPart = kTiles == 2 ? kBlocks / 2 : kBlocks;  // registers are short
    const int i0 = start + first;
    const uint32_t row = stage + first;
    const int i1 = i0 + kGroup - 1, j0 = keys.j0 + keys.own, j1 = j0 + J::kWarpKeys - 1;
    const bool all = whole || (i1 < p.q_len && band_covers(p, i0, i1, j0, j1));
    const bool drops = p.dropout.threshold != 0;
    const uint8_t* own_terms = shared_bytes + terms + row * 8;
    const Columns keys_at(kv), queries(q + row * J::kRow);
    const bool masks = !all || (keys.kept & Keys<J>::kAll) == 0;
    const auto band = [&](int i) { return queries_of(p, keys.key(i), keys.keeps(i), i0); };
    QueryDrop<kGroup> drop[kTiles];
    if (drops) {
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        drop[i].draw(p, keys.batch * p.heads + head, i0, j0 + i * kWarpRows);
      }
    }
    float s[kTiles][kBlocks][4] = {};
    multiply_group<T, J, J::kK, 0>(s, keys_at, queries);
    const Terms<0, kBlocks> lse(own_terms);
    each_score<kTiles, kBlocks>([&](int i, int j, int e) {
      s[i][j][e] = ptx::ex2_approx_ftz_f32(fmaf(s[i][j][e], scale_log2, lse(j, e)));
    });
    if (masks) hide_unseen<0>(s, band);
    Weights<kTiles> weights, ds_weights;
    static_for<kBlocks / kPart>([&](auto part) {
      constexpr int kFirst = part.value * kPart;
      float dp[kTiles][kPart][4];
      const Terms<1, kPart> delta(own_terms + kFirst * 64);
      each_score<kTiles, kPart>([&](int i, int j, int e) { dp[i][j][e] = delta(j, e); });
      multiply_group<T, J, J::kV, J::kDout - J::kQ + kFirst * 8 * J::kRow>(dp, keys_at, queries);
      if (drops) {  // delta is not dropped
        each_score<kTiles, kPart>([&](int i, int j, int e) { dp[i][j][e] -= delta(j, e); });
#pragma unroll
        for (int i = 0; i < kTiles; ++i) {
          drop[i].template apply<kFirst>(dp[i], p.dropout.scale);
        }
        each_score<kTiles, kPart>([&](int i, int j, int e) { dp[i][j][e] += delta(j, e); });
      }
      each_score<kTiles, kPart>([&](int i, int j, int e) { dp[i][j][e] *= s[i][kFirst + j][e]; });
      if (masks) hide_unseen<kFirst>(dp, band);
      pack_weights<T, kFirst>(ds_weights, dp);
    });
    if (drops) {
#pragma unroll
      for (int i = 0; i < kTiles; ++i) drop[i].apply(s[i], p.dropout.scale);
    }
    pack_weights<T, 0>(weights, s);
    store_ds(ds_weights, first);
    if (all || plain) {
      accumulate_group<T, J, J::kDout - J::kQ>(dv, weights, queries);
      accumulate_group<T, J, 0>(dk, ds_weights, queries);
    } else {
      const uint8_t* rows = shared_bytes + J::kQ + row * J::kRow;
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        const Band bands[2] = {band(2 * i), band(2 * i + 1)};
        accumulate_seen_pairs<T, J::kD>(dv[i], weights[i], rows + J::kDout - J::kQ, bands);
        accumulate_seen_pairs<T, J::kD>(dk[i], ds_weights[i], rows, bands);
      }
    }
  }

  // Of blocks of eight queries from block kFirst on, 0 where a key is hidden. band(i): see
  // Keys::key.
  template <int kFirst, int kBlocks, class F>
  __device__ static void hide_unseen(float (&v)[kTiles][kBlocks][4], F&& band) {
#pragma unroll
    for (int i = 0; i < 2 * kTiles; ++i) {
      const Band own = band(i).of_lane();
#pragma unroll
      for (int at = 0; at < 2 * kBlocks; ++at) {
        const int j = at / 2, e = at % 2;
        if (!own.sees((kFirst + j) * 8 + e)) v[i / 2][j][i % 2 * 2 + e] = 0.0f;
      }
    }
  }

  __device__ void store_ds(const Weights<kTiles>& of, int row) const {
    uint8_t* to = shared_bytes + ds + row * (J::kKeys * 2);
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t(&w)[2][4] = of[i];
        *reinterpret_cast<uint4*>(to + (i * 2 + half) * 8 * kGroup * 2) =
            make_uint4(w[0][half], w[0][2 + half], w[1][half], w[1][2 + half]);
      }
    }
  }

  __device__ void store(const AttentionParams& p, const Keys<J>& keys) {
    if (keys.mask(p) != nullptr) {  // a NaN of a query reached the rows of masked-out keys too
#pragma unroll
      for (int i = 0; i < kTiles * J::kD / 2; ++i) {
        const int tile = i / (J::kD / 2), e = i % (J::kD / 2);
        if (keys.keeps(2 * tile + e / 2 % 2)) continue;
        dk[tile][e / 4][e % 4] = dv[tile][e / 4][e % 4] = 0.0f;
      }
    }
    const RowStore<T, J::kD> rows(keys.own);
    const auto each = [&](auto offset, const Rows& to, int dim,
                          const float(&sum)[kTiles][J::kD / 8][4], float scale) {
      if (to.data == nullptr) return;
      static_for<kTiles>([&](auto i) {
        rows.template put<offset.value + i.value * kWarpRows * J::kRow>(sum[i.value], scale, scale);
      });
      __syncwarp();
      rows.template copy<offset.value, J::kWarpKeys>(to, keys.batch, keys.kv_head,
                                                     keys.j0 + keys.own, p.kv_len, dim);
    };
    each(std::integral_constant<int, J::kK>{}, p.dk, p.head_dim, dk, p.scale);
    each(std::integral_constant<int, J::kV>{}, p.dv, p.value_dim, dv, 1.0f);
  }
};

}  // namespace llmkern
