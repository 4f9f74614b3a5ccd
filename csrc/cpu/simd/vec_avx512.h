// AVX-512 F/BW/VL/DQ vectors: 16 floats, 8 doubles, 16 uint32; tails by mask register. The contract
// is in vec.h.
#pragma once

#include <immintrin.h>

#include "convert.h"

namespace llmkern {
namespace LLMKERN_ISA {

template <class T>
struct Vec;

struct MaskF {
  __mmask16 m;
  MaskF operator&(MaskF o) const { return {static_cast<__mmask16>(m & o.m)}; }
  MaskF operator|(MaskF o) const { return {static_cast<__mmask16>(m | o.m)}; }
  MaskF operator~() const { return {static_cast<__mmask16>(~m)}; }
  bool any() const { return m != 0; }
  bool all() const { return m == 0xffff; }
  uint32_t bits() const { return m; }
  static MaskF from_bits(uint32_t b) { return {static_cast<__mmask16>(b)}; }
  static MaskF first(int n) { return {static_cast<__mmask16>((1u << n) - 1u)}; }
  static MaskF from_bytes(const uint8_t* p) {
    const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm_test_epi8_mask(b, b)};
  }
};

struct VecU {
  static constexpr int kLanes = 16;
  __m512i v;
  static VecU set1(uint32_t x) { return {_mm512_set1_epi32(static_cast<int>(x))}; }
  static VecU iota() {
    return {_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)};
  }
  static VecU load(const uint32_t* p) { return {_mm512_loadu_si512(p)}; }
  void store(uint32_t* p) const { _mm512_storeu_si512(p, v); }
  VecU operator+(VecU o) const { return {_mm512_add_epi32(v, o.v)}; }
  VecU operator-(VecU o) const { return {_mm512_sub_epi32(v, o.v)}; }
  VecU operator^(VecU o) const { return {_mm512_xor_si512(v, o.v)}; }
  VecU operator&(VecU o) const { return {_mm512_and_si512(v, o.v)}; }
  VecU operator|(VecU o) const { return {_mm512_or_si512(v, o.v)}; }
  template <int N>
  VecU shr() const {
    return {_mm512_srli_epi32(v, N)};
  }
  template <int N>
  VecU shl() const {
    return {_mm512_slli_epi32(v, N)};
  }
  static void mul_wide(VecU a, VecU b, VecU* lo, VecU* hi) {
    const __m512i even = _mm512_mul_epu32(a.v, b.v);
    const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64(a.v, 32), _mm512_srli_epi64(b.v, 32));
    lo->v = _mm512_mask_blend_epi32(0xaaaa, even, _mm512_slli_epi64(odd, 32));
    hi->v = _mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd);
  }
  static MaskF less(VecU a, VecU b) { return {_mm512_cmpgt_epi32_mask(b.v, a.v)}; }
  static MaskF equal(VecU a, VecU b) { return {_mm512_cmpeq_epi32_mask(a.v, b.v)}; }
};

template <>
struct Vec<float> {
  static constexpr int kLanes = 16;
  using Mask = MaskF;
  using Scalar = float;
  __m512 v;

