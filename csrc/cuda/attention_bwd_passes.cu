// Attention backward in two passes; formulas: attention_bwd.cuh. dK and dV by blocks of keys that
// walk over queries (of all query heads that share them); dQ by blocks of queries that walk over
// keys. S and dP are computed twice, and no result is added to by two blocks. attention_bwd.cu says
// when one pass (attention_bwd_joint.cu) does it all.
#include "attention_bwd.cuh"
#include "attention_cut.cuh"
#include "attention_launch.cuh"

namespace llmkern {
namespace {

// Queries in a tile of the dK, dV kernel: two sums of 64 keys x kD and two score tiles must fit
// into a thread's registers.
template <int kD>
constexpr int kQueries = kD == 64 ? 64 : 32;

template <int kD>
struct KeysShared {
  static constexpr int kFixed = kBlockRows * kD * 2, kTile = kQueries<kD> * kD * 2;
  static constexpr int kK = 0, kV = kFixed;
  static constexpr int kStages = 2 * kFixed, kStage = 2 * kTile;  // Q then dO, two stages
  static constexpr int kRowTerms = kStages + 2 * kStage;          // float2 a query
  static constexpr int kBytes = kRowTerms + 2 * kQueries<kD> * 8;
};

// A place in the walk of the dK, dV kernel: query tiles of each head of the group in turn.
struct Walk {
  Range tiles;
  int tile, head, end_head;
  __device__ bool ended() const { return head == end_head; }
  // Whether the next head begins.
  __device__ bool next() {
    if (++tile < tiles.end) return false;
    tile = tiles.first;
    ++head;
    return true;
  }
};

// Loads Q, dO and the terms of a row for each step of the walk, to two stages in turn.
template <class T, int kD>
struct QueryLoader {
  using Shared = KeysShared<kD>;
  static constexpr int kN = kQueries<kD>;
  RowLoader<T, kD, kN> q, dout;
  Walk at;
  int stage = 0;

  __device__ QueryLoader(const AttentionParams& p, const Walk& start, int batch, uint32_t shared)
      : q(shared + Shared::kStages, slab<T>(p.q, batch, start.head), p.q.row, start.tile * kN,
          p.head_dim),
        dout(shared + Shared::kStages + Shared::kTile, slab<T>(p.dout, batch, start.head),
             p.dout.row, start.tile * kN, p.value_dim),
        at(start) {}

  __device__ void load(const AttentionParams& p, int batch) {
    if (!at.ended()) {
      const int i0 = at.tile * kN;
      q.load(stage * Shared::kStage, i0, p.q_len);
      dout.load(stage * Shared::kStage, i0, p.q_len);
      if (threadIdx.x < kN) {
        auto terms = reinterpret_cast<float2*>(shared_bytes + Shared::kRowTerms) + stage * kN;
        terms[threadIdx.x] = *p.terms.at(batch, p.heads, at.head, i0 + threadIdx.x);
      }
      stage ^= 1;
      if (at.next()) {  // back to the first tile, and on to the next head
        const int64_t back = static_cast<int64_t>(at.tiles.end - at.tiles.first) * kN;
        q.from += (p.q.head - back * p.q.row) * 2;
        dout.from += (p.dout.head - back * p.dout.row) * 2;
      }
    }
    ptx::cp_async_commit_group();
  }
};

// s: S^T of 16 keys and kN queries in, P^T out. dp: dP^T in, dS^T / scale out.
template <int kN, bool kAll>
__device__ inline void differentiate(const float2* terms, float scale_log2, const Band (&band)[2],
                                     float (&s)[kN / 8][4], const float (&dp)[kN / 8][4],
                                     float (&ds)[kN / 8][4]) {
  const int t = threadIdx.x % 4;
#pragma unroll
  for (int j = 0; j < kN / 8; ++j) {
    const float4 pair = *reinterpret_cast<const float4*>(terms + j * 8 + 2 * t);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float lse = e == 0 ? pair.x : pair.z, delta = e == 0 ? pair.y : pair.w;
        const bool sees = kAll || band[half].sees(j * 8 + e);
        float& score = s[j][2 * half + e];
        score = sees ? ptx::ex2_approx_ftz_f32(fmaf(score, scale_log2, lse)) : 0.0f;
        ds[j][2 * half + e] = sees ? score * (dp[j][2 * half + e] + delta) : 0.0f;
      }
    }
  }
}

