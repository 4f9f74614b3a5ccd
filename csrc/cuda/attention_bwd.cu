// Attention backward: the terms of each query, then one pass or two (attention_bwd.cuh).
#include "attention_bwd.cuh"
#include "attention_launch.cuh"
#include "kernels.h"

namespace llmkern {
namespace {

// Eight lanes share a row, and each takes part in four of them.
constexpr int kLaneRows = 4, kRowsApart = kWarp / 8;
constexpr int kWarpDeltas = kLaneRows * kRowsApart;
constexpr int kDeltaRows = kWarpDeltas * kAttentionThreads / kWarp;
static_assert(kBlockRows % kDeltaRows == 0, "terms are written up to whole blocks");
static_assert(kDeltaRows % kLockRows == 0, "a lock has one writer");

// Of four rows' parts in a lane, the sum over eight lanes of one: of row lane / 2 % 2 + lane % 2
// * 2.
__device__ inline float sum_rows(const float (&part)[kLaneRows]) {
  const bool odd = threadIdx.x & 1, second = threadIdx.x & 2;
  float pair[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    pair[i] = odd ? part[2 + i] : part[i];
    pair[i] += ptx::shfl_sync_bfly<1>(odd ? part[i] : part[2 + i]);
  }
  float sum = second ? pair[1] : pair[0];
  sum += ptx::shfl_sync_bfly<2>(second ? pair[0] : pair[1]);
  return sum + ptx::shfl_sync_bfly<4>(sum);
}

// The terms of each query; also sets to 0 what the joint kernel counts in.
template <class T>
__global__ void __launch_bounds__(kAttentionThreads)
    attention_delta_kernel(const AttentionParams p) {
  const int batch = blockIdx.z, head = blockIdx.y, lane = threadIdx.x % 8;
  const int row0 =
      blockIdx.x * kDeltaRows + threadIdx.x / kWarp * kWarpDeltas + threadIdx.x % kWarp / 8;
  const T* out = slab<T>(p.out, batch, head);
  const T* dout = slab<T>(p.dout, batch, head);
  float part[kLaneRows] = {};
  for (int col = lane * kPack; col < p.value_dim; col += 8 * kPack) {
#pragma unroll
    for (int i = 0; i < kLaneRows; ++i) {
      const int row = min(row0 + i * kRowsApart, p.q_len - 1);
      float o[kPack], d[kPack];
      load_vector(out + row * p.out.row + col, o);
      load_vector(dout + row * p.dout.row + col, d);
#pragma unroll
      for (int e = 0; e < kPack; ++e) part[i] += o[e] * d[e];
    }
  }
  const float sum = sum_rows(part);
  if (lane >= kLaneRows) return;
  const int row = row0 + (lane / 2 + lane % 2 * 2) * kRowsApart;
  float2 terms = make_float2(0.0f, 0.0f);
  if (row < p.q_len) {
    const int64_t at = (static_cast<int64_t>(batch) * p.heads + head) * p.q_len + row;
    terms = make_float2(-p.lse[at] * kLog2E, (p.dlse == nullptr ? 0.0f : p.dlse[at]) - sum);
  }
  float2* to = p.terms.at(batch, p.heads, head, row);
  *to = terms;
  if (p.sums.locks == nullptr || row % kLockRows != 0) return;
  const uint64_t lock = static_cast<uint64_t>(to - p.terms.data) / kLockRows;
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
  return dq && (dk || dv) && all_see_one && most_blocks > 0 && most_blocks <= INT32_MAX;
}

int64_t padded_rows(const AttentionShape& s) { return ceil_div(s.q_len, kBlockRows) * kBlockRows; }

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
