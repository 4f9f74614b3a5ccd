// Activations and their derivatives (formulas: llmkern/activation.h) in float. Which one is a
// uniform branch for all elements of a pack.
#pragma once

#include "common.cuh"
#include "llmkern/activation.h"

namespace llmkern {

__device__ inline float sigmoid(float x) {
  return __fdividef(1.0f, 1.0f + ptx::ex2_approx_ftz_f32(-kLog2E * x));
}

// tanh(x) = 2 sigmoid(2x) - 1; gelu_tanh needs (1 + tanh(x)) / 2 = sigmoid(2x) itself.
constexpr float kGeluC = 0.7978845608f;  // sqrt(2 / pi)
constexpr float kGeluCubic = 0.044715f;

__device__ inline float gelu_tanh_gate(float x) {
  return sigmoid(2.0f * kGeluC * (x + kGeluCubic * x * x * x));
}

// The standard normal distribution and its density.
__device__ inline float normal_cdf(float x) { return 0.5f * (1.0f + erff(x * 0.70710678f)); }
__device__ inline float normal_pdf(float x) {
  return 0.39894228f * ptx::ex2_approx_ftz_f32(-0.5f * kLog2E * x * x);
}

template <int N>
__device__ inline void activate(Activation activation, float (&x)[N]) {
  switch (activation) {
    case Activation::kNone:
      return;
    case Activation::kRelu:
#pragma unroll
      for (int i = 0; i < N; ++i) x[i] = x[i] < 0.0f ? 0.0f : x[i];  // NaN stays
      return;
    case Activation::kGelu:
#pragma unroll
      for (int i = 0; i < N; ++i) x[i] *= normal_cdf(x[i]);
      return;
    case Activation::kGeluTanh:
#pragma unroll
      for (int i = 0; i < N; ++i) x[i] *= gelu_tanh_gate(x[i]);
      return;
    case Activation::kSilu:
#pragma unroll
      for (int i = 0; i < N; ++i) x[i] *= sigmoid(x[i]);
      return;
  }
}

// x becomes f'(x).
template <int N>
__device__ inline void derive(Activation activation, float (&x)[N]) {
  switch (activation) {
    case Activation::kNone:
#pragma unroll
      for (int i = 0; i < N; ++i) x[i] = 1.0f;
      return;
    case Activation::kRelu:
#pragma unroll
      for (int i = 0; i < N; ++i) x[i] = x[i] > 0.0f ? 1.0f : 0.0f;
      return;
    case Activation::kGelu:
#pragma unroll
      for (int i = 0; i < N; ++i) x[i] = normal_cdf(x[i]) + x[i] * normal_pdf(x[i]);
      return;
    case Activation::kGeluTanh:
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const float gate = gelu_tanh_gate(x[i]);
        const float inner = 2.0f * kGeluC * (1.0f + 3.0f * kGeluCubic * x[i] * x[i]);
        x[i] = gate + x[i] * gate * (1.0f - gate) * inner;
      }
      return;
    case Activation::kSilu:
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const float s = sigmoid(x[i]);
        x[i] = s * (1.0f + x[i] * (1.0f - s));
      }
      return;
  }
}

}  // namespace llmkern
