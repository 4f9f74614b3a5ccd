// Makes vec.h choose its AVX-512 form on a CPU without AVX-512: SIMDe's functions stand in for the
// intrinsics. The feature macros come after SIMDe, which would otherwise use the real ones.
#pragma once

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>
#include <stdint.h>
#include <string.h>

#define __AVX512F__ 1
#define __AVX512BW__ 1
#define __AVX512VL__ 1
#define __AVX512DQ__ 1

// Missing from SIMDe 0.7.4.
static inline __m256 llmkern_extractf32x8(__m512 a, int half) {
  __m256 halves[2];
  memcpy(halves, &a, sizeof(halves));
  return halves[half];
}
static inline __m512i llmkern_cvtps_epi32(__m512 a) {
  const __m256i halves[2] = {_mm256_cvtps_epi32(llmkern_extractf32x8(a, 0)),
                             _mm256_cvtps_epi32(llmkern_extractf32x8(a, 1))};
  __m512i r;
  memcpy(&r, halves, sizeof(r));
  return r;
}
static inline __m512 llmkern_cvtepi32_ps(__m512i a) {
  __m256i in[2];
  memcpy(in, &a, sizeof(in));
  const __m256 halves[2] = {_mm256_cvtepi32_ps(in[0]), _mm256_cvtepi32_ps(in[1])};
  __m512 r;
  memcpy(&r, halves, sizeof(r));
  return r;
}
static inline __m512i llmkern_cvtepu16_epi32(__m256i a) {
  const __m256i halves[2] = {_mm256_cvtepu16_epi32(_mm256_castsi256_si128(a)),
                             _mm256_cvtepu16_epi32(_mm256_extracti128_si256(a, 1))};
  __m512i r;
  memcpy(&r, halves, sizeof(r));
  return r;
}
static inline __m256i llmkern_cvtepi32_epi16(__m512i a) {
  int32_t wide[16];
  int16_t narrow[16];
  memcpy(wide, &a, sizeof(wide));
  for (int i = 0; i < 16; ++i) narrow[i] = (int16_t)wide[i];
  __m256i r;
  memcpy(&r, narrow, sizeof(r));
  return r;
}
static inline __m512 llmkern_cvtph_ps(__m256i a) {
  const __m256 halves[2] = {_mm256_cvtph_ps(_mm256_castsi256_si128(a)),
                            _mm256_cvtph_ps(_mm256_extracti128_si256(a, 1))};
  __m512 r;
  memcpy(&r, halves, sizeof(r));
  return r;
}
static inline __m256i llmkern_cvtps_ph(__m512 a) {
  const __m128i halves[2] = {_mm256_cvtps_ph(llmkern_extractf32x8(a, 0), 0),
                             _mm256_cvtps_ph(llmkern_extractf32x8(a, 1), 0)};
  __m256i r;
  memcpy(&r, halves, sizeof(r));
  return r;
}
static inline __mmask16 llmkern_test_epi8_mask(__m128i a, __m128i b) {
  const __m128i zero = _mm_cmpeq_epi8(_mm_and_si128(a, b), _mm_setzero_si128());
  return (__mmask16)~_mm_movemask_epi8(zero);
}
// Lanes of a masked store, or of a masked load over zeros.
template <int kBytes, class V, class M, class P>
static inline void llmkern_store_lanes(P* p, M mask, V v) {
  char lanes[sizeof(V)];
  memcpy(lanes, &v, sizeof(V));
  for (unsigned i = 0; i < sizeof(V) / kBytes; ++i)
    if (mask >> i & 1) memcpy((char*)p + i * kBytes, lanes + i * kBytes, kBytes);
}
template <int kBytes, class V, class M, class P>
static inline V llmkern_load_lanes(M mask, const P* p) {
  char lanes[sizeof(V)] = {};
  for (unsigned i = 0; i < sizeof(V) / kBytes; ++i)
    if (mask >> i & 1) memcpy(lanes + i * kBytes, (const char*)p + i * kBytes, kBytes);
  V v;
  memcpy(&v, lanes, sizeof(V));
  return v;
}
#define _mm512_stream_ps(p, v) _mm512_storeu_ps(p, v)
#define _mm512_extractf32x8_ps(a, half) llmkern_extractf32x8(a, half)
#define _mm512_cvtps_epi32(a) llmkern_cvtps_epi32(a)
#define _mm512_cvtepi32_ps(a) llmkern_cvtepi32_ps(a)
#define _mm512_cvtepu16_epi32(a) llmkern_cvtepu16_epi32(a)
#define _mm512_cvtepi32_epi16(a) llmkern_cvtepi32_epi16(a)
#define _mm512_cvtph_ps(a) llmkern_cvtph_ps(a)
#define _mm512_cvtps_ph(a, rounding) llmkern_cvtps_ph(a)
#define _mm_test_epi8_mask(a, b) llmkern_test_epi8_mask(a, b)
#define _mm512_mask_storeu_ps(p, m, v) llmkern_store_lanes<4>(p, m, v)
#define _mm512_mask_storeu_pd(p, m, v) llmkern_store_lanes<8>(p, m, v)
#define _mm256_mask_storeu_epi16(p, m, v) llmkern_store_lanes<2>(p, m, v)
#define _mm512_maskz_loadu_ps(m, p) llmkern_load_lanes<4, __m512>(m, p)
#define _mm512_maskz_loadu_pd(m, p) llmkern_load_lanes<8, __m512d>(m, p)
#define _mm256_maskz_loadu_epi16(m, p) llmkern_load_lanes<2, __m256i>(m, p)
