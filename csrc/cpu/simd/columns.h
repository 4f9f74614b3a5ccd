// Walking a row by vectors: whole ones, then one masked tail.
#pragma once

#include "vec.h"

namespace llmkern {
namespace LLMKERN_ISA {

// f(column, lanes) over the row; lanes < kLanes only for the tail. Inlined twice, so that in the
// main loop `lanes` is a constant and the masked forms vanish.
template <int kLanes, class F>
inline void for_columns(int64_t cols, const F& f) {
  int64_t j = 0;
  for (; j + kLanes <= cols; j += kLanes) f(j, kLanes);
  if (j < cols) f(j, static_cast<int>(cols - j));
}

template <class V, class T>
inline V load(const T* p, int lanes) {
  return lanes == V::kLanes ? V::load(p) : V::load_n(p, lanes);
}
template <class V, class T>
inline void store(T* p, V v, int lanes) {
  if (lanes == V::kLanes) {
    v.store(p);
  } else {
    v.store_n(p, lanes);
  }
}

}  // namespace LLMKERN_ISA
}  // namespace llmkern
