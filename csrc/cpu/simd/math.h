// Elementary functions on Vec. float: polynomials on the vector unit; double: libm lane by lane,
// since float64 serves checking, not speed.
#pragma once

#include <cmath>

#include "vec.h"

namespace llmkern {
namespace LLMKERN_ISA {

// x = n ln 2 + r with |r| <= ln2/2 and n in [-126, 127]; ln 2 in two parts, so r keeps its bits.
LLMKERN_INLINE VecF reduce_exp(VecF x, VecF* n) {
  *n = VecF::round(
      VecF::min(VecF::set1(127.0f), VecF::max(VecF::set1(-126.0f), x * VecF::set1(1.44269504f))));
  const VecF r = VecF::fnma(*n, VecF::set1(0.693359375f), x);
  return VecF::fnma(*n, VecF::set1(-2.12194440e-4f), r);
}

// (e^r - 1 - r) / r^2 for |r| <= ln2/2: Taylor-minimax of degree 5.
LLMKERN_INLINE VecF exp_tail(VecF r) {
  VecF p = VecF::set1(1.9875691500e-4f);
  p = VecF::fma(p, r, VecF::set1(1.3981999507e-3f));
  p = VecF::fma(p, r, VecF::set1(8.3334519073e-3f));
  p = VecF::fma(p, r, VecF::set1(4.1665795894e-2f));
  p = VecF::fma(p, r, VecF::set1(1.6666665459e-1f));
  return VecF::fma(p, r, VecF::set1(5.0000001201e-1f));
}

// e^x. Error below 2 ulp up to x = 88.3, 5 at the last value before overflow; exp(-inf) = 0,
// results below 2^-126 are 0, exp(+big) = inf, NaN stays NaN.
LLMKERN_INLINE VecF exp(VecF x) {
  const VecF lowest = VecF::set1(-87.33654f), highest = VecF::set1(88.72283f);
  VecF n;
  const VecF r = reduce_exp(x, &n);
  const VecF y = VecF::fma(exp_tail(r), r * r, r + VecF::set1(1.0f)) * VecF::pow2(n);
  const VecF capped = VecF::select(VecF::lt(highest, x), VecF::set1(HUGE_VALF), y);
  return VecF::select(VecF::lt(x, lowest), VecF::zero(), capped);
}

// e^x for x <= 0: a softmax after its maximum is subtracted, so this is the attention kernels'
// inner function. Adding 1.5 * 2^23 + 127 rounds x / ln 2 to an integer n and leaves n + 127 in the
// low bits, ready to be shifted into the exponent; x is clamped where that exponent is 0, so
// anything below -87.68, -inf included, gives exactly 0. Degree 6 minimax, 1 and r exact: 4e-9
// before rounding. One constant for ln 2 is enough: its error grows with |x|, the value shrinks
// faster. N vectors side by side, step by step: a single chain of 11 dependent operations fills the
// scheduler before it fills the multipliers.
template <int N>
LLMKERN_INLINE void exp_nonpositive(VecF (&x)[N]) {
  const VecF magic = VecF::set1(12582912.0f + 127.0f), one = VecF::set1(1.0f);
  VecF t[N], p[N];
  for (int i = 0; i < N; ++i) {
    x[i] = VecF::max(VecF::set1(-88.0f), x[i]);
    t[i] = VecF::fma(x[i], VecF::set1(1.44269504f), magic);
  }
  for (int i = 0; i < N; ++i) x[i] = VecF::fnma(t[i] - magic, VecF::set1(0.693147181f), x[i]);
  const auto step = [&](VecF c) {
    for (int i = 0; i < N; ++i) p[i] = VecF::fma(p[i], x[i], c);
  };
  for (int i = 0; i < N; ++i) p[i] = VecF::set1(1.3814583654e-3f);
  step(VecF::set1(8.3687240259e-3f));
  step(VecF::set1(4.1668388993e-2f));
  step(VecF::set1(1.6666522132e-1f));
  step(VecF::set1(4.9999994040e-1f));
  step(one);
  step(one);
  for (int i = 0; i < N; ++i) x[i] = p[i] * VecF::from_bits(t[i].to_bits().template shl<23>());
}

LLMKERN_INLINE VecF exp_nonpositive(VecF x) {
  VecF y[1] = {x};
  exp_nonpositive(y);
  return y[0];
}

// tanh(x) = t / (t + 2) with t = e^(2|x|) - 1, which keeps its relative accuracy down to x = 0.
// Error below 2.5 ulp; 1 from |x| = 9.01 on; NaN stays NaN, -0 stays -0.
LLMKERN_INLINE VecF tanh(VecF x) {
  VecF n;
  // e^40 is beyond what t + 2 can tell from t, and far from overflow.
  const VecF r = reduce_exp(VecF::min(VecF::set1(40.0f), VecF::abs(x + x)), &n);
  const VecF scale = VecF::pow2(n);
  const VecF expm1_r = VecF::fma(exp_tail(r), r * r, r);
  const VecF t = VecF::fma(scale, expm1_r, scale - VecF::set1(1.0f));
  const VecF y = t / (t + VecF::set1(2.0f));
  return VecF::from_bits(y.to_bits() | (x.to_bits() & VecU::set1(0x80000000u)));
}

template <class F>
static inline VecD lanewise(VecD x, F f) {
  double t[VecD::kLanes];
  x.store(t);
  for (int i = 0; i < VecD::kLanes; ++i) t[i] = f(t[i]);
  return VecD::load(t);
}

static inline VecD exp(VecD x) {
  return lanewise(x, [](double t) { return std::exp(t); });
}

static inline VecD exp_nonpositive(VecD x) { return exp(x); }
template <int N>
static inline void exp_nonpositive(VecD (&x)[N]) {
  for (int i = 0; i < N; ++i) x[i] = exp(x[i]);
}

static inline VecD tanh(VecD x) {
  return lanewise(x, [](double t) { return std::tanh(t); });
}

}  // namespace LLMKERN_ISA
}  // namespace llmkern
