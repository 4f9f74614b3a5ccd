// Loops over a row of any length on vectors: whole ones, then one masked tail.
#pragma once

#include <type_traits>

#include "simd/vec.h"

namespace llmkern {
namespace LLMKERN_ISA {

// f(column, lanes) over the row; lanes < kLanes only for the tail. f is inlined twice, so that in
// the main loop `lanes` is a constant and the masked forms vanish; without flatten GCC calls a
// large f, which then loads all its constants for each vector.
template <int kLanes, class F>
__attribute__((flatten)) static inline void for_columns(int64_t cols, const F& f) {
  int64_t j = 0;
  for (; j + kLanes <= cols; j += kLanes) f(j, kLanes);
  if (j < cols) f(j, static_cast<int>(cols - j));
}

// The same in groups: f(j, lanes, count) with count = std::integral_constant<int, kGroup> for that
// many whole vectors from j on, else <int, 1>.
template <int kLanes, int kGroup, class F>
__attribute__((flatten)) static inline void for_column_groups(int64_t cols, const F& f) {
  int64_t j = 0;
  for (; j + kGroup * kLanes <= cols; j += kGroup * kLanes)
    f(j, kLanes, std::integral_constant<int, kGroup>{});
  for (; j + kLanes <= cols; j += kLanes) f(j, kLanes, std::integral_constant<int, 1>{});
  if (j < cols) f(j, static_cast<int>(cols - j), std::integral_constant<int, 1>{});
}

template <class V, class T>
static inline V load(const T* p, int lanes) {
  return lanes == V::kLanes ? V::load(p) : V::load_n(p, lanes);
}

template <class T, class V>
static inline void store(T* p, V v, int lanes) {
  if (lanes == V::kLanes) {
    v.store(p);
  } else {
    v.store_n(p, lanes);
  }
}

}  // namespace LLMKERN_ISA
}  // namespace llmkern
