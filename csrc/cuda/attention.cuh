// Shared by the attention kernels: tiles of 16-bit rows in shared memory, their products on tensor
// cores, who sees whom, and dropout. Formulas and axes: llmkern/attention.h.
//
// A tile is [rows][kD] with kD = 64 or 128 (head dims in between are filled with 0). A row is 8 or
// 16 units of 16 bytes; unit u of row r stands at u ^ (r % 8), so that eight consecutive rows at
// one u, which ldmatrix reads at a time, lie in eight distinct bank groups.
//
// Four warps; warp w owns rows 16 w .. 16 w + 15 of the product. Lane l = 4 g + t holds of each
// block of eight columns (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1).
#pragma once

#include "common.cuh"
#include "llmkern/attention.h"
#include "philox.cuh"

namespace llmkern {

constexpr int kAttentionThreads = 128;
constexpr int kWarpRows = 16;
constexpr int kBlockRows = kWarpRows * kAttentionThreads / kWarp;  // 64
constexpr float kLn2 = 0.69314718f;

// A tensor [B, heads, length, dim]: strides in elements.
struct Rows {
  const void* data;
  int64_t batch, head, row;
};

// What backward needs of each query: -lse log2 e, and -delta_i = dlse_i - sum_j p_ij dp_ij. Rows
// past S, which is filled up to whole blocks, hold 0.
struct RowTerms {
  float2* data;  // [B, H, rows]
  int rows;

  __device__ float2* at(int batch, int heads, int head, int row) const {
    return data + (static_cast<int64_t>(batch) * heads + head) * rows + row;
  }
};

// Of backward in one pass (attention_bwd_joint.cu); rows as RowTerms has them.
struct JointSums {
  float* dq;        // [B, H, rows * kD]
  uint32_t* locks;  // [B, H, rows / kLockRows]: blocks of keys that have been added to dq; or null
  uint32_t* ticket;
};
constexpr int kLockRows = 32;

struct AttentionParams {
  Rows q, k, v, out, dout, dq, dk, dv;  // of the gradients, those that the kernel reads or writes
  int heads, group;                     // group: query heads of a kv head
  int q_len, kv_len, head_dim, value_dim;
  float scale;
  int shift, left, right;
  const uint8_t* key_mask;  // null, or [B, T]
  Dropout dropout;
  float* lse;         // [B, H, S]
  const float* dlse;  // null, or [B, H, S]
  RowTerms terms;     // of backward
  JointSums sums;
};

template <class T>
__device__ inline const T* slab(const Rows& rows, int batch, int head) {
  return static_cast<const T*>(rows.data) + batch * rows.batch + head * rows.head;
}

// A thread's part of loading tile after tile of kRows rows of a slab by cp.async; kDown: from the
// last tile to the first. Rows past `count`, those that `kept` leaves out and columns past `dim`
// become 0. kept: null, or one byte a row.
template <class T, int kD, int kRows, bool kDown = false, int kThreads = kAttentionThreads>
struct RowLoader {
  static constexpr int kUnits = kD / 8, kStep = kThreads / kUnits, kCopies = kRows / kStep;
  static_assert(kStep % 8 == 0, "the rows of a thread have the same swizzle");
  // Of a thread's rows of a tile, the one that it copies i-th.
  template <int i>
  static constexpr int kLine = (kDown ? kCopies - 1 - i : i) * kStep;
  uint64_t from;     // of its next row
  uint64_t step;     // bytes from one of its rows to the next
  uint64_t nothing;  // readable, for copies of 0 bytes
  uint32_t to;
  int bytes, line;

  // first: where the first tile starts.
  __device__ RowLoader(uint32_t shared, const T* slab, int64_t stride, int first, int dim) {
    const int unit = threadIdx.x % kUnits;
    line = threadIdx.x / kUnits;
    to = shared + row_offset<kD>(line, unit);
    bytes = unit * 8 < dim ? 16 : 0;
    nothing = ptx::global_address(slab);
    from = nothing + (first + line + kLine<0>)*stride * 2 + (bytes > 0 ? unit * 16 : 0);
    step = stride * 2 * (kDown ? -kStep : kStep);
    ptx::keep(to);
    ptx::keep(bytes);
    ptx::keep(from);
    if (kDown) return;  // the others are cheap to make, and registers are short there
    ptx::keep(line);
    ptx::keep(step);
  }

