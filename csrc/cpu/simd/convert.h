// Scalar conversions between storage types and the compute types float and double: round to nearest
// even, NaN stays NaN (quiet). Included inside the ISA namespace by vec.h, so no weak symbol
// compiled for one instruction set can be linked into another's code.
#pragma once

#include <cstdint>
#include <cstring>

#include "llmkern/dtype.h"

// For functions of some dozen instructions that sit in inner loops: GCC stops inlining them once a
// file has several callers, and a call would load every constant again (gelu: 1.7 times slower).
#define LLMKERN_INLINE static inline __attribute__((always_inline))

namespace llmkern {
namespace LLMKERN_ISA {

static inline uint32_t bits_of(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return u;
}
static inline float float_of(uint32_t u) {
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}

static inline float to_float(BFloat16 h) { return float_of(static_cast<uint32_t>(h.bits) << 16); }

static inline BFloat16 to_bfloat16(float x) {
  uint32_t u = bits_of(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return BFloat16{static_cast<uint16_t>((u >> 16) | 0x40u)};
  return BFloat16{static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};
}

static inline float to_float(Float16 h) {
  const uint32_t sign = (h.bits & 0x8000u) << 16;
  const uint32_t magnitude = h.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return float_of(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
  if (magnitude >= 0x0400u) return float_of(sign | ((magnitude << 13) + 0x38000000u));
  // Subnormal: magnitude * 2^-24 is exact in float.
  return float_of(sign | bits_of(static_cast<float>(magnitude) * 5.9604644775390625e-8f));
}

static inline Float16 to_float16(float x) {
  const uint32_t u = bits_of(x);
  const uint16_t sign = static_cast<uint16_t>((u >> 16) & 0x8000u);
  uint32_t a = u & 0x7fffffffu;
  if (a > 0x7f800000u) return Float16{static_cast<uint16_t>(sign | 0x7e00u | ((a >> 13) & 0x3ffu))};
  if (a >= 0x47800000u) return Float16{static_cast<uint16_t>(sign | 0x7c00u)};
  if (a < 0x38800000u) {
    // Adding 0.5f aligns the mantissa so that the hardware rounds at 2^-24, fp16's last subnormal
    // bit.
    const float shifted = float_of(a) + 0.5f;
    return Float16{static_cast<uint16_t>(sign | (bits_of(shifted) - 0x3f000000u))};
  }
  a += 0xfffu + ((a >> 13) & 1u);
  return Float16{static_cast<uint16_t>(sign | ((a - 0x38000000u) >> 13))};
}

// One spelling for every storage type: load_scalar<C>(p), store_scalar(p, c) with C float or
// double.
static inline float as_float(float x) { return x; }
static inline float as_float(BFloat16 x) { return to_float(x); }
static inline float as_float(Float16 x) { return to_float(x); }
static inline double as_float(double x) { return x; }
static inline void put(float* p, float x) { *p = x; }
static inline void put(BFloat16* p, float x) { *p = to_bfloat16(x); }
static inline void put(Float16* p, float x) { *p = to_float16(x); }
static inline void put(double* p, double x) { *p = x; }

// The type that arithmetic on a storage type runs in.
template <class T>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};
template <class T>
using Compute = typename ComputeOf<T>::type;

template <class T>
static inline T min_of(T a, T b) {
  return b < a ? b : a;
}
template <class T>
static inline T max_of(T a, T b) {
  return a < b ? b : a;
}

}  // namespace LLMKERN_ISA
}  // namespace llmkern
