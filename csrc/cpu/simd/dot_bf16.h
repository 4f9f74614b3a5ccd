// acc[i] += a[2i] * b[2i] + a[2i+1] * b[2i+1] over pairs of bf16, where one instruction does it.
#pragma once

#include "vec.h"

namespace llmkern {
namespace LLMKERN_ISA {

#if defined(__AVX512BF16__)
constexpr bool kHasDotBf16 = true;
static inline VecF dot_bf16(VecF acc, VecU a, VecU b) {
  return {_mm512_dpbf16_ps(acc.v, (__m512bh)a.v, (__m512bh)b.v)};
}
#else
constexpr bool kHasDotBf16 = false;
static inline VecF dot_bf16(VecF acc, VecU, VecU) { return acc; }
#endif

}  // namespace LLMKERN_ISA
}  // namespace llmkern
