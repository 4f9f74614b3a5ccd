// What the check programs share: counted failures, ulp distance, probe values.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstring>

#include "simd/vec.h"

namespace llmkern {
namespace LLMKERN_ISA {

static int failures = 0;

static inline void fail(const char* what, double input, double got, double want) {
  if (++failures <= 20)
    std::printf("FAIL %s at %.9g: got %.9g, want %.9g\n", what, input, got, want);
}

// |got - want| in units of the last place of max(|want|, smallest) as a float.
static inline double ulps(float got, double want, double smallest) {
  if (std::isnan(want) || std::isnan(got))
    return std::isnan(want) && std::isnan(got) ? 0 : HUGE_VAL;
  const float rounded = static_cast<float>(want);
  if (got == rounded) return 0;
  if (std::isinf(rounded) || std::isinf(got)) return HUGE_VAL;
  int exponent;
  std::frexp(max_of(std::fabs(want), smallest), &exponent);
  return std::fabs(got - want) / std::ldexp(1.0, exponent - 24);
}

static inline bool same_bits(float a, float b) { return bits_of(a) == bits_of(b); }

}  // namespace LLMKERN_ISA
}  // namespace llmkern
