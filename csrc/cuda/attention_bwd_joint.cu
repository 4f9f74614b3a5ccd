// Attention backward in one pass; formulas: attention_bwd.cuh. A block owns kKeys keys and walks
// over the queries that see them, of all query heads that share them: dK and dV stay in registers,
// and dS K is added to float sums of dQ in memory, where the blocks of keys take turns.
//
// A lock counts, for each tile of queries, the blocks of keys that have been added. They are added
// in the order of the keys, so the result is the same each time. The first one stores, the last one
// writes dQ. A block waits for blocks of fewer keys of its own unit (batch, kv head) alone, and it
// takes its place by a ticket when it starts: those that it waits for are running or done, whatever
// order the hardware starts blocks in. Tiles are walked from the last to the first, so that under a
// causal mask blocks of keys can start together and end one after the other.
#include "attention_bwd.cuh"
#include "attention_cut.cuh"
#include "attention_launch.cuh"

namespace llmkern {
namespace {

constexpr int kWarps = kAttentionThreads / kWarp;
constexpr int kGroup = 32;  // queries whose scores are in registers at a time

template <int kD>
struct Joint {
  static constexpr int kTiles = kD == 64 ? 2 : 1;   // of 16 keys, for each warp
  static constexpr int kGroups = kD == 64 ? 2 : 1;  // in a tile of queries
  static constexpr int kQueries = kGroup * kGroups;
  static constexpr int kWarpKeys = kWarpRows * kTiles, kKeys = kWarpKeys * kWarps;
  static constexpr int kParts = kD / 32;  // of the columns of dQ, for the warps of one group
  static_assert(kParts * kGroups == kWarps, "a warp computes 32 x 32 of dQ");
  static constexpr int kRow = kD * 2;
  static constexpr int kTile = kQueries * kRow;
  static constexpr int kK = 0, kV = kKeys * kRow;
  static constexpr int kQ = 2 * kV, kDout = kQ + 2 * kTile;  // two stages each
  static constexpr int kDs = kDout + 2 * kTile;              // [kGroups][kKeys] rows of 64 bytes
  static constexpr int kDsGroup = kKeys * kGroup * 2;
  static constexpr int kTerms = kDs + kGroups * kDsGroup;  // float2 a query, two stages
  static constexpr int kTermsTile = kQueries * 8;
  static constexpr int kTicket = kTerms + 2 * kTermsTile;
  static constexpr int kBytes = kTicket + 16;
};

// Where unit u of row `key` of dS stands: two rows share a line of 128 bytes, so that both the four
// units of two rows and one unit of eight rows lie in distinct bank groups. Unit u of a row holds
// queries 8 i + 2 u + e at 2 i + e: what lane u of a quad has of it.
__device__ inline int ds_offset(int key, int unit) {
  return key / 2 * 128 + (key % 2 * 4 + (unit ^ (key / 2 % 4))) * 16;
}
__device__ inline int ds_query(int unit, int at) { return at / 2 * 8 + unit * 2 + at % 2; }

// A lane's ldmatrix rows of a tile of kD columns: at[i] for columns 16 i .. and, 128 bytes on,
// 16 (i + 4) ..
struct Columns {
  uint32_t at[4];

  __device__ Columns(uint32_t tile, uint32_t lane) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      at[i] = tile + (lane ^ (i * 32));
      ptx::keep(at[i]);
    }
  }
  __device__ void advance(uint32_t by) {
#pragma unroll
    for (int i = 0; i < 4; ++i) at[i] += by;
  }
};

template <int kStep>
constexpr int kColumnBytes = kStep / 4 * 128;

// A place in the walk over tiles of queries, of each head of the group in turn.
struct Walk {
  Range tiles;
  int tile, head, end_head;
  __device__ bool ended() const { return head == end_head; }
  // Whether the next head begins.
  __device__ bool next() {
    if (--tile >= tiles.first) return false;
    tile = tiles.end - 1;
    ++head;
    return true;
  }
};

// Loads Q, dO and the terms of the queries for each step of the walk, to two stages in turn.
template <class T, int kD>
struct JointLoader {
  using J = Joint<kD>;
  RowLoader<T, kD, J::kQueries> q, dout;
  Walk at;
  int stage = 0;

