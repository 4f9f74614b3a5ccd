// Activations and their derivatives on Vec (formulas: include/llmkern/activation.h).
//
//   activate<A>(x)           f(x)
//   activate_grad<A>(x, dy)  dy * f'(x)
//
// and both on arrays of vectors, step by step side by side: 4 are a fifth faster than one after the
// other (Zen 3, 2026-11-22), whose chain of 25 dependent operations fills the scheduler.
//
// float: errors below 8 ulp (of 0.02 for smaller results, of 0.5 for derivatives; measured by
// tests/simd/check_math.cpp), and relative accuracy far down the negative tail, where
// x/2 * (1 + erf) would cancel. Limits hold at +-inf (at -inf -0, not NaN), no finite input gives
// NaN, NaN stays NaN. Inputs are clamped where f has reached its limit in float, since inf * 0 is
// NaN. double: libm lane by lane.
#pragma once

#include "llmkern/activation.h"
#include "math.h"

namespace llmkern {
namespace LLMKERN_ISA {

template <class V>
LLMKERN_INLINE V clamp_magnitude(V x, double limit) {
  using S = typename V::Scalar;
  return V::min(V::set1(S(limit)), V::max(V::set1(S(-limit)), x));
}

// p(x) and 1 - p(x), each without cancellation.
template <class V>
struct Complements {
  V p, q;
};

// 1 / (1 + e^-x) and its complement, from e^-|x| alone, which cannot overflow.
template <int N, class V>
LLMKERN_INLINE void sigmoid(const V (&x)[N], Complements<V> (&s)[N]) {
  const V one = V::set1(1);
  V e[N], large[N];
  for (int i = 0; i < N; ++i) e[i] = V::neg(V::abs(x[i]));
  exp_nonpositive(e);
  for (int i = 0; i < N; ++i) large[i] = one / (one + e[i]);
  for (int i = 0; i < N; ++i) {
    const V small = e[i] * large[i];
    const auto positive = V::lt(V::zero(), x[i]);
    s[i] = {V::select(positive, large[i], small), V::select(positive, small, large[i])};
  }
}

// Phi(x) and, if wanted, the density e^(-x^2/2) / sqrt(2 pi). |x| <= 14, where 1 - Phi < 2^-126.
//
// 1 - Phi(t) = e^(-t^2/2) * R(t) for t >= 0, R the Mills ratio over sqrt(2 pi) as a rational of
// degree 4 over 5: minimax in relative error on [0, 13.3], 2.4e-8 with these coefficients. All
// coefficients are positive, so nothing cancels.
template <int N>
LLMKERN_INLINE void normal_cdf(const VecF (&x)[N], VecF (&cdf)[N], VecF* density = nullptr) {
  VecF t[N], e[N], rest[N], p[N], q[N];
  for (int i = 0; i < N; ++i) t[i] = VecF::abs(x[i]);
  // t^2/2 = square + rest; without the rest the relative error of e^-square grows with t^2.
  for (int i = 0; i < N; ++i) {
    const VecF half = VecF::set1(0.5f) * t[i], square = half * t[i];
    e[i] = VecF::neg(square);
    rest[i] = VecF::fma(half, t[i], e[i]);
  }
  const auto step = [&](VecF(&r)[N], float c) {
    for (int i = 0; i < N; ++i) r[i] = VecF::fma(r[i], t[i], VecF::set1(c));
  };
  for (int i = 0; i < N; ++i) {
    p[i] = VecF::set1(4.02016597e-3f);
    q[i] = VecF::set1(1.00769185e-2f);
  }
  step(p, 3.99840139e-2f);
  step(q, 1.00232441e-1f);
  step(p, 1.81306299e-1f);
  step(q, 4.64379117e-1f);
  step(p, 4.35685714e-1f);
  step(q, 1.19448233e+0f);
  step(p, 0.5f);
  step(q, 1.66925635e+0f);
  step(q, 1.0f);
  for (int i = 0; i < N; ++i) p[i] = p[i] / q[i];
  exp_nonpositive(e);
  for (int i = 0; i < N; ++i) e[i] = VecF::fnma(e[i], rest[i], e[i]);
  for (int i = 0; i < N; ++i) {
    const VecF upper = e[i] * p[i];
    if (density) density[i] = e[i] * VecF::set1(0.398942280f);
    cdf[i] = VecF::select(VecF::lt(VecF::zero(), x[i]), VecF::set1(1.0f) - upper, upper);
  }
}

template <int N>
static inline void normal_cdf(const VecD (&x)[N], VecD (&cdf)[N], VecD* density = nullptr) {
  for (int i = 0; i < N; ++i) {
    if (density) {
      density[i] =
          lanewise(x[i], [](double t) { return 0.39894228040143267794 * std::exp(-0.5 * t * t); });
    }
    cdf[i] = lanewise(x[i], [](double t) { return 0.5 * std::erfc(-0.70710678118654752440 * t); });
  }
}

// Beyond these |x| the function and its derivative are at their limits (results below the normal
// range are 0).
template <class V>
struct Limits {
  static constexpr double kGelu = 14, kSilu = 104;
};
template <>
struct Limits<VecD> {
  static constexpr double kGelu = 40, kSilu = 760;
};

// gelu_tanh(x) = x * sigmoid(u(x)) with u = 2 sqrt(2/pi) (x + 0.044715 x^3) = x (a + b x^2).
constexpr double kGeluTanhA = 1.59576912160573071176, kGeluTanhB = 0.07135481627260025;

constexpr int kActivationGroup = 4;

template <Activation kActivation, int N, class V>
LLMKERN_INLINE void activate(V (&x)[N]) {
  using S = typename V::Scalar;
  if constexpr (kActivation == Activation::kRelu) {
    for (int i = 0; i < N; ++i) x[i] = V::max(V::zero(), x[i]);
  } else if constexpr (kActivation == Activation::kGelu) {
    V c[N], cdf[N];
    for (int i = 0; i < N; ++i) c[i] = clamp_magnitude(x[i], Limits<V>::kGelu);
    normal_cdf(c, cdf);
    for (int i = 0; i < N; ++i) x[i] = V::max(V::set1(S(-Limits<V>::kGelu)), x[i]) * cdf[i];
  } else if constexpr (kActivation == Activation::kGeluTanh) {
    V u[N];
    Complements<V> s[N];
    for (int i = 0; i < N; ++i) {
      const V c = clamp_magnitude(x[i], Limits<V>::kGelu);
      u[i] = c * V::fma(c * c, V::set1(S(kGeluTanhB)), V::set1(S(kGeluTanhA)));
    }
    sigmoid(u, s);
    for (int i = 0; i < N; ++i) x[i] = V::max(V::set1(S(-Limits<V>::kGelu)), x[i]) * s[i].p;
  } else if constexpr (kActivation == Activation::kSilu) {
    Complements<V> s[N];
    sigmoid(x, s);
    for (int i = 0; i < N; ++i) x[i] = V::max(V::set1(S(-Limits<V>::kSilu)), x[i]) * s[i].p;
  }
}

template <Activation kActivation, class V>
LLMKERN_INLINE V activate(V x) {
  V one[1] = {x};
  activate<kActivation>(one);
  return one[0];
}

// dy[i] becomes the gradient of x[i].
template <Activation kActivation, int N, class V>
LLMKERN_INLINE void activate_grad(const V (&x)[N], V (&dy)[N]) {
  using S = typename V::Scalar;
  const V one = V::set1(1);
  if constexpr (kActivation == Activation::kRelu) {
    for (int i = 0; i < N; ++i) dy[i] = V::select(V::le(x[i], V::zero()), V::zero(), dy[i]);
  } else if constexpr (kActivation == Activation::kGelu) {
    V c[N], cdf[N], density[N];
    for (int i = 0; i < N; ++i) c[i] = clamp_magnitude(x[i], Limits<V>::kGelu);
    normal_cdf(c, cdf, density);
    for (int i = 0; i < N; ++i) dy[i] = dy[i] * V::fma(c[i], density[i], cdf[i]);
  } else if constexpr (kActivation == Activation::kGeluTanh) {
    V c[N], u[N];
    Complements<V> s[N];
    for (int i = 0; i < N; ++i) {
      c[i] = clamp_magnitude(x[i], Limits<V>::kGelu);
      u[i] = c[i] * V::fma(c[i] * c[i], V::set1(S(kGeluTanhB)), V::set1(S(kGeluTanhA)));
    }
    sigmoid(u, s);
    for (int i = 0; i < N; ++i) {
      const V slope = V::fma(c[i] * c[i], V::set1(S(3 * kGeluTanhB)), V::set1(S(kGeluTanhA)));
      dy[i] = dy[i] * (s[i].p * V::fma(c[i] * slope, s[i].q, one));
    }
  } else if constexpr (kActivation == Activation::kSilu) {
    V c[N];
    Complements<V> s[N];
    for (int i = 0; i < N; ++i) c[i] = clamp_magnitude(x[i], Limits<V>::kSilu);
    sigmoid(c, s);
    for (int i = 0; i < N; ++i) dy[i] = dy[i] * (s[i].p * V::fma(c[i], s[i].q, one));
  }
}

template <Activation kActivation, class V>
LLMKERN_INLINE V activate_grad(V x, V dy) {
  const V at[1] = {x};
  V gradient[1] = {dy};
  activate_grad<kActivation>(at, gradient);
  return gradient[0];
}

}  // namespace LLMKERN_ISA
}  // namespace llmkern
