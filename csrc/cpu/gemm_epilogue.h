// From sums to outputs: bias, activation (or gate), dropout and residual, one store. Formulas:
// llmkern/gemm.h.
#pragma once

#include <type_traits>

#include "llmkern/gemm.h"
#include "simd/activation.h"
#include "columns.h"
#include "simd/dropout.h"

namespace llmkern {
namespace LLMKERN_ISA {

constexpr int kStretch = 512;  // columns whose dropout decisions are held at a time

// Dropout of stretches of a row. A dropped element is 0 even where it was Inf or NaN.
struct RowDropout {
  FlatDropout flat;
  double scale;  // not flat.scale: double data needs all of it
  KeepBits<kStretch> bits;

  RowDropout(uint32_t threshold, const int64_t* seed)
      : flat{threshold ? static_cast<uint64_t>(*seed) : 0, threshold, 0},
        scale(threshold < 65536 ? 65536.0 / (65536 - threshold) : 0.0) {}
  bool on() const { return flat.threshold != 0; }
  // For elements [first, first + n), n <= kStretch.
  void draw(int64_t first, int64_t n) {
    if (on() && flat.threshold < 65536) flat.keep(first, n, &bits);
  }
  template <class V>
  V apply(int64_t j, V v) const {
    if (flat.threshold == 65536) return V::zero();
    const V factor = V::set1(static_cast<typename V::Scalar>(scale));
    return V::keep(bits.mask<typename V::Mask>(j), v * factor);
  }
};

// Columns [col, col + cols) of one row of an output that is n columns wide. S is the type of the
// product: sums in the compute type, or another library's result.
template <class T, class S, Activation kAct>
void epilogue_row(const LinearEpilogue& e, int64_t n, const S* product, const S* up, int64_t row,
                  int64_t col, int64_t cols) {
  using V = Vec<Compute<T>>;
  RowDropout drop(e.drop_threshold, e.seed);
  const T* const bias[2] = {static_cast<const T*>(e.bias[0]), static_cast<const T*>(e.bias[1])};
  T* const preact[2] = {static_cast<T*>(e.preact[0]), static_cast<T*>(e.preact[1])};
  const T* const residual =
      e.residual ? static_cast<const T*>(e.residual) + row * e.residual_stride : nullptr;
  T* const y = static_cast<T*>(e.y) + row * e.y_stride;
  const auto linear = [&](int part, const S* p, int64_t c, int lanes) {
    V z = load<V>(p, lanes);
    if (bias[part]) z = z + load<V>(bias[part] + c, lanes);
    if (preact[part]) store(preact[part] + row * n + c, z, lanes);
    return z;
  };
  for (int64_t begin = 0; begin < cols; begin += kStretch) {
    const int64_t length = min_of<int64_t>(kStretch, cols - begin), first = col + begin;
    drop.draw(row * n + first, length);
    for_columns<V::kLanes>(length, [&](int64_t j, int lanes) {
      const int64_t c = first + j;
      V v = activate<kAct>(linear(0, product + begin + j, c, lanes));
      if (up) v = v * linear(1, up + begin + j, c, lanes);
      if (drop.on()) v = drop.apply(j, v);
      if (residual) v = v + load<V>(residual + c, lanes);
      store(y + c, v, lanes);
    });
  }
}

// f(std::integral_constant<Activation, kind>)
template <class F>
void with_activation(Activation kind, const F& f) {
  switch (kind) {
    case Activation::kNone:
      return f(std::integral_constant<Activation, Activation::kNone>{});
    case Activation::kRelu:
      return f(std::integral_constant<Activation, Activation::kRelu>{});
    case Activation::kGelu:
      return f(std::integral_constant<Activation, Activation::kGelu>{});
    case Activation::kGeluTanh:
      return f(std::integral_constant<Activation, Activation::kGeluTanh>{});
    case Activation::kSilu:
      return f(std::integral_constant<Activation, Activation::kSilu>{});
  }
}

// Rows [row, row + rows) x columns [col, col + cols); product (and up, used when gated) hold just
// these, `stride` apart.
template <class T, class S>
void epilogue_block(const LinearEpilogue& e, bool gated, int64_t n, const S* product, const S* up,
                    int64_t stride, int64_t row, int64_t rows, int64_t col, int64_t cols) {
  with_activation(e.activation, [&](auto kind) {
    for (int64_t i = 0; i < rows; ++i)
      epilogue_row<T, S, decltype(kind)::value>(
          e, n, product + i * stride, gated ? up + i * stride : nullptr, row + i, col, cols);
  });
}

}  // namespace LLMKERN_ISA
}  // namespace llmkern