  // The next tile, all rows of which exist and are kept, to `offset` bytes after the first.
  __device__ void load_whole(uint32_t offset) {
    static_for<kCopies>([&](auto i) {
      ptx::cp_async_cg_16<kLine<i.value> * kD * 2>(to + offset, from, bytes);
      from += step;
    });
  }

  // Any tile; its first row is `first`.
  __device__ void load(uint32_t offset, int first, int count, const uint8_t* kept = nullptr) {
    if (first + kRows <= count && kept == nullptr) return load_whole(offset);
    static_for<kCopies>([&](auto i) {
      const int row = first + line + kLine<i.value>;
      const bool inside = row < count && bytes > 0 && (kept == nullptr || kept[row] != 0);
      ptx::cp_async_cg_16<kLine<i.value> * kD * 2>(to + offset, inside ? from : nothing,
                                                   inside ? 16 : 0);
      from += step;
    });
  }
};

// Rows first .. first + kRows - 1 alone.
template <class T, int kD, int kRows, int kThreads = kAttentionThreads>
__device__ inline void load_rows(uint32_t shared, const T* slab, int64_t stride, int first,
                                 int count, int dim, const uint8_t* kept = nullptr) {
  RowLoader<T, kD, kRows, false, kThreads>(shared, slab, stride, first, dim)
      .load(0, first, count, kept);
}

// Offsets of a lane's ldmatrix rows; add the tile's address and row0 * kD * 2, row0 a multiple of
// 16. The xor of a multiple of two units commutes with the swizzle.
template <int kD>
struct Lanes {
  uint32_t a, b, b_trans;

  __device__ Lanes() {
    const int lane = threadIdx.x % kWarp, second = (lane / 8) & 1, third = lane / 16;
    a = row_offset<kD>(second * 8 + lane % 8, third);
    b = row_offset<kD>(third * 8 + lane % 8, second);
    ptx::keep(a);
    ptx::keep(b);
    b_trans = a;
  }
};

__device__ inline void attention_mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                     uint32_t b1, BFloat16) {
  ptx::mma_m16n8k16_bf16(d, a, b0, b1);
}
__device__ inline void attention_mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                     uint32_t b1, Float16) {
  ptx::mma_m16n8k16_f16(d, a, b0, b1);
}

// The fragments of 16 rows.
template <int kD>
__device__ inline void load_fragments(uint32_t (&a)[kD / 16][4], uint32_t rows,
                                      const Lanes<kD>& lanes) {
#pragma unroll
  for (int step = 0; step < kD / 16; ++step) {
    ptx::ldmatrix_x4(a[step], rows + (lanes.a ^ (step * 32)));
  }
}

// s [16][kN] += columns 16 step .. + 15 of a times those of the kN rows of b.
template <class T, int kD, int kN>
__device__ inline void multiply_step(float (&s)[kN / 8][4], const uint32_t (&a)[4], int step,
                                     uint32_t b_rows, const Lanes<kD>& lanes) {
  const uint32_t b_at = b_rows + (lanes.b ^ (step * 32));
  static_for<kN / 16>([&](auto j) {
    uint32_t b[4];
    ptx::ldmatrix_x4<j.value * 16 * kD * 2>(b, b_at);
    attention_mma(s[2 * j.value], a, b[0], b[1], T{});
    attention_mma(s[2 * j.value + 1], a, b[2], b[3], T{});
  });
}

// s [16 rows of a][kN rows of b] = a b^T, tiles [*][kD]; a as fragments.
template <class T, int kD, int kN>
__device__ inline void multiply_fragments(float (&s)[kN / 8][4], const uint32_t (&a)[kD / 16][4],
                                          uint32_t b_rows, const Lanes<kD>& lanes) {
#pragma unroll
  for (int j = 0; j < kN / 8; ++j) s[j][0] = s[j][1] = s[j][2] = s[j][3] = 0.0f;
#pragma unroll
  for (int step = 0; step < kD / 16; ++step) {
    multiply_step<T, kD, kN>(s, a[step], step, b_rows, lanes);
  }
}

