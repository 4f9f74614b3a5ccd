// Attention calls for the check programs: inputs of one batch, every feature at once and one by
// one, at sizes around panels, blocks and the path for few queries; and the formula's scores in
// double.
#pragma once

#include "check.h"
#include "decisions.h"
#include "llmkern/attention.h"

namespace llmkern {
namespace LLMKERN_ISA {

constexpr int64_t kHeads = 4, kKvHeads = 2, kMostLen = 150, kMostDim = 80;
constexpr double kScoreScale = 0.5;
constexpr int64_t kSeed = 0x123456789abcdef;

struct Case {
  int64_t q_len, kv_len, head_dim, value_dim, shift, left, right;
  double softcap;
  bool bias, mask, key_mask, slopes, sinks;
  uint32_t drop_threshold;
};

constexpr Case kCases[] = {
    {1, 1, 1, 1, 0, kUnbounded, kUnbounded, 0, false, false, false, false, false, 0},
    {3, 100, 20, 9, 97, kUnbounded, 0, 0, true, false, true, false, true, 0},
    {5, 97, 64, 80, 0, kUnbounded, kUnbounded, 0, false, false, true, false, false, 0},
    {33, 33, 64, 64, 0, kUnbounded, 0, 0, false, false, false, false, false, 0},
    {70, 130, 17, 33, 60, 40, 3, 0, false, true, false, true, false, 6554},
    {41, 96, 8, 16, 0, kUnbounded, kUnbounded, 1.5, true, false, false, false, false, 0},
    {129, 150, 40, 24, 21, 100, 5, 2.0, true, true, true, true, true, 32768},
};

static inline double noise(int64_t i) { return static_cast<double>(i * 7919 % 1009) / 504.5 - 1.0; }

template <class T>
double value(T x) {
  return static_cast<double>(as_float(x));
}

template <class T>
void fill(T* to, int64_t n, int64_t from, double scale) {
  for (int64_t i = 0; i < n; ++i) {
    put(to + i, static_cast<Compute<T>>(scale * noise(from + i)));
  }
}

// [heads][rows][dim], all contiguous; bias and mask [q_len][kv_len].
template <class T>
struct Inputs {
  T q[kHeads * kMostLen * kMostDim], k[kKvHeads * kMostLen * kMostDim];
  T v[kKvHeads * kMostLen * kMostDim];
  Compute<T> bias[kMostLen * kMostLen];
  uint8_t mask[kMostLen * kMostLen], key_mask[kMostLen];
  float slopes[kHeads], sinks[kHeads];

  void make(const Case& c) {
    fill(q, kHeads * c.q_len * c.head_dim, 1, 1.0);
    fill(k, kKvHeads * c.kv_len * c.head_dim, 2, 1.0);
    fill(v, kKvHeads * c.kv_len * c.value_dim, 3, 1.0);
    fill(bias, c.q_len * c.kv_len, 4, 2.0);
    fill(slopes, kHeads, 5, 0.2);
    fill(sinks, kHeads, 6, 1.0);
    for (int64_t i = 0; i < c.q_len * c.kv_len; ++i) {
      if (noise(i) < -0.6) bias[i] = static_cast<Compute<T>>(-HUGE_VAL);
      mask[i] = noise(3 * i + 1) < 0.5;
    }
    for (int64_t j = 0; j < c.kv_len; ++j) {
      key_mask[j] = noise(5 * j) < 0.5;
      // What no query sees may be anything.
      if (c.key_mask && !key_mask[j]) put(v + j * c.value_dim, static_cast<Compute<T>>(NAN));
    }
  }

  bool visible(const Case& c, int64_t i, int64_t j) const {
    const int64_t at = i + c.shift;
    if (j < at - c.left || j > at + c.right) return false;
    if (c.bias && bias[i * c.kv_len + j] == -HUGE_VAL) return false;
    if (c.mask && !mask[i * c.kv_len + j]) return false;
    return !c.key_mask || key_mask[j];
  }

  // capped receives softcap's tanh, else 0.
  double score(const Case& c, int64_t h, int64_t i, int64_t j, double* capped) const {
    double s = 0;
    for (int64_t d = 0; d < c.head_dim; ++d) {
      s += value(q[(h * c.q_len + i) * c.head_dim + d]) *
           value(k[(h / 2 * c.kv_len + j) * c.head_dim + d]);
    }
    s *= kScoreScale;
    *capped = c.softcap > 0 ? std::tanh(s / c.softcap) : 0;
    if (c.softcap > 0) s = c.softcap * *capped;
    if (c.bias) s += static_cast<double>(bias[i * c.kv_len + j]);
    if (c.slopes) {
      s -= static_cast<double>(slopes[h]) * std::fabs(static_cast<double>(i + c.shift - j));
    }
    return s;
  }

  // Factor of a probability in the output: 0 where it is dropped.
  static double kept(const Case& c, int64_t h, int64_t i, int64_t j) {
    if (!c.drop_threshold) return 1;
    return attention_keeps(h, i, j, kSeed, c.drop_threshold) ? 65536.0 / (65536 - c.drop_threshold)
                                                             : 0;
  }

  AttentionShape shape(const Case& c, DType dtype) const {
    const float scale = 65536.0f / static_cast<float>(65536 - c.drop_threshold);
    return {dtype,       1,           kHeads,    kKvHeads, c.q_len, c.kv_len, c.head_dim,
            c.value_dim, kScoreScale, c.softcap, c.shift,  c.left,  c.right,  c.drop_threshold,
            scale,       &kSeed};
  }

  AttentionInputs arguments(const Case& c) const {
    AttentionInputs in{};
    in.q = q;
    in.k = k;
    in.v = v;
    rows(in.q_stride, c.q_len, c.head_dim);
    rows(in.k_stride, c.kv_len, c.head_dim);
    rows(in.v_stride, c.kv_len, c.value_dim);
    in.bias = c.bias ? bias : nullptr;
    in.mask = c.mask ? mask : nullptr;
    in.bias_stride[2] = in.mask_stride[2] = c.kv_len;
    in.bias_stride[3] = in.mask_stride[3] = 1;
    in.key_mask = c.key_mask ? key_mask : nullptr;
    in.slopes = c.slopes ? slopes : nullptr;
    in.slopes_stride[1] = 1;
    in.sinks = c.sinks ? sinks : nullptr;
    return in;
  }

  static void rows(int64_t (&stride)[3], int64_t len, int64_t dim) {
    stride[0] = 0;
    stride[1] = len * dim;
    stride[2] = dim;
  }
};

}  // namespace LLMKERN_ISA
}  // namespace llmkern
