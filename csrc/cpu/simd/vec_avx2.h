// AVX2 + FMA + F16C vectors: 8 floats, 4 doubles, 8 uint32. The contract is in vec.h.
#pragma once

#include <immintrin.h>

#include "convert.h"

namespace llmkern {
namespace LLMKERN_ISA {

template <class T>
struct Vec;

// All-ones / all-zeros lanes; the first n lanes of a load at (kLaneMask + 8 - n) are ones.
alignas(32) static const int32_t kLaneMask[16] = {-1, -1, -1, -1, -1, -1, -1, -1,
                                                  0,  0,  0,  0,  0,  0,  0,  0};

struct MaskF {
  __m256 m;
  MaskF operator&(MaskF o) const { return {_mm256_and_ps(m, o.m)}; }
  MaskF operator|(MaskF o) const { return {_mm256_or_ps(m, o.m)}; }
  MaskF operator~() const { return {_mm256_xor_ps(m, _mm256_castsi256_ps(_mm256_set1_epi32(-1)))}; }
  bool any() const { return _mm256_movemask_ps(m) != 0; }
  bool all() const { return _mm256_movemask_ps(m) == 0xff; }
  uint32_t bits() const { return static_cast<uint32_t>(_mm256_movemask_ps(m)); }
  static MaskF from_bits(uint32_t b) {
    const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i hit = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(b)), lane);
    return {_mm256_castsi256_ps(_mm256_cmpeq_epi32(hit, lane))};
  }
  static MaskF first(int n) {
    return {_mm256_castsi256_ps(
        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kLaneMask + 8 - n)))};
  }
  // Nonzero bytes are true.
  static MaskF from_bytes(const uint8_t* p) {
    const __m128i b = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    const __m256i w = _mm256_cvtepu8_epi32(b);
    return ~MaskF{_mm256_castsi256_ps(_mm256_cmpeq_epi32(w, _mm256_setzero_si256()))};
  }
};

struct VecU {
  static constexpr int kLanes = 8;
  __m256i v;
  static VecU set1(uint32_t x) { return {_mm256_set1_epi32(static_cast<int>(x))}; }
  static VecU iota() { return {_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)}; }
  static VecU load(const uint32_t* p) {
    return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))};
  }
  void store(uint32_t* p) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
  VecU operator+(VecU o) const { return {_mm256_add_epi32(v, o.v)}; }
  VecU operator-(VecU o) const { return {_mm256_sub_epi32(v, o.v)}; }
  VecU operator^(VecU o) const { return {_mm256_xor_si256(v, o.v)}; }
  VecU operator&(VecU o) const { return {_mm256_and_si256(v, o.v)}; }
  VecU operator|(VecU o) const { return {_mm256_or_si256(v, o.v)}; }
  template <int N>
  VecU shr() const {
    return {_mm256_srli_epi32(v, N)};
  }
  template <int N>
  VecU shl() const {
    return {_mm256_slli_epi32(v, N)};
  }
  static void mul_wide(VecU a, VecU b, VecU* lo, VecU* hi) {
    const __m256i even = _mm256_mul_epu32(a.v, b.v);
    const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64(a.v, 32), _mm256_srli_epi64(b.v, 32));
    lo->v = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
    hi->v = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
  }
  // Signed comparison of lanes; both sides must be below 2^31.
  static MaskF less(VecU a, VecU b) { return {_mm256_castsi256_ps(_mm256_cmpgt_epi32(b.v, a.v))}; }
  static MaskF equal(VecU a, VecU b) { return {_mm256_castsi256_ps(_mm256_cmpeq_epi32(a.v, b.v))}; }
};

template <>
struct Vec<float> {
  static constexpr int kLanes = 8;
  using Mask = MaskF;
  using Scalar = float;
  __m256 v;

  static Vec zero() { return {_mm256_setzero_ps()}; }
  static Vec set1(float x) { return {_mm256_set1_ps(x)}; }
  static Vec broadcast(const float* p) { return {_mm256_broadcast_ss(p)}; }
  static Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static Vec load(const BFloat16* p) {
    const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16))};
  }
  static Vec load(const Float16* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
  }
  static Vec load_n(const float* p, int n) {
    return {_mm256_maskload_ps(p, _mm256_castps_si256(Mask::first(n).m))};
  }
  template <class H>
  static Vec load_n(const H* p, int n) {
    alignas(16) H tmp[8] = {};
    std::memcpy(tmp, p, sizeof(H) * static_cast<size_t>(n));
    return load(tmp);
  }
  void store(float* p) const { _mm256_storeu_ps(p, v); }
  void store(BFloat16* p) const {
    const __m256i u = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    __m256i r = _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    r = _mm256_blendv_epi8(r, _mm256_or_si256(u, _mm256_set1_epi32(0x400000)), nan);
    r = _mm256_srli_epi32(r, 16);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(r, r), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
  }
  void store(Float16* p) const {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  void store_n(float* p, int n) const {
    _mm256_maskstore_ps(p, _mm256_castps_si256(Mask::first(n).m), v);
  }
  template <class H>
  void store_n(H* p, int n) const {
    alignas(16) H tmp[8];
    store(tmp);
    std::memcpy(p, tmp, sizeof(H) * static_cast<size_t>(n));
  }
  void stream(float* p) const { _mm256_stream_ps(p, v); }  // p 32-byte aligned

  Vec operator+(Vec o) const { return {_mm256_add_ps(v, o.v)}; }
  Vec operator-(Vec o) const { return {_mm256_sub_ps(v, o.v)}; }
  Vec operator*(Vec o) const { return {_mm256_mul_ps(v, o.v)}; }
  Vec operator/(Vec o) const { return {_mm256_div_ps(v, o.v)}; }
  static Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
  static Vec fnma(Vec a, Vec b, Vec c) { return {_mm256_fnmadd_ps(a.v, b.v, c.v)}; }
  static Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
  static Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
  static Vec sqrt(Vec a) { return {_mm256_sqrt_ps(a.v)}; }
  static Vec abs(Vec a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
  static Vec neg(Vec a) { return {_mm256_xor_ps(_mm256_set1_ps(-0.0f), a.v)}; }
  static Vec round(Vec a) {
    return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
  }
  // 2^n for integral n in [-126, 127].
  static Vec pow2(Vec n) {
    const __m256i e = _mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(e, 23))};
  }
  static Vec from_bits(VecU u) { return {_mm256_castsi256_ps(u.v)}; }
  VecU to_bits() const { return {_mm256_castps_si256(v)}; }
  static Vec from_uint(VecU u) { return {_mm256_cvtepi32_ps(u.v)}; }  // below 2^31
  static Mask lt(Vec a, Vec b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ)}; }
  static Mask le(Vec a, Vec b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_LE_OQ)}; }
  static Mask eq(Vec a, Vec b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_EQ_OQ)}; }
  static Vec select(Mask m, Vec yes, Vec no) { return {_mm256_blendv_ps(no.v, yes.v, m.m)}; }
  static Vec keep(Mask m, Vec yes) { return {_mm256_and_ps(m.m, yes.v)}; }  // else +0
  float sum() const {
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
  }
  float max_lane() const {
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
  }
};