// The same of a tile in shared memory.
template <class T, int kD, int kN>
__device__ inline void multiply_rows(float (&s)[kN / 8][4], uint32_t a_rows, uint32_t b_rows,
                                     const Lanes<kD>& lanes) {
#pragma unroll
  for (int j = 0; j < kN / 8; ++j) s[j][0] = s[j][1] = s[j][2] = s[j][3] = 0.0f;
#pragma unroll
  for (int step = 0; step < kD / 16; ++step) {
    uint32_t a[4];
    ptx::ldmatrix_x4(a, a_rows + (lanes.a ^ (step * 32)));
    multiply_step<T, kD, kN>(s, a, step, b_rows, lanes);
  }
}

// sum [16][kD] += p [16][kN] (accumulators of a product before) times the tile [kN][kD].
template <class T, int kD, int kN>
__device__ inline void accumulate(float (&sum)[kD / 8][4], const float (&p)[kN / 8][4],
                                  uint32_t b_rows, const Lanes<kD>& lanes) {
  uint32_t at[kD / 16];
#pragma unroll
  for (int j = 0; j < kD / 16; ++j) at[j] = b_rows + (lanes.b_trans ^ (j * 32));
  static_for<kN / 16>([&](auto step) {
    const float(&low)[4] = p[2 * step.value];
    const float(&high)[4] = p[2 * step.value + 1];
    const uint32_t a[4] = {pack_pair(low[0], low[1], T{}), pack_pair(low[2], low[3], T{}),
                           pack_pair(high[0], high[1], T{}), pack_pair(high[2], high[3], T{})};
#pragma unroll
    for (int j = 0; j < kD / 16; ++j) {
      uint32_t b[4];
      ptx::ldmatrix_x4_trans<step.value * 16 * kD * 2>(b, at[j]);
      attention_mma(sum[2 * j], a, b[0], b[1], T{});
      attention_mma(sum[2 * j + 1], a, b[2], b[3], T{});
    }
  });
}

// Columns of a tile that a row sees.
struct Band {
  int low, high;
  __device__ bool sees(int c) const { return c >= low && c <= high; }
  __device__ bool ends_after(int c) const { return c <= high; }
  // Relative to the lane's first column.
  __device__ Band of_lane() const {
    const int first = 2 * (threadIdx.x % 4);
    return {low - first, high - first};
  }
};

// Keys that query i sees, as columns of the tile that starts at key j0.
__device__ inline Band keys_of(const AttentionParams& p, int i, int j0) {
  return {i + p.shift - p.left - j0, min(i + p.shift + p.right, p.kv_len - 1) - j0};
}

// Queries that see key j, as columns of the tile that starts at query i0.
__device__ inline Band queries_of(const AttentionParams& p, int j, bool key_is_kept, int i0) {
  if (j >= p.kv_len || !key_is_kept) return {1, 0};
  return {j - p.shift - p.right - i0, min(j - p.shift + p.left, p.q_len - 1) - i0};
}

// The band hides nothing between queries i0 .. i1 and keys j0 .. j1.
__device__ inline bool band_covers(const AttentionParams& p, int i0, int i1, int j0, int j1) {
  return j0 >= i1 + p.shift - p.left && j1 <= i0 + p.shift + p.right;
}

// Every pair of queries i0 .. i1 and keys j0 .. j1, all of which exist, sees each other.
__device__ inline bool all_see(const AttentionParams& p, int i0, int i1, int j0, int j1) {
  return i1 < p.q_len && j1 < p.kv_len && p.key_mask == nullptr && band_covers(p, i0, i1, j0, j1);
}

struct Range {
  int first, end;  // tiles
  __device__ bool has(int tile) const { return tile >= first && tile < end; }
};