template <class T, int kD>
__global__ void __launch_bounds__(kAttentionThreads)
    attention_bwd_keys_kernel(const AttentionParams p) {
  using Shared = KeysShared<kD>;
  constexpr int kN = kQueries<kD>;
  const int batch = blockIdx.z, kv_head = blockIdx.y, j0 = blockIdx.x * kBlockRows;
  const int warp = threadIdx.x / kWarp, g = threadIdx.x % kWarp / 4;
  const int key = j0 + warp * kWarpRows + g;  // and key + 8
  const int first_head = kv_head * p.group;
  const uint32_t shared = shared_address(shared_bytes);
  const uint32_t own = warp * kWarpRows * kD * 2;
  const uint8_t* keep =
      p.key_mask == nullptr ? nullptr : p.key_mask + static_cast<int64_t>(batch) * p.kv_len;
  const Lanes<kD> lanes;
  const int j1 = j0 + kBlockRows - 1;
  const Range tiles = query_tiles<kN>(p, j0, min(j1, p.kv_len - 1));
  const int end_head = first_head + (tiles.first < tiles.end ? p.group : 0);
  Walk walk{tiles, tiles.first, first_head, end_head};
  load_rows<T, kD, kBlockRows>(shared + Shared::kK, slab<T>(p.k, batch, kv_head), p.k.row, j0,
                               p.kv_len, p.head_dim, keep);
  load_rows<T, kD, kBlockRows>(shared + Shared::kV, slab<T>(p.v, batch, kv_head), p.v.row, j0,
                               p.kv_len, p.value_dim, keep);
  QueryLoader<T, kD> queries(p, walk, batch, shared);
  queries.load(p, batch);
  bool kept[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int j = key + half * 8;
    kept[half] = j < p.kv_len && (keep == nullptr || keep[j] != 0);
  }
  const float scale_log2 = p.scale * kLog2E;
  float dk[kD / 8][4] = {}, dv[kD / 8][4] = {};
  for (int turn = 0; !walk.ended(); turn ^= 1) {
    const int i0 = walk.tile * kN, head = walk.head;
    const uint32_t stage = Shared::kStages + turn * Shared::kStage;
    const uint32_t q_rows = shared + stage;
    const int i1 = i0 + kN - 1;
    walk.next();
    const bool all = all_see(p, i0, i1, j0, j1);
    // A masked-out key must not meet a NaN of a query or its dO either.
    const bool covered = keep == nullptr && band_covers(p, i0, i1, j0, j1);
    ptx::cp_async_wait_group<0>();
    // This stage is here, and every warp is done with the other one.
    bool plain = true;
    if (covered) {
      __syncthreads();
    } else {
      plain = barrier_all_finite(own_exponents<T, kD, kN>(shared_bytes + stage) |
                                 own_exponents<T, kD, kN>(shared_bytes + stage + Shared::kTile));
    }
    queries.load(p, batch);
    float s[kN / 8][4], dp[kN / 8][4], ds[kN / 8][4];
    multiply_rows<T, kD, kN>(s, shared + Shared::kK + own, q_rows, lanes);
    multiply_rows<T, kD, kN>(dp, shared + Shared::kV + own, q_rows + Shared::kTile, lanes);
    const Band bands[2] = {queries_of(p, key, kept[0], i0), queries_of(p, key + 8, kept[1], i0)};
    const Band band[2] = {bands[0].of_lane(), bands[1].of_lane()};
    const bool drops = p.dropout.threshold != 0;
    QueryDrop<kN> drop;
    if (drops) {
      drop.draw(p, batch * p.heads + head, i0, j0 + warp * kWarpRows);
      drop.apply(dp, p.dropout.scale);
    }
    const auto terms =
        reinterpret_cast<const float2*>(shared_bytes + Shared::kRowTerms) + turn * kN;
    all ? differentiate<kN, true>(terms, scale_log2, band, s, dp, ds)
        : differentiate<kN, false>(terms, scale_log2, band, s, dp, ds);
    if (drops) drop.apply(s, p.dropout.scale);
    accumulate_seen<T, kD, kN>(dv, s, stage + Shared::kTile, lanes, plain, bands);
    accumulate_seen<T, kD, kN>(dk, ds, stage, lanes, plain, bands);
  }
  ptx::cp_async_wait_group<0>();
  __syncthreads();
  const int row = warp * kWarpRows, first = j0 + row;
  if (p.dk.data != nullptr) {
    store_rows<Shared::kK, T, kD>(row, p.dk, batch, kv_head, first, p.kv_len, p.head_dim, dk,
                                  p.scale, p.scale);
  }
  if (p.dv.data != nullptr) {
    store_rows<Shared::kV, T, kD>(row, p.dv, batch, kv_head, first, p.kv_len, p.value_dim, dv, 1.0f,
                                  1.0f);
  }
}