  __device__ JointLoader(const AttentionParams& p, const Walk& start, int batch, uint32_t shared)
      : q(shared + J::kQ, slab<T>(p.q, batch, start.head), p.q.row, start.tile * J::kQueries,
          p.head_dim),
        dout(shared + J::kDout, slab<T>(p.dout, batch, start.head), p.dout.row,
             start.tile * J::kQueries, p.value_dim),
        at(start) {}

  __device__ void load(const AttentionParams& p, int batch, uint32_t shared) {
    if (!at.ended()) {
      const int i0 = at.tile * J::kQueries;
      q.load(stage * J::kTile, i0, p.q_len);
      dout.load(stage * J::kTile, i0, p.q_len);
      if (threadIdx.x < J::kTermsTile / 16) {
        const float2* terms = p.terms.at(batch, p.heads, at.head, i0);
        ptx::cp_async_cg_16(shared + J::kTerms + stage * J::kTermsTile + threadIdx.x * 16,
                            ptx::global_address(terms) + threadIdx.x * 16, 16);
      }
      stage ^= 1;
      const bool next_head = at.next();
      const int64_t rows = (at.tile - i0 / J::kQueries - 1) * J::kQueries;
      q.from += (rows * p.q.row + (next_head ? p.q.head : 0)) * 2;
      dout.from += (rows * p.dout.row + (next_head ? p.dout.head : 0)) * 2;
    }
    ptx::cp_async_commit_group();
  }
};

// s [keys of the warp][32 queries] += a b^T.
template <class T, int kD, int kOffset>
__device__ inline void multiply_group(float (&s)[Joint<kD>::kTiles][kGroup / 8][4],
                                      const Columns& a, const Columns& b) {
  using J = Joint<kD>;
  static_for<kD / 16>([&](auto step) {
    constexpr int kAt = kColumnBytes<step.value>;
    uint32_t x[J::kTiles][4], y[2][4];
    static_for<J::kTiles>([&](auto i) {
      ptx::ldmatrix_x4<(kOffset == 0 ? J::kK : J::kV) + kAt + i.value * 16 * J::kRow>(
          x[i.value], a.at[step.value % 4]);
    });
    static_for<2>([&](auto j) {
      ptx::ldmatrix_x4<kOffset + kAt + j.value * 16 * J::kRow>(y[j.value], b.at[step.value % 4]);
    });
#pragma unroll
    for (int i = 0; i < J::kTiles; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        attention_mma(s[i][j], x[i], y[j / 2][j % 2 * 2], y[j / 2][j % 2 * 2 + 1], T{});
      }
    }
  });
}

// Weights of the warp's keys for 32 queries, as mma takes them: [keys][queries / 16][4].
template <int kTiles>
using Weights = uint32_t[kTiles][2][4];

template <class T, int kTiles>
__device__ inline void pack_weights(Weights<kTiles>& w, const float (&s)[kTiles][kGroup / 8][4]) {
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
#pragma unroll
    for (int j = 0; j < kGroup / 8; ++j) {
      w[i][j / 2][j % 2 * 2] = pack_pair(s[i][j][0], s[i][j][1], T{});
      w[i][j / 2][j % 2 * 2 + 1] = pack_pair(s[i][j][2], s[i][j][3], T{});
    }
  }
}

// sum [keys of the warp][kD] += w times 32 rows.
template <class T, int kD, int kOffset>
__device__ inline void accumulate_group(float (&sum)[Joint<kD>::kTiles][kD / 8][4],
                                        const Weights<Joint<kD>::kTiles>& w, const Columns& b) {
  using J = Joint<kD>;
  static_for<2>([&](auto step) {
    static_for<kD / 16>([&](auto j) {
      uint32_t y[4];
      ptx::ldmatrix_x4_trans<kOffset + kColumnBytes<j.value> + step.value * 16 * J::kRow>(
          y, b.at[j.value % 4]);
#pragma unroll
      for (int i = 0; i < J::kTiles; ++i) {
        attention_mma(sum[i][2 * j.value], w[i][step.value], y[0], y[1], T{});
        attention_mma(sum[i][2 * j.value + 1], w[i][step.value], y[2], y[3], T{});
      }
    });
  });
}

