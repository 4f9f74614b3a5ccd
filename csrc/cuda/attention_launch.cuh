// What the attention launchers share on the host.
#pragma once

#include <type_traits>

#include "attention.cuh"
#include "launch.cuh"

namespace llmkern {

inline Rows rows_at(const void* data, const int64_t (&stride)[3]) {
  return {data, stride[0], stride[1], stride[2]};
}

// Limits that no index reaches, small enough to be added in 32 bits.
constexpr int64_t kFar = INT64_C(1) << 29;

inline int clamp_reach(int64_t reach) {
  return static_cast<int>(reach > kFar ? kFar : reach < -kFar ? -kFar : reach);
}

inline AttentionParams attention_params(const AttentionShape& s, const AttentionInputs& in) {
  AttentionParams p{};
  p.q = rows_at(in.q, in.q_stride);
  p.k = rows_at(in.k, in.k_stride);
  p.v = rows_at(in.v, in.v_stride);
  p.heads = static_cast<int>(s.heads);
  p.group = s.kv_heads > 0 ? static_cast<int>(s.heads / s.kv_heads) : 0;  // no heads, no blocks
  p.q_len = static_cast<int>(s.q_len);
  p.kv_len = static_cast<int>(s.kv_len);
  p.head_dim = static_cast<int>(s.head_dim);
  p.value_dim = static_cast<int>(s.value_dim);
  p.scale = static_cast<float>(s.scale);
  p.shift = static_cast<int>(s.shift);
  p.left = clamp_reach(s.left);
  p.right = clamp_reach(s.right);
  p.key_mask = in.key_mask;
  p.dropout = dropout_of(s.drop_threshold, s.seed);
  return p;
}

// What head dims are filled up to.
inline int tile_dim(const AttentionShape& s) {
  return s.head_dim <= 64 && s.value_dim <= 64 ? 64 : 128;
}

// f(T{}): the storage type.
template <class F>
void dispatch_attention_type(const AttentionShape& s, F&& f) {
  s.dtype == DType::kBFloat16 ? f(BFloat16{}) : f(Float16{});
}

// f(T{}, integral_constant<int, kD>): also the head dim that a tile has.
template <class F>
void dispatch_attention(const AttentionShape& s, F&& f) {
  dispatch_attention_type(s, [&](auto t) {
    tile_dim(s) == 64 ? f(t, std::integral_constant<int, 64>{})
                      : f(t, std::integral_constant<int, 128>{});
  });
}

}  // namespace llmkern