constexpr int kKeys = 64;

template <int kD>
struct QueriesShared {
  static constexpr int kFixed = kBlockRows * kD * 2, kTile = kKeys * kD * 2;
  static constexpr int kQ = 0, kDout = kFixed;
  static constexpr int kStages = 2 * kFixed, kStage = 2 * kTile;  // K then V
  static constexpr int kBytes = kStages + 2 * kStage;
};

// ds of 16 queries and 64 keys, over dp.
template <bool kAll>
__device__ inline void differentiate_keys(const AttentionParams& p, int batch, int j0,
                                          const Band (&bands)[2], const float (&lse)[2],
                                          const float (&delta)[2], const float (&s)[kKeys / 8][4],
                                          float (&dp)[kKeys / 8][4]) {
  const bool masked = !kAll && p.key_mask != nullptr;
  const uint64_t kept = masked ? kept_keys(p, batch, j0) : ~UINT64_C(0);
  const float scale_log2 = p.scale * kLog2E;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const Band band = bands[half].of_lane();
#pragma unroll
    for (int j = 0; j < kKeys / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const bool sees = kAll || (band.sees(j * 8 + e) && (kept >> (j * 8 + e) & 1));
        float& d = dp[j][2 * half + e];
        const float prob = ptx::ex2_approx_ftz_f32(fmaf(s[j][2 * half + e], scale_log2, lse[half]));
        d = sees ? prob * (d + delta[half]) : 0.0f;
      }
    }
  }
}

