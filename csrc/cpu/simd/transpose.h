// transpose(t): t[i] lane j <-> t[j] lane i for a square of kLanes vectors.
#pragma once

#include "vec.h"

namespace llmkern {
namespace LLMKERN_ISA {

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)

// Two rounds inside the 128-bit lanes, two that move whole lanes.
static inline void transpose(VecF (&t)[16]) {
  __m512 u[16], w[16];
  for (int i = 0; i < 16; i += 2) {
    u[i] = _mm512_unpacklo_ps(t[i].v, t[i + 1].v);
    u[i + 1] = _mm512_unpackhi_ps(t[i].v, t[i + 1].v);
  }
  for (int i = 0; i < 16; i += 4) {
    for (int j = 0; j < 2; ++j) {
      w[i + 2 * j] = _mm512_shuffle_ps(u[i + j], u[i + j + 2], 0x44);
      w[i + 2 * j + 1] = _mm512_shuffle_ps(u[i + j], u[i + j + 2], 0xee);
    }
  }
  // w[4 * q + c]: columns c, c + 4, c + 8, c + 12 of rows 4q .. 4q + 3, one a lane.
  for (int c = 0; c < 4; ++c) {
    const __m512 a = _mm512_shuffle_f32x4(w[c], w[4 + c], 0x44);
    const __m512 b = _mm512_shuffle_f32x4(w[c], w[4 + c], 0xee);
    const __m512 d = _mm512_shuffle_f32x4(w[8 + c], w[12 + c], 0x44);
    const __m512 e = _mm512_shuffle_f32x4(w[8 + c], w[12 + c], 0xee);
    t[c].v = _mm512_shuffle_f32x4(a, d, 0x88);
    t[4 + c].v = _mm512_shuffle_f32x4(a, d, 0xdd);
    t[8 + c].v = _mm512_shuffle_f32x4(b, e, 0x88);
    t[12 + c].v = _mm512_shuffle_f32x4(b, e, 0xdd);
  }
}

static inline void transpose(VecD (&t)[8]) {
  __m512d u[8];
  for (int i = 0; i < 8; i += 2) {
    u[i] = _mm512_unpacklo_pd(t[i].v, t[i + 1].v);
    u[i + 1] = _mm512_unpackhi_pd(t[i].v, t[i + 1].v);
  }
  // u[2 * q + c]: columns c, c + 2, c + 4, c + 6 of rows 2q, 2q + 1, one a lane.
  for (int c = 0; c < 2; ++c) {
    const __m512d a = _mm512_shuffle_f64x2(u[c], u[2 + c], 0x44);
    const __m512d b = _mm512_shuffle_f64x2(u[c], u[2 + c], 0xee);
    const __m512d d = _mm512_shuffle_f64x2(u[4 + c], u[6 + c], 0x44);
    const __m512d e = _mm512_shuffle_f64x2(u[4 + c], u[6 + c], 0xee);
    t[c].v = _mm512_shuffle_f64x2(a, d, 0x88);
    t[2 + c].v = _mm512_shuffle_f64x2(a, d, 0xdd);
    t[4 + c].v = _mm512_shuffle_f64x2(b, e, 0x88);
    t[6 + c].v = _mm512_shuffle_f64x2(b, e, 0xdd);
  }
}

#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

static inline void transpose(VecF (&t)[8]) {
  __m256 u[8], w[8];
  for (int i = 0; i < 8; i += 2) {
    u[i] = _mm256_unpacklo_ps(t[i].v, t[i + 1].v);
    u[i + 1] = _mm256_unpackhi_ps(t[i].v, t[i + 1].v);
  }
  for (int i = 0; i < 8; i += 4) {
    for (int j = 0; j < 2; ++j) {
      w[i + 2 * j] = _mm256_shuffle_ps(u[i + j], u[i + j + 2], 0x44);
      w[i + 2 * j + 1] = _mm256_shuffle_ps(u[i + j], u[i + j + 2], 0xee);
    }
  }
  for (int c = 0; c < 4; ++c) {
    t[c].v = _mm256_permute2f128_ps(w[c], w[4 + c], 0x20);
    t[4 + c].v = _mm256_permute2f128_ps(w[c], w[4 + c], 0x31);
  }
}

static inline void transpose(VecD (&t)[4]) {
  __m256d u[4];
  for (int i = 0; i < 4; i += 2) {
    u[i] = _mm256_unpacklo_pd(t[i].v, t[i + 1].v);
    u[i + 1] = _mm256_unpackhi_pd(t[i].v, t[i + 1].v);
  }
  for (int c = 0; c < 2; ++c) {
    t[c].v = _mm256_permute2f128_pd(u[c], u[2 + c], 0x20);
    t[2 + c].v = _mm256_permute2f128_pd(u[c], u[2 + c], 0x31);
  }
}

#else

template <class V, int N>
static inline void transpose(V (&t)[N]) {
  for (int i = 0; i < N; ++i) {
    for (int j = 0; j < i; ++j) {
      const auto x = t[i].v[j];
      t[i].v[j] = t[j].v[i];
      t[j].v[i] = x;
    }
  }
}

#endif

}  // namespace LLMKERN_ISA
}  // namespace llmkern
