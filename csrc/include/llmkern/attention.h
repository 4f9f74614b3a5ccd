// Scaled dot-product attention: plain arguments, no torch. Axes (docs/kernels.md): B batch, H query
// heads, G kv heads (H % G == 0; query head h reads kv head h / (H / G)), S query length, T key
// length, D query/key dim, Dv value dim.
//
//   s_ij = scale * <q_i, k_j>;  if softcap > 0: s_ij = softcap * tanh(s_ij / softcap)
//   s_ij += bias_ij - slope_bh * |i + shift - j|
//   key j is visible to query i iff  i + shift - left <= j <= i + shift + right,  mask_ij != 0,
//   key_mask_bj != 0; a bias of -inf hides the key too
//   lse_i = log(exp(sink_h) + sum_j exp(s_ij));  p_ij = exp(s_ij - lse_i);  out_i = sum_j
//   drop(p_ij) v_j
//
// A row that sees no key: out = 0, lse = -inf (sink_h with sinks), no gradient. A hidden key's k
// and v are never multiplied, so a NaN there goes nowhere. Dropout element (b*H + h, i, j):
// llmkern/random.py.
#pragma once

#include "llmkern/dtype.h"

namespace llmkern {

constexpr int64_t kUnbounded = INT64_C(1) << 62;

struct AttentionShape {
  DType dtype;  // of q, k, v, out, d*; arithmetic and lse in float (double for kFloat64)
  int64_t batch, heads, kv_heads, q_len, kv_len, head_dim, value_dim;
  double scale, softcap;       // softcap 0: off
  int64_t shift, left, right;  // the band of visible keys; left / right kUnbounded: no limit
  uint32_t drop_threshold;     // of 65536; 0: no dropout
  float drop_scale;            // 1 / (1 - threshold / 65536)
  const int64_t* seed;         // one value; null without dropout
};

// Strides are in elements: [0] batch, [1] head, [2] row; the last dim has stride 1.
struct AttentionInputs {
  const void *q, *k, *v;
  int64_t q_stride[3], k_stride[3], v_stride[3];
  const void* bias;  // null, or float32 / float64 (compute type); strides b h i j, 0 = broadcast
  int64_t bias_stride[4];
  const uint8_t* mask;  // null, or nonzero = keep; strides b h i j, 0 = broadcast
  int64_t mask_stride[4];
  const uint8_t* key_mask;  // null, or [B, T], nonzero = keep; rows contiguous
  const float* slopes;      // null, or ALiBi slopes; strides b h
  int64_t slopes_stride[2];
  const float* sinks;  // null, or [H]
};

struct AttentionFwdArgs {
  AttentionShape shape;
  AttentionInputs in;
  void* out;
  int64_t out_stride[3];
  void* lse;      // [B, H, S] contiguous, float (double for kFloat64)
  void* scratch;  // attention_fwd_scratch_bytes
};

struct AttentionBwdArgs {
  AttentionShape shape;
  AttentionInputs in;
  const void *out, *dout;
  int64_t out_stride[3], dout_stride[3];
  const void* lse;
  const void* dlse;    // null, or as lse
  void *dq, *dk, *dv;  // any may be null: not wanted
  int64_t dq_stride[3], dk_stride[3], dv_stride[3];
  void* dbias;  // null, or compute type, zero-filled, strides as bias (0 = summed over)
  int64_t dbias_stride[4];
  float* dsinks;  // null, or [H]
  void* scratch;  // attention_bwd_scratch_bytes
};

}  // namespace llmkern
