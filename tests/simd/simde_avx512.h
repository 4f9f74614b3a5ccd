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

// Lane by lane, through memory. Masked-off lanes are never touched.
#define LLMKERN_MASKED(name, Vector, Element, lanes, Mask)                         \
  static inline Vector llmkern_load_##name(Mask mask, const void* p) {             \
    Element lane[lanes] = {};                                                      \
    for (int i = 0; i < lanes; ++i)                                                \
      if (mask >> i & 1) memcpy(lane + i, (const Element*)p + i, sizeof(Element)); \
    Vector r;                                                                      \
    memcpy(&r, lane, sizeof(r));                                                   \
    return r;                                                                      \
  }                                                                                \
  static inline void llmkern_store_##name(void* p, Mask mask, Vector v) {          \
    Element lane[lanes];                                                           \
    memcpy(lane, &v, sizeof(v));                                                   \
    for (int i = 0; i < lanes; ++i)                                                \
      if (mask >> i & 1) memcpy((Element*)p + i, lane + i, sizeof(Element));       \
  }
LLMKERN_MASKED(ps, __m512, float, 16, __mmask16)
LLMKERN_MASKED(pd, __m512d, double, 8, __mmask8)
LLMKERN_MASKED(epi16, __m256i, int16_t, 16, __mmask16)
#undef LLMKERN_MASKED

static inline __m512 llmkern_mm512_cvtepi32_ps(__m512i a) {
  int32_t from[16];
  float to[16];
  memcpy(from, &a, sizeof(a));
  for (int i = 0; i < 16; ++i) to[i] = (float)from[i];
  __m512 r;
  memcpy(&r, to, sizeof(r));
  return r;
}
static inline __m512i llmkern_mm512_cvtepu16_epi32(__m256i a) {
  uint16_t from[16];
  int32_t to[16];
  memcpy(from, &a, sizeof(a));
  for (int i = 0; i < 16; ++i) to[i] = from[i];
  __m512i r;
  memcpy(&r, to, sizeof(r));
  return r;
}
static inline __m256i llmkern_mm512_cvtepi32_epi16(__m512i a) {
  int32_t from[16];
  int16_t to[16];
  memcpy(from, &a, sizeof(a));
  for (int i = 0; i < 16; ++i) to[i] = (int16_t)from[i];
  __m256i r;
  memcpy(&r, to, sizeof(r));
  return r;
}
static inline __m512 llmkern_mm512_cvtph_ps(__m256i a) {
  __m128i half[2];
  memcpy(half, &a, sizeof(a));
  const __m256 widened[2] = {_mm256_cvtph_ps(half[0]), _mm256_cvtph_ps(half[1])};
  __m512 r;
  memcpy(&r, widened, sizeof(r));
  return r;
}

static inline __m256i llmkern_mm512_cvtps_ph(__m512 a) {
  __m256 half[2];
  memcpy(half, &a, sizeof(a));
  const __m128i narrowed[2] = {_mm256_cvtps_ph(half[0], 0), _mm256_cvtps_ph(half[1], 0)};
  __m256i r;
  memcpy(&r, narrowed, sizeof(r));
  return r;
}

static inline __mmask16 llmkern_mm_test_epi8_mask(__m128i a, __m128i b) {
  const __m128i zero = _mm_cmpeq_epi8(_mm_and_si128(a, b), _mm_setzero_si128());
  return (__mmask16)~_mm_movemask_epi8(zero);
}

#define _mm_test_epi8_mask(a, b) llmkern_mm_test_epi8_mask(a, b)
#define _mm512_stream_ps(p, v) _mm512_storeu_ps(p, v)
#define _mm512_shuffle_f32x4(a, b, control) simde_mm512_shuffle_f32x4(a, b, control)
#define _mm512_shuffle_f64x2(a, b, control) simde_mm512_shuffle_f64x2(a, b, control)
#define _mm512_cvtps_ph(a, rounding) llmkern_mm512_cvtps_ph(a)
#define _mm512_maskz_loadu_ps(mask, p) llmkern_load_ps(mask, p)
#define _mm512_maskz_loadu_pd(mask, p) llmkern_load_pd(mask, p)
#define _mm256_maskz_loadu_epi16(mask, p) llmkern_load_epi16(mask, p)
#define _mm512_mask_storeu_ps(p, mask, v) llmkern_store_ps(p, mask, v)
#define _mm512_mask_storeu_pd(p, mask, v) llmkern_store_pd(p, mask, v)
#define _mm256_mask_storeu_epi16(p, mask, v) llmkern_store_epi16(p, mask, v)
#define _mm512_cvtepi32_ps(a) llmkern_mm512_cvtepi32_ps(a)
#define _mm512_cvtepu16_epi32(a) llmkern_mm512_cvtepu16_epi32(a)
#define _mm512_cvtepi32_epi16(a) llmkern_mm512_cvtepi32_epi16(a)
#define _mm512_cvtph_ps(a) llmkern_mm512_cvtph_ps(a)
#define _mm512_extractf32x8_ps(a, half) llmkern_mm512_extractf32x8_ps(a, half)
#define _mm512_cvtps_epi32(a) llmkern_mm512_cvtps_epi32(a)