// The same of 16 keys, pair by pair, where a row that not all of them see may hold a NaN or Inf.
template <class T, int kD>
__device__ inline void accumulate_seen_pairs(float (&sum)[kD / 8][4], const uint32_t (&w)[2][4],
                                             const uint8_t* rows, const Band (&band)[2]) {
  const int lane = threadIdx.x % kWarp;
  uint32_t words[2][kGroup / 8];  // indexed at run time: in local memory
#pragma unroll
  for (int j = 0; j < kGroup / 8; ++j) {
    words[0][j] = w[j / 2][j % 2 * 2];
    words[1][j] = w[j / 2][j % 2 * 2 + 1];
  }
#pragma unroll 1
  for (int c = 0; c < kGroup; ++c) {
    float weight[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t pair =
          __shfl_sync(kAllLanes, words[half][c / 8], lane / 4 * 4 + c % 8 / 2);
      weight[half] = c % 2 == 0 ? low_half(pair, T{}) : high_half(pair, T{});
    }
#pragma unroll
    for (int j = 0; j < kD / 8; ++j) {
      const uint32_t pair =
          *reinterpret_cast<const uint32_t*>(rows + row_offset<kD>(c, j) + lane % 4 * 4);
      const float low = low_half(pair, T{}), high = high_half(pair, T{});
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (!band[half].sees(c)) continue;
        sum[j][2 * half] = add_weighted(sum[j][2 * half], weight[half], low);
        sum[j][2 * half + 1] = add_weighted(sum[j][2 * half + 1], weight[half], high);
      }
    }
  }
}

// s: scores in, P out. dp: drop(dO V^T) - delta in, dS / scale out.
template <bool kAll, int kTiles>
__device__ inline void differentiate(const float4 (&terms)[kGroup / 8], float scale_log2,
                                     const Band (&band)[kTiles][2],
                                     float (&s)[kTiles][kGroup / 8][4],
                                     float (&dp)[kTiles][kGroup / 8][4]) {
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
#pragma unroll
    for (int j = 0; j < kGroup / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float lse = e % 2 == 0 ? terms[j].x : terms[j].z;
        float &prob = s[i][j][e], &ds = dp[i][j][e];
        prob = ptx::ex2_approx_ftz_f32(fmaf(prob, scale_log2, lse));
        ds *= prob;
        if (!kAll && !band[i][e / 2].sees(j * 8 + e % 2)) prob = ds = 0.0f;
      }
    }
  }
}

// What a block knows of its keys.
template <int kD>
struct Keys {
  using J = Joint<kD>;
  int batch, kv_head, block, j0;
  int own;       // this warp's first key, as a row of the tile
  bool kept[J::kTiles][2];  // this lane's keys exist and are not masked out
  bool all_kept;            // all of the warp's

  __device__ Keys(const AttentionParams& p, uint32_t ticket) {
    const uint32_t blocks = (p.kv_len + J::kKeys - 1) / J::kKeys;
    const int unit = ticket / blocks, kv_heads = p.heads / p.group;
    block = ticket % blocks;
    batch = unit / kv_heads;
    kv_head = unit % kv_heads;
    j0 = block * J::kKeys;
    own = threadIdx.x / kWarp * J::kWarpKeys;
    bool every = true;
#pragma unroll
    for (int i = 0; i < J::kTiles; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int j = key(i, half);
        kept[i][half] = j < p.kv_len && (mask(p) == nullptr || mask(p)[j] != 0);
        every &= kept[i][half];
      }
    }
    all_kept = __all_sync(kAllLanes, every);
  }

  __device__ int key(int i, int half) const {
    return j0 + own + i * kWarpRows + half * 8 + threadIdx.x % kWarp / 4;
  }
  __device__ const uint8_t* mask(const AttentionParams& p) const {
    return p.key_mask == nullptr ? nullptr : p.key_mask + static_cast<int64_t>(batch) * p.kv_len;
  }
  __device__ bool covered(const AttentionParams& p, int i0, int i1) const {
    return band_covers(p, i0, i1, j0, j0 + J::kKeys - 1);
  }
  // The warps that have a key which one of the queries i0 .. i0 + 31 sees.
  __device__ Range warps(const AttentionParams& p, int i0) const {
    const int i1 = min(i0 + kGroup, p.q_len) - 1;
    if (i0 > i1) return {0, 0};
    return tiles_of<J::kWarpKeys>(i0 + p.shift - p.left - j0, i1 + p.shift + p.right - j0,
                                  min(p.kv_len - j0, J::kKeys));
  }
};

