// How the backward pass is cut and what scratch that takes. Everything here follows from the shapes
// alone: neither the instruction set nor the number of threads changes a sum. Only the number of
// worker slots depends on the threads.
#pragma once

#include <cstddef>
#include <cstdint>

#include "llmkern/attention.h"

namespace llmkern {

// Queries are the lanes of a score block, keys its rows. 64 x 112: the block, its gradient and the
// four operands take 250 KB at D = 64, half of the smallest L2 (512 KB) that this is tuned for; 112
// is 8 register tiles of AVX-512 and 18 2/3 of AVX2, and a multiple of the 8 keys of a dropout
// counter.
constexpr int64_t kBwdQueries = 64;
constexpr int64_t kBwdKeys = 112;
// Rows of scratch matrices are an odd number of cache lines long, so that a panel of register width
// does not fall into a few cache sets.
constexpr int64_t kLineFloats = 16;
// Fewer (batch, kv head) pairs than kBwdPairs do not fill a machine. Then the query blocks of each
// pair are dealt out to parts, each with a dk and dv of its own, and the keys are cut into chunks,
// each with a dq of its own, until there are kBwdItems. A second pass adds up in order.
constexpr int64_t kBwdPairs = 16, kBwdItems = 32;
constexpr int64_t kBwdChunkKeys = 448;  // at least; 4 blocks

struct BwdPlan {
  int64_t scalar_bytes;                // of the compute type
  int64_t q_blocks;                    // of one head
  int64_t parts, chunks;               // of one (batch, kv head) pair
  int64_t chunk_keys;                  // keys of a chunk, a multiple of 8
  int64_t head_ld, value_ld, lane_ld;  // row strides of scratch matrices
  bool sum_keys;                       // dk and dv are summed in scratch, not in place
  int64_t keys_bytes;                  // of the dk and dv of one sum
  int64_t key_sums;                    // how many: one a part, or one a worker
  int64_t query_sums_bytes;            // one dq for each chunk, if there are several
  int64_t slot_bytes, delta_bytes;
};

static inline int64_t bwd_padded(int64_t n) {
  const int64_t lines = (n + kLineFloats - 1) / kLineFloats;
  return (lines | 1) * kLineFloats;
}

static inline int64_t bwd_aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

static inline int64_t bwd_ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The cut into at least kBwdItems items that takes the least scratch: a part costs a dk and a dv, a
// chunk costs a dq of all query heads.
static inline void bwd_cut(const AttentionShape& s, BwdPlan* p) {
  const int64_t pairs = s.batch * s.kv_heads;
  p->parts = p->chunks = 1;
  if (pairs > 0 && pairs < kBwdPairs) {
    const int64_t group = s.heads / s.kv_heads, blocks = group * p->q_blocks;
    int64_t best_items = 0, best_cost = 0;
    for (int64_t chunks = 1; chunks == 1 || chunks * kBwdChunkKeys <= s.kv_len; ++chunks) {
      int64_t parts = bwd_ceil_div(kBwdItems, pairs * chunks);
      if (parts > blocks) parts = blocks > 0 ? blocks : 1;
      const int64_t items = parts * chunks * pairs < kBwdItems ? parts * chunks * pairs : kBwdItems;
      const int64_t cost = (parts > 1 ? parts * s.kv_len * (s.head_dim + s.value_dim) : 0) +
                           (chunks > 1 ? chunks * group * s.q_len * s.head_dim : 0);
      if (items > best_items || (items == best_items && cost < best_cost)) {
        p->parts = parts, p->chunks = chunks;
        best_items = items, best_cost = cost;
      }
      if (parts == 1) break;
    }
  }
  p->chunk_keys = bwd_ceil_div(bwd_ceil_div(s.kv_len, p->chunks), 8) * 8;
}

// Scalars of BwdBlock's buffers: lse, delta; Q^T, dO^T; Q, dO, dQ; K, V; scores, their gradient,
// bias, softcap's tanh.
static inline int64_t bwd_slot_scalars(const AttentionShape& s, const BwdPlan& p) {
  return (2 + s.head_dim + s.value_dim) * p.lane_ld + kBwdQueries * (2 * p.head_ld + p.value_ld) +
         kBwdKeys * (p.head_ld + p.value_ld + 4 * p.lane_ld);
}

static inline BwdPlan bwd_plan(const AttentionShape& s, int threads) {
  BwdPlan p;
  p.scalar_bytes = s.dtype == DType::kFloat64 ? 8 : 4;
  p.q_blocks = bwd_ceil_div(s.q_len, kBwdQueries);
  bwd_cut(s, &p);
  p.head_ld = bwd_padded(s.head_dim);
  p.value_ld = bwd_padded(s.value_dim);
  p.lane_ld = bwd_padded(kBwdQueries);
  p.sum_keys = p.parts > 1 || s.dtype == DType::kBFloat16 || s.dtype == DType::kFloat16;
  p.keys_bytes = bwd_aligned(s.kv_len * (s.head_dim + s.value_dim) * p.scalar_bytes);
  p.key_sums = !p.sum_keys ? 0 : p.parts > 1 ? s.batch * s.kv_heads * p.parts : threads;
  const int64_t rows = s.batch * s.heads * s.q_len;
  p.query_sums_bytes =
      p.chunks > 1 ? bwd_aligned(p.chunks * rows * s.head_dim * p.scalar_bytes) : 0;
  p.slot_bytes = bwd_aligned(bwd_slot_scalars(s, p) * p.scalar_bytes);
  p.delta_bytes = bwd_aligned(rows * p.scalar_bytes);
  return p;
}

// Scratch: delta, a slot for each worker, sums of keys, sums of queries.
static inline int64_t attention_bwd_scratch_bytes(const AttentionShape& s, int threads) {
  const BwdPlan p = bwd_plan(s, threads);
  return p.delta_bytes + threads * p.slot_bytes + p.key_sums * p.keys_bytes + p.query_sums_bytes;
}

}  // namespace llmkern