  static Vec zero() { return {_mm512_setzero_ps()}; }
  static Vec set1(float x) { return {_mm512_set1_ps(x)}; }
  static Vec broadcast(const float* p) { return {_mm512_set1_ps(*p)}; }
  static Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static Vec load(const BFloat16* p) {
    return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static Vec load(const Float16* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
  }
  static Vec load_n(const float* p, int n) { return {_mm512_maskz_loadu_ps(Mask::first(n).m, p)}; }
  static Vec load_n(const BFloat16* p, int n) {
    return widen(_mm256_maskz_loadu_epi16(Mask::first(n).m, p));
  }
  static Vec load_n(const Float16* p, int n) {
    return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(Mask::first(n).m, p))};
  }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  void store(BFloat16* p) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow()); }
  void store(Float16* p) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), half()); }
  void store_n(float* p, int n) const { _mm512_mask_storeu_ps(p, Mask::first(n).m, v); }
  void store_n(BFloat16* p, int n) const {
    _mm256_mask_storeu_epi16(p, Mask::first(n).m, narrow());
  }
  void store_n(Float16* p, int n) const { _mm256_mask_storeu_epi16(p, Mask::first(n).m, half()); }
  void stream(float* p) const { _mm512_stream_ps(p, v); }  // p 64-byte aligned

  Vec operator+(Vec o) const { return {_mm512_add_ps(v, o.v)}; }
  Vec operator-(Vec o) const { return {_mm512_sub_ps(v, o.v)}; }
  Vec operator*(Vec o) const { return {_mm512_mul_ps(v, o.v)}; }
  Vec operator/(Vec o) const { return {_mm512_div_ps(v, o.v)}; }
  static Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
  static Vec fnma(Vec a, Vec b, Vec c) { return {_mm512_fnmadd_ps(a.v, b.v, c.v)}; }
  static Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
  static Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
  static Vec sqrt(Vec a) { return {_mm512_sqrt_ps(a.v)}; }
  static Vec abs(Vec a) { return {_mm512_andnot_ps(_mm512_set1_ps(-0.0f), a.v)}; }
  static Vec neg(Vec a) { return {_mm512_xor_ps(_mm512_set1_ps(-0.0f), a.v)}; }
  static Vec round(Vec a) {
    return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
  }
  static Vec pow2(Vec n) {
    const __m512i e = _mm512_add_epi32(_mm512_cvtps_epi32(n.v), _mm512_set1_epi32(127));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(e, 23))};
  }
  static Vec from_bits(VecU u) { return {_mm512_castsi512_ps(u.v)}; }
  VecU to_bits() const { return {_mm512_castps_si512(v)}; }
  static Vec from_uint(VecU u) { return {_mm512_cvtepi32_ps(u.v)}; }
  static Mask lt(Vec a, Vec b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)}; }
  static Mask le(Vec a, Vec b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LE_OQ)}; }
  static Mask eq(Vec a, Vec b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ)}; }
  static Vec select(Mask m, Vec yes, Vec no) { return {_mm512_mask_blend_ps(m.m, no.v, yes.v)}; }
  static Vec keep(Mask m, Vec yes) { return {_mm512_maskz_mov_ps(m.m, yes.v)}; }
  float sum() const {
    const __m256 x = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    y = _mm_add_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
  }
  float max_lane() const {
    const __m256 x = _mm256_max_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    __m128 y = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    y = _mm_max_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_max_ss(y, _mm_movehdup_ps(y)));
  }

 private:
  static Vec widen(__m256i h) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))};
  }
  __m256i half() const { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  // Not vcvtneps2bf16 even where it exists: that instruction flushes subnormals to zero, and
  // results must not depend on the instruction set.
  __m256i narrow() const {
    const __m512i u = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    __m512i r = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    r = _mm512_mask_or_epi32(r, nan, u, _mm512_set1_epi32(0x400000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(r, 16));
  }
};

struct MaskD {
  __mmask8 m;
  MaskD operator&(MaskD o) const { return {static_cast<__mmask8>(m & o.m)}; }
  MaskD operator|(MaskD o) const { return {static_cast<__mmask8>(m | o.m)}; }
  MaskD operator~() const { return {static_cast<__mmask8>(~m)}; }
  bool any() const { return m != 0; }
  bool all() const { return m == 0xff; }
  uint32_t bits() const { return m; }
  static MaskD from_bits(uint32_t b) { return {static_cast<__mmask8>(b)}; }
  static MaskD first(int n) { return {static_cast<__mmask8>((1u << n) - 1u)}; }
};

template <>
struct Vec<double> {
  static constexpr int kLanes = 8;
  using Mask = MaskD;
  using Scalar = double;
  __m512d v;

  static Vec zero() { return {_mm512_setzero_pd()}; }
  static Vec set1(double x) { return {_mm512_set1_pd(x)}; }
  static Vec broadcast(const double* p) { return {_mm512_set1_pd(*p)}; }
  static Vec load(const double* p) { return {_mm512_loadu_pd(p)}; }
  static Vec load_n(const double* p, int n) { return {_mm512_maskz_loadu_pd(Mask::first(n).m, p)}; }
  void store(double* p) const { _mm512_storeu_pd(p, v); }
  void store_n(double* p, int n) const { _mm512_mask_storeu_pd(p, Mask::first(n).m, v); }
  Vec operator+(Vec o) const { return {_mm512_add_pd(v, o.v)}; }
  Vec operator-(Vec o) const { return {_mm512_sub_pd(v, o.v)}; }
  Vec operator*(Vec o) const { return {_mm512_mul_pd(v, o.v)}; }
  Vec operator/(Vec o) const { return {_mm512_div_pd(v, o.v)}; }
  static Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_pd(a.v, b.v, c.v)}; }
  static Vec fnma(Vec a, Vec b, Vec c) { return {_mm512_fnmadd_pd(a.v, b.v, c.v)}; }
  static Vec max(Vec a, Vec b) { return {_mm512_max_pd(a.v, b.v)}; }
  static Vec min(Vec a, Vec b) { return {_mm512_min_pd(a.v, b.v)}; }
  static Vec sqrt(Vec a) { return {_mm512_sqrt_pd(a.v)}; }
  static Vec abs(Vec a) { return {_mm512_andnot_pd(_mm512_set1_pd(-0.0), a.v)}; }
  static Vec neg(Vec a) { return {_mm512_xor_pd(_mm512_set1_pd(-0.0), a.v)}; }
  static Mask lt(Vec a, Vec b) { return {_mm512_cmp_pd_mask(a.v, b.v, _CMP_LT_OQ)}; }
  static Mask le(Vec a, Vec b) { return {_mm512_cmp_pd_mask(a.v, b.v, _CMP_LE_OQ)}; }
  static Mask eq(Vec a, Vec b) { return {_mm512_cmp_pd_mask(a.v, b.v, _CMP_EQ_OQ)}; }
  static Vec select(Mask m, Vec yes, Vec no) { return {_mm512_mask_blend_pd(m.m, no.v, yes.v)}; }
  static Vec keep(Mask m, Vec yes) { return {_mm512_maskz_mov_pd(m.m, yes.v)}; }
  double sum() const {
    alignas(64) double t[8];
    store(t);
    return ((t[0] + t[4]) + (t[2] + t[6])) + ((t[1] + t[5]) + (t[3] + t[7]));
  }
  double max_lane() const {
    alignas(64) double t[8];
    store(t);
    double x = t[0];
    for (int i = 1; i < 8; ++i) x = max_of(x, t[i]);
    return x;
  }
};

}  // namespace LLMKERN_ISA
}  // namespace llmkern
