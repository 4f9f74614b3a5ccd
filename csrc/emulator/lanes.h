// Handlers for lane-wise operations, made from an Op with a static `apply`. With all lanes on the
// loops are plain and vectorise; a destination is either exactly a source or apart from it, which
// is what LLMKERN_LANES_APART asserts.
#pragma once

#include "machine.h"

// clang has no such pragma but one that demands vectors; it compares the addresses at run time.
#if defined(__clang__)
#define LLMKERN_LANES_APART
#else
#define LLMKERN_LANES_APART _Pragma("GCC ivdep")
#endif

namespace llmkern {
namespace emulator {

template <class D, class A, class Op>
void unary(Warp& w, const Instr& in, uint32_t mask) {
  D* d = w.at<D>(in.r[0]);
  const A* a = w.at<A>(in.r[1]);
  if (mask == kAllLanes) {
LLMKERN_LANES_APART
    for (int l = 0; l < kLanes; ++l) d[l] = Op::apply(a[l]);
  } else {
    for_lanes(mask, [&](int l) { d[l] = Op::apply(a[l]); });
  }
}

template <class D, class A, class B, class Op>
void binary(Warp& w, const Instr& in, uint32_t mask) {
  D* d = w.at<D>(in.r[0]);
  const A* a = w.at<A>(in.r[1]);
  const B* b = w.at<B>(in.r[2]);
  if (mask == kAllLanes) {
LLMKERN_LANES_APART
    for (int l = 0; l < kLanes; ++l) d[l] = Op::apply(a[l], b[l]);
  } else {
    for_lanes(mask, [&](int l) { d[l] = Op::apply(a[l], b[l]); });
  }
}

template <class D, class A, class B, class C, class Op>
void ternary(Warp& w, const Instr& in, uint32_t mask) {
  D* d = w.at<D>(in.r[0]);
  const A* a = w.at<A>(in.r[1]);
  const B* b = w.at<B>(in.r[2]);
  const C* c = w.at<C>(in.r[3]);
  if (mask == kAllLanes) {
LLMKERN_LANES_APART
    for (int l = 0; l < kLanes; ++l) d[l] = Op::apply(a[l], b[l], c[l]);
  } else {
    for_lanes(mask, [&](int l) { d[l] = Op::apply(a[l], b[l], c[l]); });
  }
}

// Op over one type throughout.
template <class T, class Op>
constexpr Handler unary_of = &unary<T, T, Op>;
template <class T, class Op>
constexpr Handler binary_of = &binary<T, T, T, Op>;
template <class T, class Op>
constexpr Handler ternary_of = &ternary<T, T, T, T, Op>;

// Lane masks: bit l of the result is test(l).
template <class F>
inline uint32_t lane_mask(const F& test) {
  uint32_t bits[kLanes];
  for (int l = 0; l < kLanes; ++l) bits[l] = test(l) ? 1u << l : 0u;
  uint32_t mask = 0;
  for (int l = 0; l < kLanes; ++l) mask |= bits[l];
  return mask;
}

inline void set_predicate(Warp& w, uint32_t offset, uint32_t mask, uint32_t value) {
  uint32_t* p = w.at<uint32_t>(offset);
  *p = (*p & ~mask) | (value & mask);
}

}  // namespace emulator
}  // namespace llmkern
