// How the backward pass is cut and what scratch that takes.
//
// The unit is a tile: 8 query blocks of a kv head (of any of its query heads) by 512 keys. A tile's
// dQ, dK and dV are summed from zero, then added to the totals in order of tiles. So the sums
// follow from the lengths alone: they are the same bits whatever the number of threads, and
// whatever else is in the batch.
#pragma once

#include <cstddef>
#include <cstdint>

#include "llmkern/attention.h"

namespace llmkern {

// Queries are the lanes of a score block, keys its rows. 64 x 112: a block, its gradient and their
// operands take 250 KB at D = 64, half of the smallest L2 (512 KB) that this is tuned for; 112 is 8
// register tiles of AVX-512 and 18 2/3 of AVX2, and a multiple of the 8 keys of a dropout counter.
constexpr int64_t kBwdQueries = 64;
constexpr int64_t kBwdKeys = 112;
constexpr int64_t kBwdTileBlocks = 8;  // query blocks of a tile
constexpr int64_t kBwdTileKeys = 512;  // at most
// Rows of operands are an odd number of cache lines long, so that a panel of register width does
// not fall into a few cache sets.
constexpr int64_t kLineFloats = 16;

struct BwdPlan {
  int64_t scalar_bytes;                // of the compute type
  int64_t q_blocks;                    // of one head
  int64_t segments, chunks;            // tiles of one (batch, kv head) pair: segments x chunks
  int64_t chunk_keys;                  // keys of a chunk, a multiple of 8
  int64_t head_ld, value_ld, lane_ld;  // row strides of operands
  int64_t wave;          // segments of a pair in flight at once; 0: a pair is one task
  bool round_keys;       // totals of dk and dv are in scratch, rounded at the end
  int64_t totals_bytes;  // dk and dv of a pair
  int64_t tile_bytes;    // dq, dk, dv of a tile
  int64_t slot_bytes, delta_bytes;
  int64_t totals, tiles;  // how many are in scratch
};

static inline int64_t bwd_padded(int64_t n) {
  const int64_t lines = (n + kLineFloats - 1) / kLineFloats;
  return (lines | 1) * kLineFloats;
}

static inline int64_t bwd_aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

static inline int64_t bwd_ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Scalars of BwdBlock's operands: lse, delta; Q^T, dO^T; Q, dO; K, V; scores, their gradient, bias,
// softcap's tanh.
static inline int64_t bwd_slot_scalars(const AttentionShape& s, const BwdPlan& p) {
  return (2 + s.head_dim + s.value_dim) * p.lane_ld +
         (kBwdQueries + p.chunk_keys) * (p.head_ld + p.value_ld) + kBwdKeys * 4 * p.lane_ld;
}

static inline BwdPlan bwd_plan(const AttentionShape& s, int threads) {
  BwdPlan p;
  const int64_t pairs = s.batch * s.kv_heads, group = pairs > 0 ? s.heads / s.kv_heads : 0;
  p.scalar_bytes = s.dtype == DType::kFloat64 ? 8 : 4;
  p.q_blocks = bwd_ceil_div(s.q_len, kBwdQueries);
  p.segments = bwd_ceil_div(group * p.q_blocks, kBwdTileBlocks);
  p.chunks = bwd_ceil_div(s.kv_len, kBwdTileKeys);
  p.chunk_keys = p.chunks > 0 ? bwd_ceil_div(bwd_ceil_div(s.kv_len, p.chunks), 8) * 8 : 0;
  p.head_ld = bwd_padded(s.head_dim);
  p.value_ld = bwd_padded(s.value_dim);
  p.lane_ld = bwd_padded(kBwdQueries);
  // Whole pairs need the least memory; 4 a thread are enough to balance.
  p.wave = 0;
  if (threads > 1 && pairs < 4 * threads && pairs * p.chunks > 0) {
    p.wave = bwd_ceil_div(8 * threads, pairs * p.chunks);
    if (p.wave > p.segments) p.wave = p.segments;
  }
  const int64_t tile_rows = kBwdTileBlocks * kBwdQueries;
  p.round_keys = s.dtype == DType::kBFloat16 || s.dtype == DType::kFloat16;
  p.totals_bytes = bwd_aligned(s.kv_len * (s.head_dim + s.value_dim) * p.scalar_bytes);
  p.tile_bytes = bwd_aligned((tile_rows * s.head_dim + p.chunk_keys * (s.head_dim + s.value_dim)) *
                             p.scalar_bytes);
  p.slot_bytes = bwd_aligned(bwd_slot_scalars(s, p) * p.scalar_bytes);
  p.delta_bytes = bwd_aligned(s.batch * s.heads * s.q_len * p.scalar_bytes);
  p.totals = !p.round_keys ? 0 : p.wave > 0 ? pairs : threads;
  // A worker with pairs of its own keeps two: the tile, and the total of its dq.
  p.tiles = p.wave > 0 ? pairs * p.wave * p.chunks : 2 * threads;
  return p;
}

// Scratch: delta, a slot for each worker, totals, tiles.
static inline int64_t attention_bwd_scratch_bytes(const AttentionShape& s, int threads) {
  const BwdPlan p = bwd_plan(s, threads);
  return p.delta_bytes + threads * p.slot_bytes + p.totals * p.totals_bytes +
         p.tiles * p.tile_bytes;
}

}  // namespace llmkern
