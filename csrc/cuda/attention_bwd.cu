// Attention backward: the terms of each query, then one pass or two (attention_bwd.cuh).
#include "attention_bwd.cuh"
#include "attention_launch.cuh"
#include "kernels.h"

namespace llmkern {
namespace {

constexpr int kDeltaRows = kAttentionThreads / 8;  // eight lanes a row
static_assert(kLockRows % kDeltaRows == 0 && kBlockRows % kLockRows == 0, "a lock has one writer");

// The terms of each query; also sets to 0 what the joint kernel counts in.
template <class T>
__global__ void __launch_bounds__(kAttentionThreads)
    attention_delta_kernel(const AttentionParams p) {
  const int batch = blockIdx.z, head = blockIdx.y, lane = threadIdx.x % 8;
  const int row = blockIdx.x * kDeltaRows + threadIdx.x / 8;
  const bool inside = row < p.q_len;
  const T* out = slab<T>(p.out, batch, head) + row * p.out.row;
  const T* dout = slab<T>(p.dout, batch, head) + row * p.dout.row;
  float sum = 0.0f;
  for (int col = lane * kPack; inside && col < p.value_dim; col += 8 * kPack) {
    float o[kPack], d[kPack];
    load_vector(out + col, o);
    load_vector(dout + col, d);
#pragma unroll
    for (int i = 0; i < kPack; ++i) sum += o[i] * d[i];
  }
  for (int step = 4; step > 0; step /= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
  if (lane != 0) return;
  float2 terms = make_float2(0.0f, 0.0f);
  if (inside) {
    const int64_t at = (static_cast<int64_t>(batch) * p.heads + head) * p.q_len + row;
    terms = make_float2(-p.lse[at] * kLog2E, (p.dlse == nullptr ? 0.0f : p.dlse[at]) - sum);
  }
  float2* to = p.terms.at(batch, p.heads, head, row);
  *to = terms;
  if (p.sums.locks == nullptr || row % kLockRows != 0) return;
  const int64_t lock = (to - p.terms.data) / kLockRows;
  p.sums.locks[lock] = 0;
  if (lock == 0) *p.sums.ticket = 0;
}

// One pass: five products instead of seven, for float sums of dQ in memory. Not where it would
// compute what is not wanted, nor where a query sees no key: no block of keys would write its dQ.
bool is_joint(const AttentionShape& s, bool dq, bool dk, bool dv) {
  const int64_t left = clamp_reach(s.left), right = clamp_reach(s.right);
  const int64_t end_of_first = s.shift + right, start_of_last = s.q_len - 1 + s.shift - left;
  const bool all_see_one =
      s.q_len > 0 && left + right >= 0 && end_of_first >= 0 && start_of_last < s.kv_len;
  const int64_t most_blocks = s.batch * s.kv_heads * ceil_div(s.kv_len, kBlockRows);
  return dq && (dk || dv) && all_see_one && most_blocks <= INT32_MAX;
}

int64_t padded_rows(const AttentionShape& s) {
  return ceil_div(s.q_len, kBlockRows) * kBlockRows;
}

AttentionParams bwd_params(const AttentionBwdArgs& a) {
  AttentionParams p = attention_params(a.shape, a.in);
  p.out = rows_at(a.out, a.out_stride);
  p.dout = rows_at(a.dout, a.dout_stride);
  p.dq = rows_at(a.dq, a.dq_stride);
  p.dk = rows_at(a.dk, a.dk_stride);
  p.dv = rows_at(a.dv, a.dv_stride);
  p.lse = const_cast<float*>(static_cast<const float*>(a.lse));
  p.dlse = static_cast<const float*>(a.dlse);
  p.terms = {static_cast<float2*>(a.scratch), static_cast<int>(padded_rows(a.shape))};
  return p;
}

}  // namespace

int64_t attention_bwd_scratch(const AttentionShape& s, bool dq, bool dk, bool dv) {
  const int64_t rows = s.batch * s.heads * padded_rows(s);
  return is_joint(s, dq, dk, dv) ? rows * (2 + tile_dim(s)) + rows / kLockRows + 1 : rows * 2;
}

void attention_bwd(const AttentionBwdArgs& a, const Place& place) {
  const AttentionShape& s = a.shape;
  AttentionParams p = bwd_params(a);
  if (s.batch * s.heads == 0) return;
  const bool joint = is_joint(s, a.dq != nullptr, a.dk != nullptr, a.dv != nullptr);
  if (joint) {
    const int64_t rows = s.batch * s.heads * p.terms.rows;
    p.sums.dq = static_cast<float*>(a.scratch) + rows * 2;
    p.sums.locks = reinterpret_cast<uint32_t*>(p.sums.dq + rows * tile_dim(s));
    p.sums.ticket = p.sums.locks + rows / kLockRows;
  }
  if (p.q_len > 0) {
    const dim3 rows(p.terms.rows / kDeltaRows, p.heads, s.batch);
    dispatch_attention_type(s, [&](auto t) {
      launch("attention_delta", attention_delta_kernel<decltype(t)>, rows, kAttentionThreads, 0,
             place, p);
    });
  }
  if (joint) return attention_bwd_joint(s, p, place);
  if (p.kv_len > 0 && (a.dk != nullptr || a.dv != nullptr)) attention_bwd_keys(s, p, place);
  if (p.q_len > 0 && a.dq != nullptr) attention_bwd_queries(s, p, place);
}

}  // namespace llmkern
