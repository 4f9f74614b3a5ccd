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
  p.group = static_cast<int>(s.heads / s.kv_heads);
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

// f(T{}, integral_constant<int, kD>): the storage type and the head dim that a tile has.
template <class F>
void dispatch_attention(const AttentionShape& s, F&& f) {
  const auto with_dim = [&](auto t) {
    const bool narrow = s.head_dim <= 64 && s.value_dim <= 64;
    narrow ? f(t, std::integral_constant<int, 64>{}) : f(t, std::integral_constant<int, 128>{});
  };
  s.dtype == DType::kBFloat16 ? with_dim(BFloat16{}) : with_dim(Float16{});
}

}  // namespace llmkern