__device__ inline uint32_t take_ticket(const AttentionParams& p, uint8_t* shared) {
  auto ticket = reinterpret_cast<uint32_t*>(shared);
  if (threadIdx.x == 0) *ticket = atomicAdd(p.sums.ticket, 1);
  __syncthreads();
  return *ticket;
}

// A quad of lanes holds of a row four blocks of eight columns, lane t columns 2 t and 2 t + 1 of
// each in w; after it, lane t holds block t.
__device__ inline void transpose_quad(uint32_t (&w)[4]) {
#pragma unroll
  for (int step = 1; step < 4; step *= 2) {
    const bool upper = threadIdx.x & step;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & step) continue;
      uint32_t &low = w[i], &high = w[i + step];
      const uint32_t other = __shfl_xor_sync(kAllLanes, upper ? low : high, step);
      low = upper ? other : low;
      high = upper ? high : other;
    }
  }
}

// This warp's 32 queries x 32 columns of dQ.
template <class T, int kD>
struct QuerySums {
  using J = Joint<kD>;
  int group, part;
  uint32_t ds[2], k[2];  // a lane's ldmatrix rows: 16 queries of dS each, 16 columns of K each

  __device__ QuerySums(uint32_t shared, const Lanes<kD>& lanes) {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    group = warp / J::kParts;
    part = warp % J::kParts;
    const int at = ds_offset(lane / 16 * 8 + lane % 8, lane / 8 % 2);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      ds[i] = shared + J::kDs + group * J::kDsGroup + (at ^ (i * 32));
      k[i] = shared + J::kK + (lanes.b_trans ^ (part * 64 + i * 32));
      ptx::keep(ds[i]);
      ptx::keep(k[i]);
    }
  }

  // sum += dS K of 16 keys, `kStep` times 16 keys and `row` after the first.
  template <int kStep>
  __device__ void multiply(float (&sum)[2][4][4], int row) const {
    uint32_t a[2][4], b[2][4];
    static_for<2>([&](auto i) {
      ptx::ldmatrix_x4_trans<kStep * 16 * kGroup * 2>(a[i.value], ds[i.value] + row * kGroup * 2);
      ptx::ldmatrix_x4_trans<kStep * 16 * J::kRow>(b[i.value], k[i.value] + row * J::kRow);
    });
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        attention_mma(sum[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1], T{});
      }
    }
  }

  __device__ void multiply_all(float (&sum)[2][4][4], const Range& warps) const {
    if (warps.first == 0 && warps.end == kWarps) {
      static_for<J::kKeys / 16>([&](auto step) { multiply<step.value>(sum, 0); });
      return;
    }
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
  __device__ void multiply_seen(float (&sum)[2][4][4], const AttentionParams& p, int i0, int j0,
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
          const T weight = *reinterpret_cast<const T*>(
              shared_bytes + J::kDs + group * J::kDsGroup + ds_offset(c, 2 * i + half) + g * 2);
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const uint32_t pair = *reinterpret_cast<const uint32_t*>(
                shared_bytes + J::kK + row_offset<kD>(c, part * 4 + j) + t * 4);
            float(&to)[4] = sum[i][j];
            to[2 * half] = add_weighted(to[2 * half], to_float(weight), low_half(pair, T{}));
            to[2 * half + 1] =
                add_weighted(to[2 * half + 1], to_float(weight), high_half(pair, T{}));
          }
        }
      }
    }
  }

  // Where the sums so far are: 16 bytes a lane, then those of the next fragment.
  __device__ float4* memory(const AttentionParams& p, int batch, int head, int i0) const {
    const int64_t row = (static_cast<int64_t>(batch) * p.heads + head) * p.terms.rows + i0;
    return reinterpret_cast<float4*>(p.sums.dq + row * kD) + threadIdx.x / kWarp * 8 * kWarp +
           threadIdx.x % kWarp;
  }

  __device__ void store(const AttentionParams& p, int batch, int head, int i0,
                        const float (&sum)[2][4][4]) const {
    const int col = part * 32 + threadIdx.x % 4 * 8;
    T* dq = const_cast<T*>(slab<T>(p.dq, batch, head)) + col;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t w[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          w[j] = pack_pair(sum[i][j][2 * half] * p.scale, sum[i][j][2 * half + 1] * p.scale, T{});
        }
        transpose_quad(w);
        const int row = i0 + query(i, half);
        if (row < p.q_len && col < p.head_dim) {
          *reinterpret_cast<uint4*>(dq + row * p.dq.row) = make_uint4(w[0], w[1], w[2], w[3]);
        }
      }
    }
  }
};

