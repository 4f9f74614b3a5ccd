// Portable vectors: arrays of 4 floats, 2 doubles, 4 uint32 with plain loops, which the compiler
// maps to whatever the baseline has (SSE2, NEON). The contract is in vec.h.
#pragma once

#include <cmath>

#include "convert.h"

namespace llmkern {
namespace LLMKERN_ISA {

template <class T>
struct Vec;

template <int N>
struct MaskN {
  static constexpr uint32_t kAll = (1u << N) - 1u;
  uint32_t m;
  MaskN operator&(MaskN o) const { return {m & o.m}; }
  MaskN operator|(MaskN o) const { return {m | o.m}; }
  MaskN operator~() const { return {~m & kAll}; }
  bool any() const { return m != 0; }
  bool all() const { return m == kAll; }
  uint32_t bits() const { return m; }
  bool lane(int i) const { return (m >> i) & 1u; }
  static MaskN from_bits(uint32_t b) { return {b & kAll}; }
  static MaskN first(int n) { return {(1u << n) - 1u}; }
  static MaskN from_bytes(const uint8_t* p) {
    uint32_t b = 0;
    for (int i = 0; i < N; ++i) b |= static_cast<uint32_t>(p[i] != 0) << i;
    return {b};
  }
};
using MaskF = MaskN<4>;
using MaskD = MaskN<2>;

#define LLMKERN_LANES for (int i = 0; i < kLanes; ++i)

struct VecU {
  static constexpr int kLanes = 4;
  uint32_t v[kLanes];
  static VecU set1(uint32_t x) { return {{x, x, x, x}}; }
  static VecU iota() { return {{0, 1, 2, 3}}; }
  static VecU load(const uint32_t* p) { return {{p[0], p[1], p[2], p[3]}}; }
  void store(uint32_t* p) const { LLMKERN_LANES p[i] = v[i]; }
  VecU operator+(VecU o) const {
    LLMKERN_LANES o.v[i] = v[i] + o.v[i];
    return o;
  }
  VecU operator-(VecU o) const {
    LLMKERN_LANES o.v[i] = v[i] - o.v[i];
    return o;
  }
  VecU operator^(VecU o) const {
    LLMKERN_LANES o.v[i] = v[i] ^ o.v[i];
    return o;
  }
  VecU operator&(VecU o) const {
    LLMKERN_LANES o.v[i] = v[i] & o.v[i];
    return o;
  }
  VecU operator|(VecU o) const {
    LLMKERN_LANES o.v[i] = v[i] | o.v[i];
    return o;
  }
  template <int N>
  VecU shr() const {
    VecU r;
    LLMKERN_LANES r.v[i] = v[i] >> N;
    return r;
  }
  template <int N>
  VecU shl() const {
    VecU r;
    LLMKERN_LANES r.v[i] = v[i] << N;
    return r;
  }
  static void mul_wide(VecU a, VecU b, VecU* lo, VecU* hi) {
    LLMKERN_LANES {
      const uint64_t w = static_cast<uint64_t>(a.v[i]) * b.v[i];
      lo->v[i] = static_cast<uint32_t>(w);
      hi->v[i] = static_cast<uint32_t>(w >> 32);
    }
  }
  static MaskF less(VecU a, VecU b) {
    uint32_t r = 0;
    LLMKERN_LANES r |=
        static_cast<uint32_t>(static_cast<int32_t>(a.v[i]) < static_cast<int32_t>(b.v[i])) << i;
    return {r};
  }
  static MaskF equal(VecU a, VecU b) {
    uint32_t r = 0;
    LLMKERN_LANES r |= static_cast<uint32_t>(a.v[i] == b.v[i]) << i;
    return {r};
  }
};

// What floats and doubles share; Derived is Vec<float> or Vec<double>.
template <class Derived, class S, int N>
struct VecBase {
  static constexpr int kLanes = N;
  using Mask = MaskN<N>;
  using Scalar = S;
  S v[N];

  static Derived zero() { return set1(S(0)); }
  static Derived set1(S x) {
    Derived r;
    LLMKERN_LANES r.v[i] = x;
    return r;
  }
  static Derived broadcast(const S* p) { return set1(*p); }
  template <class T>
  static Derived load(const T* p) {
    Derived r;
    LLMKERN_LANES r.v[i] = as_float(p[i]);
    return r;
  }
  template <class T>
  static Derived load_n(const T* p, int n) {
    Derived r;
    LLMKERN_LANES r.v[i] = i < n ? as_float(p[i]) : S(0);
    return r;
  }
  template <class T>
  void store(T* p) const {
    LLMKERN_LANES put(p + i, v[i]);
  }
  template <class T>
  void store_n(T* p, int n) const {
    for (int i = 0; i < n; ++i) put(p + i, v[i]);
  }
  void stream(S* p) const { store(p); }

