// Packing: an operand [rows, K] with any strides becomes panels of R rows, R values a step of k,
// widened to the compute type. A short last panel repeats its last row: those sums are computed
// into room that nobody reads.
//
// Whole vectors are stored, so up to kLanes - 1 values are written behind a panel: panel_size
// includes them.
#pragma once

#include "simd/transpose.h"

namespace llmkern {
namespace LLMKERN_ISA {

template <class C, int R>
constexpr int64_t panel_size(int64_t kc) {
  constexpr int64_t kLine = 64 / sizeof(C);
  return (kc * R + Vec<C>::kLanes + kLine - 1) / kLine * kLine;
}

// k is contiguous: squares of kLanes x kLanes go through the transpose. Column groups run downwards
// inside a square, so that what a short last group writes behind its row is overwritten.
template <class C, int R, class T>
static void pack_along_k(const T* src, int64_t row_stride, int rows, int64_t kc, C* dst) {
  using V = Vec<C>;
  constexpr int kLanes = V::kLanes;
  constexpr int kGroups = (R + kLanes - 1) / kLanes;
  const T* row[kGroups * kLanes];
  for (int i = 0; i < kGroups * kLanes; ++i)
    row[i] = src + row_stride * min_of(i, min_of(rows, R) - 1);
  int64_t k = 0;
  for (; k + kLanes <= kc; k += kLanes) {
    for (int g = kGroups - 1; g >= 0; --g) {
      V t[kLanes];
      for (int i = 0; i < kLanes; ++i)
        t[i] = g * kLanes + i < R ? V::load(row[g * kLanes + i] + k) : V::zero();
      transpose(t);
      for (int i = 0; i < kLanes; ++i) t[i].store(dst + (k + i) * R + g * kLanes);
    }
  }
  for (; k < kc; ++k)
    for (int i = 0; i < R; ++i) dst[k * R + i] = as_float(row[i][k]);
}

// Rows are contiguous at each k: `panels` panels side by side, so that a step of k reads one
// stretch of memory. rows counts those of all the panels.
template <class C, int R, class T>
static void pack_across_k(const T* src, int64_t k_stride, int64_t rows, int64_t panels, int64_t kc,
                          C* dst, int64_t panel_stride) {
  using V = Vec<C>;
  constexpr int kLanes = V::kLanes;
  constexpr int kWidth = (R + kLanes - 1) / kLanes * kLanes;
  // Panels that may be read in whole vectors without leaving the row.
  const int64_t whole = min_of(panels, rows >= kWidth ? (rows - kWidth) / R + 1 : 0);
  for (int64_t k = 0; k < kc; ++k) {
    const T* s = src + k * k_stride;
    C* d = dst + k * R;
    for (int64_t p = 0; p < whole; ++p)
      for (int j = 0; j < kWidth; j += kLanes)
        V::load(s + p * R + j).store(d + p * panel_stride + j);
    for (int64_t p = whole; p < panels; ++p)
      for (int i = 0; i < R; ++i)
        d[p * panel_stride + i] = as_float(s[min_of<int64_t>(p * R + i, rows - 1)]);
  }
}

template <class C, int R, class T>
static void pack_any(const T* src, int64_t row_stride, int64_t k_stride, int rows, int64_t kc,
                     C* dst) {
  for (int64_t k = 0; k < kc; ++k)
    for (int i = 0; i < R; ++i)
      dst[k * R + i] = as_float(src[min_of(i, rows - 1) * row_stride + k * k_stride]);
}

// Rows [0, rows) of src, R a panel, steps [0, kc) of k; panel p starts at dst + p * panel_stride.
template <class C, int R, class T>
static void pack(const T* src, int64_t row_stride, int64_t k_stride, int64_t rows, int64_t kc,
                 C* dst, int64_t panel_stride) {
  const int64_t panels = (rows + R - 1) / R;
  if (row_stride == 1 && k_stride != 1)
    return pack_across_k<C, R>(src, k_stride, rows, panels, kc, dst, panel_stride);
  for (int64_t p = 0; p < panels; ++p) {
    const T* s = src + p * R * row_stride;
    const int n = static_cast<int>(min_of<int64_t>(R, rows - p * R));
    if (k_stride == 1)
      pack_along_k<C, R>(s, row_stride, n, kc, dst + p * panel_stride);
    else
      pack_any<C, R>(s, row_stride, k_stride, n, kc, dst + p * panel_stride);
  }
}

}  // namespace LLMKERN_ISA
}  // namespace llmkern