// Tiles of kSize keys that some query of i0 .. i1 sees, or of queries that see some key: columns
// low .. high that exist.
template <int kSize>
__device__ inline Range tiles_of(int low, int high, int length) {
  low = max(low, 0);
  high = min(high, length - 1);
  if (low > high) return {0, 0};
  const uint32_t first = low, last = high;  // unsigned: a division is a shift
  return {static_cast<int>(first / kSize), static_cast<int>(last / kSize + 1)};
}

template <int kSize>
__device__ inline Range key_tiles(const AttentionParams& p, int i0, int i1) {
  return tiles_of<kSize>(i0 + p.shift - p.left, i1 + p.shift + p.right, p.kv_len);
}

// Of those, the tiles that queries i0 .. i1 see all of.
template <int kSize>
__device__ inline Range whole_key_tiles(const AttentionParams& p, int i0, int i1) {
  const int low = max(i1 + p.shift - p.left, 0);
  const int high = min(i0 + p.shift + p.right, p.kv_len - 1);
  if (p.key_mask != nullptr || high < 0) return {0, 0};
  return {(low + kSize - 1) / kSize, (high + 1) / kSize};
}

template <int kSize>
__device__ inline Range query_tiles(const AttentionParams& p, int j0, int j1) {
  return tiles_of<kSize>(j0 - p.shift - p.right, j1 - p.shift + p.left, p.q_len);
}

// Bit c: key j0 + c exists and is not masked out; the lane's two columns of block b are bits 8b,
// 8b + 1 after the shift.
__device__ inline uint64_t kept_keys(const AttentionParams& p, int batch, int j0) {
  const int lane = threadIdx.x % kWarp;
  const uint8_t* mask = p.key_mask + static_cast<int64_t>(batch) * p.kv_len;
  const uint32_t low = __ballot_sync(kAllLanes, j0 + lane < p.kv_len && mask[j0 + lane] != 0);
  const int next = j0 + kWarp + lane;
  const uint32_t high = __ballot_sync(kAllLanes, next < p.kv_len && mask[next] != 0);
  return (static_cast<uint64_t>(high) << 32 | low) >> (2 * (lane % 4));
}

// Dropout decisions for a warp's 16 rows x kN columns: one Philox call decides eight keys of one
// query. Lanes share the calls out and pass each other the bits.
//
// Queries as rows: byte 2 * (nb / 4) + half of lane (g, nb % 4): query g + 8 half, key block nb.
template <int kN>
__device__ inline void drop_keys(const AttentionParams& p, uint32_t slab, int i0, int j0,
                                 float (&v)[kN / 8][4], float scale) {
  static_assert(kN == 64, "eight blocks of keys: two for each lane of four");
  const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  const uint64_t seed = static_cast<uint64_t>(*p.dropout.seed);
  uint32_t mine = 0;
#pragma unroll
  for (int call = 0; call < 4; ++call) {
    const int block = t + call / 2 * 4, row = g + call % 2 * 8;
    mine |= keep_bits(philox(j0 / 8 + block, i0 + row, slab, kAttentionStream, seed),
                      p.dropout.threshold)
            << (8 * call);
  }
#pragma unroll
  for (int source = 0; source < 4; ++source) {
    const uint32_t bits = __shfl_sync(kAllLanes, mine, g * 4 + source) >> (2 * t);
#pragma unroll
    for (int call = 0; call < 4; ++call) {
      float(&block)[4] = v[source + call / 2 * 4];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& element = block[call % 2 * 2 + e];
        element = bits >> (8 * call + e) & 1u ? element * scale : 0.0f;
      }
    }
  }
}

// Keys as rows: byte 2 e + half of lane (nb, t): query 8 nb + 2t + e, keys of block `half`, of
// which lane g takes bit g.
template <int kN>
struct QueryDrop {
  uint32_t mine = 0;

  __device__ void draw(const AttentionParams& p, uint32_t slab, int i0, int j0) {
    const int lane = threadIdx.x % kWarp;
    const uint64_t seed = static_cast<uint64_t>(*p.dropout.seed);
#pragma unroll
    for (int call = 0; call < 4; ++call) {
      const int query = i0 + lane / 4 % (kN / 8) * 8 + lane % 4 * 2 + call / 2;
      mine |= keep_bits(philox(j0 / 8 + call % 2, query, slab, kAttentionStream, seed),
                        p.dropout.threshold)
              << (8 * call);
    }
  }