// This warp's part of dK and dV of a group of 32 queries; leaves dS in shared memory.
template <class T, int kD>
struct KeySums {
  using J = Joint<kD>;
  float dk[J::kTiles][kD / 8][4] = {}, dv[J::kTiles][kD / 8][4] = {};
  float scale_log2;
  Columns kv, q, q_trans;  // of the keys, and of the queries of the next group
  int ds, terms;           // bytes; of the first group

  __device__ KeySums(const AttentionParams& p, uint32_t shared, int own, const Lanes<kD>& lanes)
      : scale_log2(p.scale * kLog2E),
        kv(shared + own * J::kRow, lanes.a),
        q(shared + J::kQ, lanes.b),
        q_trans(shared + J::kQ, lanes.b_trans),
        ds(J::kDs + ds_offset(own + threadIdx.x % kWarp / 4, threadIdx.x % 4)),
        terms(J::kTerms + threadIdx.x % 4 * 16) {}

  __device__ void advance(int rows) {
    q.advance(rows * J::kRow);
    q_trans.advance(rows * J::kRow);
  }

  // Queries i0 .. i0 + 31 of a head, `row` rows into the stages. plain: no NaN or Inf in them.
  __device__ void add(const AttentionParams& p, const Keys<kD>& keys, int head, int i0, int row,
                      bool plain) {
    constexpr int kBlocks = kGroup / 8;
    const int j0 = keys.j0 + keys.own;
    float4 pairs[kBlocks];
#pragma unroll
    for (int j = 0; j < kBlocks; ++j) {
      pairs[j] = *reinterpret_cast<const float4*>(shared_bytes + terms + row * 8 + j * 64);
    }
    float s[J::kTiles][kBlocks][4] = {}, dp[J::kTiles][kBlocks][4];
    const bool drops = p.dropout.threshold != 0;
#pragma unroll
    for (int i = 0; i < J::kTiles; ++i) {
#pragma unroll
      for (int j = 0; j < kBlocks; ++j) {
        dp[i][j][0] = dp[i][j][2] = drops ? 0.0f : pairs[j].y;
        dp[i][j][1] = dp[i][j][3] = drops ? 0.0f : pairs[j].w;
      }
    }
    multiply_group<T, kD, 0>(s, kv, q);
    multiply_group<T, kD, J::kDout - J::kQ>(dp, kv, q);
    QueryDrop<kGroup> drop[J::kTiles];
    if (drops) {
#pragma unroll
      for (int i = 0; i < J::kTiles; ++i) {
        drop[i].draw(p, keys.batch * p.heads + head, i0, j0 + i * kWarpRows);
        drop[i].apply(dp[i], p.dropout.scale);
#pragma unroll
        for (int j = 0; j < kBlocks; ++j) {
#pragma unroll
          for (int e = 0; e < 4; ++e) dp[i][j][e] += e % 2 == 0 ? pairs[j].y : pairs[j].w;
        }
      }
    }
    const int i1 = i0 + kGroup - 1, j1 = j0 + J::kWarpKeys - 1;
    const bool covered = band_covers(p, i0, i1, j0, j1);
    Band bands[J::kTiles][2], band[J::kTiles][2];
    if (covered && keys.all_kept && i1 < p.q_len) {
      differentiate<true, J::kTiles>(pairs, scale_log2, band, s, dp);
    } else {
#pragma unroll
      for (int i = 0; i < J::kTiles; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          bands[i][half] = queries_of(p, keys.key(i, half), keys.kept[i][half], i0);
          band[i][half] = bands[i][half].of_lane();
        }
      }
      differentiate<false, J::kTiles>(pairs, scale_log2, band, s, dp);
    }
    if (drops) {
#pragma unroll
      for (int i = 0; i < J::kTiles; ++i) drop[i].apply(s[i], p.dropout.scale);
    }
    Weights<J::kTiles> weights, ds_weights;
    pack_weights<T, J::kTiles>(weights, s);
    pack_weights<T, J::kTiles>(ds_weights, dp);
    const int to = ds + row % J::kQueries * J::kKeys * 2;
#pragma unroll
    for (int i = 0; i < J::kTiles; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t(&w)[2][4] = ds_weights[i];
        *reinterpret_cast<uint4*>(shared_bytes + to + (i * 2 + half) * 8 * kGroup * 2) =
            make_uint4(w[0][half], w[0][2 + half], w[1][half], w[1][2 + half]);
      }
    }
    if (covered || plain) {
      accumulate_group<T, kD, J::kDout - J::kQ>(dv, weights, q_trans);
      accumulate_group<T, kD, 0>(dk, ds_weights, q_trans);
    } else {
      const uint8_t* rows = shared_bytes + J::kQ + row * J::kRow;
#pragma unroll
      for (int i = 0; i < J::kTiles; ++i) {
        accumulate_seen_pairs<T, kD>(dv[i], weights[i], rows + J::kDout - J::kQ, bands[i]);
        accumulate_seen_pairs<T, kD>(dk[i], ds_weights[i], rows, bands[i]);
      }
    }
  }

  __device__ void store(const AttentionParams& p, const Keys<kD>& keys) {
#pragma unroll
    for (int i = 0; i < J::kTiles; ++i) {
      if (keys.mask(p) != nullptr) {  // a NaN of a query reached the rows of masked-out keys too
#pragma unroll
        for (int e = 0; e < kD / 2; ++e) {
          if (keys.kept[i][e / 2 % 2]) continue;
          dk[i][e / 4][e % 4] = dv[i][e / 4][e % 4] = 0.0f;
        }
      }
      const float scale_k[2] = {p.scale, p.scale}, scale_v[2] = {1.0f, 1.0f};
      const int row = keys.own + i * kWarpRows;
      uint8_t* shared = shared_bytes + row * J::kRow;
      if (p.dk.data != nullptr) {
        store_rows<T, kD>(shared + J::kK, p.dk, keys.batch, keys.kv_head, keys.j0 + row, p.kv_len,
                          p.head_dim, dk[i], scale_k);
      }
      if (p.dv.data != nullptr) {
        store_rows<T, kD>(shared + J::kV, p.dv, keys.batch, keys.kv_head, keys.j0 + row, p.kv_len,
                          p.value_dim, dv[i], scale_v);
      }
    }
  }
};

