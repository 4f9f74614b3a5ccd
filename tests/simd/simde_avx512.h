// Makes vec.h choose its AVX-512 form on a CPU without AVX-512: SIMDe's functions stand in for the
// intrinsics. The feature macros come after SIMDe, which would otherwise use the real ones.
#pragma once

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>
#include <string.h>

#define __AVX512F__ 1
#define __AVX512BW__ 1
#define __AVX512VL__ 1
#define __AVX512DQ__ 1

// Missing from SIMDe 0.7.4.
static inline __m256 llmkern_mm512_extractf32x8_ps(__m512 a, int half) {
  __m256 halves[2];
  memcpy(halves, &a, sizeof(halves));
  return halves[half];
}
static inline __m512i llmkern_mm512_cvtps_epi32(__m512 a) {
  const __m256i halves[2] = {_mm256_cvtps_epi32(llmkern_mm512_extractf32x8_ps(a, 0)),
                             _mm256_cvtps_epi32(llmkern_mm512_extractf32x8_ps(a, 1))};
  __m512i r;
  memcpy(&r, halves, sizeof(r));
  return r;
}
#define _mm512_extractf32x8_ps(a, half) llmkern_mm512_extractf32x8_ps(a, half)
#define _mm512_cvtps_epi32(a) llmkern_mm512_cvtps_epi32(a)