  // v: blocks of eight queries from block kFirst on.
  template <int kFirst = 0, int kCount>
  __device__ void apply(float (&v)[kCount][4], float scale) const {
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int nb = 0; nb < kCount; ++nb) {
      const uint32_t bits =
          __shfl_sync(kAllLanes, mine, (kFirst + nb) * 4 + lane % 4) >> (lane / 4);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& element = v[nb][half * 2 + e];
          element = bits >> (8 * (2 * e + half)) & 1u ? element * scale : 0.0f;
        }
      }
    }
  }
};

// A warp's accumulators to rows of a slab, through shared memory that only this warp uses, 16 bytes
// at a time.
template <class T, int kD>
struct RowStore {
  static constexpr int kRow = kD * 2, kUnits = kD / 8, kStep = kWarp / kUnits;  // 4 or 2 rows
  uint8_t* to[8];  // a lane's column of each unit; 8 units on is 128 bytes on
  uint8_t* from[8 / kStep];

  // row: of the tile at the start of shared memory; the warp's first, a multiple of 16.
  __device__ explicit RowStore(int row) {
    const int lane = threadIdx.x % kWarp;
    const int base = row_offset<kD>(row + lane / 4, 0) + lane % 4 * 4;
#pragma unroll
    for (int j = 0; j < 8; ++j) to[j] = shared_bytes + (base ^ (j * 16));
#pragma unroll
    for (int i = 0; i < 8 / kStep; ++i) {
      from[i] = shared_bytes + row_offset<kD>(row + lane / kUnits + i * kStep, lane % kUnits);
    }
  }

  // 16 rows, kOffset bytes on.
  template <int kOffset>
  __device__ void put(const float (&sum)[kD / 8][4], float scale_low, float scale_high) const {
#pragma unroll
    for (int j = 0; j < kUnits; ++j) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float scale = half == 0 ? scale_low : scale_high;
        *reinterpret_cast<uint32_t*>(to[j % 8] + kOffset + j / 8 * 128 + half * 8 * kRow) =
            pack_pair(sum[j][2 * half] * scale, sum[j][2 * half + 1] * scale, T{});
      }
    }
  }

  // The kRows rows that were put there to rows first .. of a slab.
  template <int kOffset, int kRows>
  __device__ void copy(const Rows& rows, int batch, int head, int first, int count, int dim) const {
    const int lane = threadIdx.x % kWarp, unit = lane % kUnits, row = lane / kUnits;
    if (unit * 8 >= dim) return;
    T* out = const_cast<T*>(slab<T>(rows, batch, head)) + (first + row) * rows.row + unit * 8;
    const int64_t step = kStep * rows.row;
    const auto copy = [&](int i) {
      // Eight rows on, the swizzle is the same.
      *reinterpret_cast<uint4*>(out) = *reinterpret_cast<const uint4*>(
          from[i % (8 / kStep)] + kOffset + i / (8 / kStep) * 8 * kRow);
      out += step;
    };
    if (first + kRows <= count) {
#pragma unroll
      for (int i = 0; i < kRows / kStep; ++i) copy(i);
    } else {
#pragma unroll
      for (int i = 0; i < kRows / kStep; ++i) {
        if (first + row + i * kStep < count) copy(i);
      }
    }
  }
};

// A warp's 16 rows of accumulators, times `scale`, to rows first .. of a slab; row: as RowStore
// has it, kOffset bytes on.
template <int kOffset, class T, int kD>
__device__ inline void store_rows(int row, const Rows& to, int batch, int head, int first,
                                  int count, int dim, const float (&sum)[kD / 8][4],
                                  float scale_low, float scale_high) {
  const RowStore<T, kD> store(row);
  store.template put<kOffset>(sum, scale_low, scale_high);
  __syncwarp();
  store.template copy<kOffset, kWarpRows>(to, batch, head, first, count, dim);
}

}  // namespace llmkern
