// Activations and their derivatives on Vec (formulas: include/llmkern/activation.h).
//
//   activate<A>(x)           f(x)
//   activate_grad<A>(x, dy)  dy * f'(x)
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
template <class V>
LLMKERN_INLINE Complements<V> sigmoid(V x) {
  const V one = V::set1(1);
  const V e = exp_nonpositive(V::neg(V::abs(x)));
  const V large = one / (one + e);
  const V small = e * large;
  const auto positive = V::lt(V::zero(), x);
  return {V::select(positive, large, small), V::select(positive, small, large)};
}

// Phi(x) and, if wanted, the density e^(-x^2/2) / sqrt(2 pi). |x| <= 14, where 1 - Phi < 2^-126.
//
// 1 - Phi(t) = e^(-t^2/2) * R(t) for t >= 0, R the Mills ratio over sqrt(2 pi) as a rational of
// degree 4 over 5: minimax in relative error on [0, 13.3], 2.4e-8 with these coefficients. All
// coefficients are positive, so nothing cancels.
LLMKERN_INLINE VecF normal_cdf(VecF x, VecF* density = nullptr) {
  const VecF t = VecF::abs(x), half = VecF::set1(0.5f) * t;
  // t^2/2 = square + rest; without the rest the relative error of e^-square grows with t^2.
  const VecF square = half * t, rest = VecF::fma(half, t, VecF::neg(square));
  VecF e = exp_nonpositive(VecF::neg(square));
  e = VecF::fnma(e, rest, e);
  VecF p = VecF::set1(4.02016597e-3f);
  p = VecF::fma(p, t, VecF::set1(3.99840139e-2f));
  p = VecF::fma(p, t, VecF::set1(1.81306299e-1f));
  p = VecF::fma(p, t, VecF::set1(4.35685714e-1f));
  p = VecF::fma(p, t, VecF::set1(0.5f));
  VecF q = VecF::set1(1.00769185e-2f);
  q = VecF::fma(q, t, VecF::set1(1.00232441e-1f));
  q = VecF::fma(q, t, VecF::set1(4.64379117e-1f));
  q = VecF::fma(q, t, VecF::set1(1.19448233e+0f));
  q = VecF::fma(q, t, VecF::set1(1.66925635e+0f));
  q = VecF::fma(q, t, VecF::set1(1.0f));
  const VecF upper = e * p / q;
  if (density) *density = e * VecF::set1(0.398942280f);
  return VecF::select(VecF::lt(VecF::zero(), x), VecF::set1(1.0f) - upper, upper);
}

static inline VecD normal_cdf(VecD x, VecD* density = nullptr) {
  if (density)
    *density =
        lanewise(x, [](double t) { return 0.39894228040143267794 * std::exp(-0.5 * t * t); });
  return lanewise(x, [](double t) { return 0.5 * std::erfc(-0.70710678118654752440 * t); });
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

template <Activation kActivation, class V>
LLMKERN_INLINE V activate(V x) {
  using S = typename V::Scalar;
  if constexpr (kActivation == Activation::kRelu) {
    return V::max(V::zero(), x);
  } else if constexpr (kActivation == Activation::kGelu) {
    return V::max(V::set1(S(-Limits<V>::kGelu)), x) *
           normal_cdf(clamp_magnitude(x, Limits<V>::kGelu));
  } else if constexpr (kActivation == Activation::kGeluTanh) {
    const V c = clamp_magnitude(x, Limits<V>::kGelu);
    const V u = c * V::fma(c * c, V::set1(S(kGeluTanhB)), V::set1(S(kGeluTanhA)));
    return V::max(V::set1(S(-Limits<V>::kGelu)), x) * sigmoid(u).p;
  } else if constexpr (kActivation == Activation::kSilu) {
    return V::max(V::set1(S(-Limits<V>::kSilu)), x) * sigmoid(x).p;
  } else {
    return x;
  }
}

template <Activation kActivation, class V>
LLMKERN_INLINE V activate_grad(V x, V dy) {
  using S = typename V::Scalar;
  const V one = V::set1(1);
  if constexpr (kActivation == Activation::kRelu) {
    return V::select(V::le(x, V::zero()), V::zero(), dy);
  } else if constexpr (kActivation == Activation::kGelu) {
    const V c = clamp_magnitude(x, Limits<V>::kGelu);
    V density;
    const V cdf = normal_cdf(c, &density);
    return dy * V::fma(c, density, cdf);
  } else if constexpr (kActivation == Activation::kGeluTanh) {
    const V c = clamp_magnitude(x, Limits<V>::kGelu), square = c * c;
    const auto s = sigmoid(c * V::fma(square, V::set1(S(kGeluTanhB)), V::set1(S(kGeluTanhA))));
    const V slope = V::fma(square, V::set1(S(3 * kGeluTanhB)), V::set1(S(kGeluTanhA)));
    return dy * (s.p * V::fma(c * slope, s.q, one));
  } else if constexpr (kActivation == Activation::kSilu) {
    const V c = clamp_magnitude(x, Limits<V>::kSilu);
    const auto s = sigmoid(c);
    return dy * (s.p * V::fma(c, s.q, one));
  } else {
    return dy;
  }
}

}  // namespace LLMKERN_ISA
}  // namespace llmkern
