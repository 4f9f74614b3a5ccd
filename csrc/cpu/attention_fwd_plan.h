// Block sizes of the attention forward pass and the scratch they take; independent of the
// instruction set, so that the caller can allocate before a kernel is chosen.
#pragma once

#include <cstdint>

#include "llmkern/attention.h"

namespace llmkern {

// A task holds up to kFwdQueries queries against kFwdKeys keys at a time. Queries: 128 instead of
// 64 halve how often k and v are read (10 % where a head's k and v outgrow L2); packed q and out,
// 32 KB each at D = 64, pass through L1 panel by panel. Keys: 96 are whole AVX2 register tiles (6)
// and dropout counters (8); 48 to 144 measure alike, 192 is 5 % slower.
constexpr int64_t kFwdQueries = 128, kFwdKeys = 96;
constexpr int64_t kFwdPanel = 32;  // lanes of the widest panel

// Offsets in elements of the compute type into one thread's scratch.
struct FwdPlan {
  int64_t query, out, scores, bias, keys, values, max, sum, thread_bytes;
};

static inline FwdPlan fwd_plan(const AttentionShape& s) {
  FwdPlan p{};
  int64_t at = 0;
  const auto take = [&at](int64_t elements) {
    const int64_t begin = at;
    at += (elements + 15) / 16 * 16;
    return begin;
  };
  p.query = take(kFwdQueries * s.head_dim);
  p.out = take(kFwdQueries * s.value_dim);
  p.scores = take(kFwdKeys * kFwdPanel);
  p.bias = take(kFwdKeys * kFwdPanel);
  p.keys = take(kFwdKeys * s.head_dim);
  p.values = take(kFwdKeys * s.value_dim);
  p.max = take(kFwdQueries);
  p.sum = take(kFwdQueries);
  p.thread_bytes = at * (s.dtype == DType::kFloat64 ? 8 : 4);
  return p;
}

// Bytes for any number of threads up to `threads`; the address need not be aligned.
static inline int64_t attention_fwd_scratch_bytes(const AttentionShape& s, int threads) {
  return fwd_plan(s).thread_bytes * threads + 64;
}

}  // namespace llmkern
