// Elementary functions on Vec. float: polynomials on the vector unit; double: libm lane by lane,
// since float64 serves checking, not speed.
#pragma once

#include <cmath>

#include "vec.h"

namespace llmkern {
namespace LLMKERN_ISA {

// e^x: x = n ln 2 + r, |r| <= ln2/2, degree-6 Taylor-minimax in r, then 2^n. Relative error below
// 2 ulp; exp(-inf) = 0, results below 2^-126 are 0, exp(+big) = inf, NaN stays NaN.
static inline VecF exp(VecF x) {
  const VecF lowest = VecF::set1(-87.33654f), highest = VecF::set1(88.72283f);
  const VecF n = VecF::round(
      VecF::min(VecF::set1(127.0f), VecF::max(VecF::set1(-126.0f), x * VecF::set1(1.44269504f))));
  VecF r = VecF::fnma(n, VecF::set1(0.693359375f), x);
  r = VecF::fnma(n, VecF::set1(-2.12194440e-4f), r);
  VecF p = VecF::set1(1.9875691500e-4f);
  p = VecF::fma(p, r, VecF::set1(1.3981999507e-3f));
  p = VecF::fma(p, r, VecF::set1(8.3334519073e-3f));
  p = VecF::fma(p, r, VecF::set1(4.1665795894e-2f));
  p = VecF::fma(p, r, VecF::set1(1.6666665459e-1f));
  p = VecF::fma(p, r, VecF::set1(5.0000001201e-1f));
  p = VecF::fma(p, r * r, r + VecF::set1(1.0f));
  const VecF y = p * VecF::pow2(n);
  const VecF capped = VecF::select(VecF::lt(highest, x), VecF::set1(HUGE_VALF), y);
  return VecF::select(VecF::lt(x, lowest), VecF::zero(), capped);
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

}  // namespace LLMKERN_ISA
}  // namespace llmkern