template <class T, int kD>
__global__ void __launch_bounds__(kAttentionThreads)
    attention_bwd_queries_kernel(const AttentionParams p) {
  using Shared = QueriesShared<kD>;
  const int batch = blockIdx.z, head = blockIdx.y;
  const int i0 = (gridDim.x - 1 - blockIdx.x) * kBlockRows;
  const int warp = threadIdx.x / kWarp, g = threadIdx.x % kWarp / 4;
  const int row0 = i0 + warp * kWarpRows;
  const uint32_t shared = shared_address(shared_bytes);
  const uint32_t own = warp * kWarpRows * kD * 2;
  const T* k = slab<T>(p.k, batch, head / p.group);
  const T* v = slab<T>(p.v, batch, head / p.group);
  const uint8_t* keep =
      p.key_mask == nullptr ? nullptr : p.key_mask + static_cast<int64_t>(batch) * p.kv_len;
  const Lanes<kD> lanes;
  const int i1 = i0 + kBlockRows - 1;
  const Range tiles = key_tiles<kKeys>(p, i0, min(i1, p.q_len - 1));
  const Range whole_tiles = whole_key_tiles<kKeys>(p, i0, i1);
  const int j_first = tiles.first * kKeys;
  RowLoader<T, kD, kKeys> k_rows(shared + Shared::kStages, k, p.k.row, j_first, p.head_dim);
  RowLoader<T, kD, kKeys> v_rows(shared + Shared::kStages + Shared::kTile, v, p.v.row, j_first,
                                 p.value_dim);
  const auto load = [&](int tile) {
    if (tile < tiles.end) {
      const uint32_t stage = tile % 2 * Shared::kStage;
      k_rows.load(stage, tile * kKeys, p.kv_len, keep);
      v_rows.load(stage, tile * kKeys, p.kv_len, keep);
    }
    ptx::cp_async_commit_group();
  };
  load_rows<T, kD, kBlockRows>(shared + Shared::kQ, slab<T>(p.q, batch, head), p.q.row, i0, p.q_len,
                               p.head_dim);
  load_rows<T, kD, kBlockRows>(shared + Shared::kDout, slab<T>(p.dout, batch, head), p.dout.row, i0,
                               p.q_len, p.value_dim);
  load(tiles.first);
  float lse[2], delta[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float2 terms = *p.terms.at(batch, p.heads, head, row0 + g + half * 8);
    lse[half] = terms.x;
    delta[half] = terms.y;
  }
  float dq[kD / 8][4] = {};
  for (int tile = tiles.first; tile < tiles.end; ++tile) {
    const int j0 = tile * kKeys;
    const uint32_t stage = Shared::kStages + tile % 2 * Shared::kStage;
    const uint32_t k_tile = shared + stage;
    const bool whole = whole_tiles.has(tile);
    ptx::cp_async_wait_group<0>();
    // This stage is here, and every warp is done with the other one.
    bool plain = true;
    if (whole || band_covers(p, i0, i1, j0, j0 + kKeys - 1)) {
      __syncthreads();
    } else {
      plain = barrier_all_finite(own_exponents<T, kD, kKeys>(shared_bytes + stage));
    }
    load(tile + 1);
    float s[kKeys / 8][4], dp[kKeys / 8][4];
    multiply_rows<T, kD, kKeys>(s, shared + Shared::kQ + own, k_tile, lanes);
    multiply_rows<T, kD, kKeys>(dp, shared + Shared::kDout + own, k_tile + Shared::kTile, lanes);
    if (p.dropout.threshold != 0) {
      drop_keys<kKeys>(p, batch * p.heads + head, row0, j0, dp, p.dropout.scale);
    }
    const Band bands[2] = {keys_of(p, row0 + g, j0), keys_of(p, row0 + g + 8, j0)};
    whole ? differentiate_keys<true>(p, batch, j0, bands, lse, delta, s, dp)
          : differentiate_keys<false>(p, batch, j0, bands, lse, delta, s, dp);
    accumulate_seen<T, kD, kKeys>(dq, dp, stage, lanes, plain, bands);
  }
  ptx::cp_async_wait_group<0>();
  __syncthreads();
  store_rows<Shared::kQ, T, kD>(warp * kWarpRows, p.dq, batch, head, row0, p.q_len, p.head_dim, dq,
                                p.scale, p.scale);
}

}  // namespace

void attention_bwd_keys(const AttentionShape& s, const AttentionParams& p, const Place& place) {
  dispatch_attention(s, [&](auto t, auto d) {
    constexpr int kD = d.value;
    const dim3 keys(ceil_div(p.kv_len, kBlockRows), s.kv_heads, s.batch);
    launch("attention_bwd_keys", attention_bwd_keys_kernel<decltype(t), kD>, keys,
           kAttentionThreads, KeysShared<kD>::kBytes, place, p);
  });
}

void attention_bwd_queries(const AttentionShape& s, const AttentionParams& p, const Place& place) {
  dispatch_attention(s, [&](auto t, auto d) {
    constexpr int kD = d.value;
    const dim3 queries(ceil_div(p.q_len, kBlockRows), p.heads, s.batch);
    launch("attention_bwd_queries", attention_bwd_queries_kernel<decltype(t), kD>, queries,
           kAttentionThreads, QueriesShared<kD>::kBytes, place, p);
  });
}

}  // namespace llmkern