template <class T, int kD>
__global__ void __launch_bounds__(kAttentionThreads)
    attention_bwd_joint_kernel(const AttentionParams p) {
  using J = Joint<kD>;
  constexpr int kQueries = J::kQueries;
  const uint32_t shared = shared_address(shared_bytes);
  const Keys<kD> keys(p, take_ticket(p, shared_bytes + J::kTicket));
  const int batch = keys.batch, j0 = keys.j0, first_head = keys.kv_head * p.group;
  const Range tiles = query_tiles<kQueries>(p, j0, min(j0 + J::kKeys, p.kv_len) - 1);
  Walk walk{tiles, tiles.end - 1, first_head,
            first_head + (tiles.first < tiles.end ? p.group : 0)};
  load_rows<T, kD, J::kKeys>(shared + J::kK, slab<T>(p.k, batch, keys.kv_head), p.k.row, j0,
                             p.kv_len, p.head_dim, keys.mask(p));
  load_rows<T, kD, J::kKeys>(shared + J::kV, slab<T>(p.v, batch, keys.kv_head), p.v.row, j0,
                             p.kv_len, p.value_dim, keys.mask(p));
  JointLoader<T, kD> loader(p, walk, batch, shared);
  loader.load(p, batch, shared);
  const Lanes<kD> lanes;
  KeySums<T, kD> sums(p, shared, keys.own, lanes);
  const QuerySums<T, kD> query_sums(shared, lanes);
  ptx::cp_async_wait_group<0>();
  bool k_finite = true;
  if (!keys.covered(p, 0, p.q_len - 1)) {
    k_finite = barrier_all_finite(own_exponents<T, kD, J::kKeys>(shared_bytes + J::kK));
  }
  uint32_t* added = nullptr;  // the lock of the tile before
  for (int turn = 0; !walk.ended(); turn ^= 1) {
    const int i0 = walk.tile * kQueries, head = walk.head;
    walk.next();
    const bool covered = keys.covered(p, i0, i0 + kQueries - 1);
    ptx::cp_async_wait_group<0>();
    // This stage is here; every warp is done with the other one, with dS and with the sums of dQ.
    bool plain = true;
    if (covered) {
      __syncthreads();
    } else {
      const uint8_t* stage = shared_bytes + turn * J::kTile;
      plain = barrier_all_finite(own_exponents<T, kD, kQueries>(stage + J::kQ) |
                                 own_exponents<T, kD, kQueries>(stage + J::kDout));
    }
    if (threadIdx.x == 0 && added != nullptr) ptx::red_release_gpu_add_u32(added, 1);
    loader.load(p, batch, shared);
#pragma unroll 1
    for (int at = 0; at < kQueries; at += kGroup) {
      if (keys.warps(p, i0 + at).has(threadIdx.x / kWarp)) {
        sums.add(p, keys, head, i0 + at, turn * kQueries + at, plain);
      }
      sums.advance(kGroup);
    }
    if (turn == 1) sums.advance(-2 * kQueries);
    const Range blocks = key_tiles<J::kKeys>(p, i0, min(i0 + kQueries, p.q_len) - 1);
    const bool first = keys.block == blocks.first, last = keys.block == blocks.end - 1;
    uint32_t* lock = p.sums.locks + ((static_cast<int64_t>(batch) * p.heads + head) * p.terms.rows + i0) / kLockRows;
    if (threadIdx.x == 0) {
      while (ptx::ld_acquire_gpu_u32(lock) != keys.block - blocks.first) continue;
    }
    __syncthreads();
    float4* memory = query_sums.memory(p, batch, head, i0);
    float dq[2][4][4] = {};
    if (!first) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float4 before = memory[i * kWarp];
        float(&to)[4] = dq[i / 4][i % 4];
        to[0] = before.x, to[1] = before.y, to[2] = before.z, to[3] = before.w;
      }
    }
    const int group0 = i0 + query_sums.group * kGroup;
    const Range warps = keys.warps(p, group0);
    if (covered || k_finite) {
      query_sums.multiply_all(dq, warps);
    } else {
      query_sums.multiply_seen(dq, p, i0, j0, warps);
    }
    added = last ? nullptr : lock;
    if (last) {
      query_sums.store(p, batch, head, i0, dq);
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float(&of)[4] = dq[i / 4][i % 4];
        memory[i * kWarp] = make_float4(of[0], of[1], of[2], of[3]);
      }
    }
  }
  __syncthreads();
  if (threadIdx.x == 0 && added != nullptr) ptx::red_release_gpu_add_u32(added, 1);
  sums.store(p, keys);
}

}  // namespace

void attention_bwd_joint(const AttentionShape& s, const AttentionParams& p, const Place& place) {
  dispatch_attention(s, [&](auto t, auto d) {
    using J = Joint<d.value>;
    const int64_t blocks = s.batch * s.kv_heads * ceil_div(s.kv_len, J::kKeys);
    launch("attention_bwd_joint", attention_bwd_joint_kernel<decltype(t), d.value>,
           dim3(static_cast<unsigned>(blocks)), kAttentionThreads, J::kBytes, place, p);
  });
}

}  // namespace llmkern