struct MaskD {
  __m256d m;
  MaskD operator&(MaskD o) const { return {_mm256_and_pd(m, o.m)}; }
  MaskD operator|(MaskD o) const { return {_mm256_or_pd(m, o.m)}; }
  MaskD operator~() const { return {_mm256_xor_pd(m, _mm256_castsi256_pd(_mm256_set1_epi32(-1)))}; }
  bool any() const { return _mm256_movemask_pd(m) != 0; }
  bool all() const { return _mm256_movemask_pd(m) == 0xf; }
  uint32_t bits() const { return static_cast<uint32_t>(_mm256_movemask_pd(m)); }
  static MaskD from_bits(uint32_t b) {
    const __m256i lane = _mm256_setr_epi64x(1, 2, 4, 8);
    const __m256i hit = _mm256_and_si256(_mm256_set1_epi64x(b), lane);
    return {_mm256_castsi256_pd(_mm256_cmpeq_epi64(hit, lane))};
  }
  static MaskD first(int n) { return from_bits((1u << n) - 1u); }
};

template <>
struct Vec<double> {
  static constexpr int kLanes = 4;
  using Mask = MaskD;
  using Scalar = double;
  __m256d v;

  static Vec zero() { return {_mm256_setzero_pd()}; }
  static Vec set1(double x) { return {_mm256_set1_pd(x)}; }
  static Vec broadcast(const double* p) { return {_mm256_broadcast_sd(p)}; }
  static Vec load(const double* p) { return {_mm256_loadu_pd(p)}; }
  static Vec load_n(const double* p, int n) {
    return {_mm256_maskload_pd(p, _mm256_castpd_si256(Mask::first(n).m))};
  }
  void store(double* p) const { _mm256_storeu_pd(p, v); }
  void store_n(double* p, int n) const {
    _mm256_maskstore_pd(p, _mm256_castpd_si256(Mask::first(n).m), v);
  }
  Vec operator+(Vec o) const { return {_mm256_add_pd(v, o.v)}; }
  Vec operator-(Vec o) const { return {_mm256_sub_pd(v, o.v)}; }
  Vec operator*(Vec o) const { return {_mm256_mul_pd(v, o.v)}; }
  Vec operator/(Vec o) const { return {_mm256_div_pd(v, o.v)}; }
  static Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_pd(a.v, b.v, c.v)}; }
  static Vec fnma(Vec a, Vec b, Vec c) { return {_mm256_fnmadd_pd(a.v, b.v, c.v)}; }
  static Vec max(Vec a, Vec b) { return {_mm256_max_pd(a.v, b.v)}; }
  static Vec min(Vec a, Vec b) { return {_mm256_min_pd(a.v, b.v)}; }
  static Vec sqrt(Vec a) { return {_mm256_sqrt_pd(a.v)}; }
  static Vec abs(Vec a) { return {_mm256_andnot_pd(_mm256_set1_pd(-0.0), a.v)}; }
  static Vec neg(Vec a) { return {_mm256_xor_pd(_mm256_set1_pd(-0.0), a.v)}; }
  static Mask lt(Vec a, Vec b) { return {_mm256_cmp_pd(a.v, b.v, _CMP_LT_OQ)}; }
  static Mask le(Vec a, Vec b) { return {_mm256_cmp_pd(a.v, b.v, _CMP_LE_OQ)}; }
  static Mask eq(Vec a, Vec b) { return {_mm256_cmp_pd(a.v, b.v, _CMP_EQ_OQ)}; }
  static Vec select(Mask m, Vec yes, Vec no) { return {_mm256_blendv_pd(no.v, yes.v, m.m)}; }
  static Vec keep(Mask m, Vec yes) { return {_mm256_and_pd(m.m, yes.v)}; }
  double sum() const {
    alignas(32) double t[4];
    store(t);
    return (t[0] + t[2]) + (t[1] + t[3]);
  }
  double max_lane() const {
    alignas(32) double t[4];
    store(t);
    return max_of(max_of(t[0], t[1]), max_of(t[2], t[3]));
  }
};

}  // namespace LLMKERN_ISA
}  // namespace llmkern