  Derived operator+(Derived o) const {
    LLMKERN_LANES o.v[i] = v[i] + o.v[i];
    return o;
  }
  Derived operator-(Derived o) const {
    LLMKERN_LANES o.v[i] = v[i] - o.v[i];
    return o;
  }
  Derived operator*(Derived o) const {
    LLMKERN_LANES o.v[i] = v[i] * o.v[i];
    return o;
  }
  Derived operator/(Derived o) const {
    LLMKERN_LANES o.v[i] = v[i] / o.v[i];
    return o;
  }
  static Derived fma(Derived a, Derived b, Derived c) {
    LLMKERN_LANES c.v[i] = a.v[i] * b.v[i] + c.v[i];
    return c;
  }
  static Derived fnma(Derived a, Derived b, Derived c) {
    LLMKERN_LANES c.v[i] = c.v[i] - a.v[i] * b.v[i];
    return c;
  }
  // As vmaxps: the second operand where either is NaN.
  static Derived max(Derived a, Derived b) {
    LLMKERN_LANES b.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
    return b;
  }
  static Derived min(Derived a, Derived b) {
    LLMKERN_LANES b.v[i] = a.v[i] < b.v[i] ? a.v[i] : b.v[i];
    return b;
  }
  static Derived sqrt(Derived a) {
    LLMKERN_LANES a.v[i] = std::sqrt(a.v[i]);
    return a;
  }
  static Derived abs(Derived a) {
    LLMKERN_LANES a.v[i] = std::fabs(a.v[i]);
    return a;
  }
  static Derived neg(Derived a) {
    LLMKERN_LANES a.v[i] = -a.v[i];
    return a;
  }
  static Mask lt(Derived a, Derived b) {
    uint32_t r = 0;
    LLMKERN_LANES r |= static_cast<uint32_t>(a.v[i] < b.v[i]) << i;
    return {r};
  }
  static Mask le(Derived a, Derived b) {
    uint32_t r = 0;
    LLMKERN_LANES r |= static_cast<uint32_t>(a.v[i] <= b.v[i]) << i;
    return {r};
  }
  static Mask eq(Derived a, Derived b) {
    uint32_t r = 0;
    LLMKERN_LANES r |= static_cast<uint32_t>(a.v[i] == b.v[i]) << i;
    return {r};
  }
  static Derived select(Mask m, Derived yes, Derived no) {
    LLMKERN_LANES no.v[i] = m.lane(i) ? yes.v[i] : no.v[i];
    return no;
  }
  static Derived keep(Mask m, Derived yes) { return select(m, yes, zero()); }
  S sum() const {
    S t = v[0];
    for (int i = 1; i < N; ++i) t += v[i];
    return t;
  }
  S max_lane() const {
    S t = v[0];
    for (int i = 1; i < N; ++i) t = max_of(t, v[i]);
    return t;
  }
};

template <>
struct Vec<float> : VecBase<Vec<float>, float, 4> {
  static Vec round(Vec a) {
    LLMKERN_LANES a.v[i] = std::nearbyint(a.v[i]);
    return a;
  }
  static Vec pow2(Vec n) {
    LLMKERN_LANES n.v[i] =
        float_of(static_cast<uint32_t>(static_cast<int32_t>(n.v[i]) + 127) << 23);
    return n;
  }
  static Vec from_bits(VecU u) {
    Vec r;
    LLMKERN_LANES r.v[i] = float_of(u.v[i]);
    return r;
  }
  VecU to_bits() const {
    VecU r;
    LLMKERN_LANES r.v[i] = bits_of(v[i]);
    return r;
  }
  static Vec from_uint(VecU u) {
    Vec r;
    LLMKERN_LANES r.v[i] = static_cast<float>(static_cast<int32_t>(u.v[i]));
    return r;
  }
};

template <>
struct Vec<double> : VecBase<Vec<double>, double, 2> {};

#undef LLMKERN_LANES

}  // namespace LLMKERN_ISA
}  // namespace llmkern
