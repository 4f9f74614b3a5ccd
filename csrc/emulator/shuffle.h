// Elements of two vectors in a new order. By reference: a vector that is wider than the baseline's has
// no calling convention of its own.
#pragma once

namespace llmkern {
namespace emulator {

// to = elements kOrder of a followed by b; `to` may be one of them.
template <int... kOrder, class V>
inline __attribute__((always_inline)) void shuffle(const V& a, const V& b, V* to) {
#if defined(__clang__)
  *to = __builtin_shufflevector(a, b, kOrder...);
#else  // GCC has the other one from 12 on
  const V order = {kOrder...};
  *to = __builtin_shuffle(a, b, order);
#endif
}

}  // namespace emulator
}  // namespace llmkern
