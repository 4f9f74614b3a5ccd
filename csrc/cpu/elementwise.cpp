// Dropout and activations over memory; the contract is in include/llmkern/elementwise.h.
#include "llmkern/elementwise.h"

#include "columns.h"
#include "parallel.h"
#include "simd/activation.h"
#include "simd/dropout.h"

namespace llmkern {
namespace LLMKERN_ISA {
namespace {

// A span is a task: its input, output and keep bits stay in the first-level cache.
constexpr int64_t kSpan = 2048;
// Spans worth a thread: a fork costs about as much as dropping 16k elements.
constexpr int64_t kGrainSpans = 8;

// f(row, first column, columns) over [rows, cols], in parallel.
template <class F>
void for_spans(int64_t rows, int64_t cols, const F& f) {
  const int64_t spans = (cols + kSpan - 1) / kSpan;
  const int64_t grain = spans > 1 ? kGrainSpans : kGrainSpans * kSpan / max_of<int64_t>(1, cols);
  parallel_ranges(rows * spans, grain, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t first = t % spans * kSpan;
      f(t / spans, first, min_of<int64_t>(kSpan, cols - first));
    }
  });
}

// f(T{}) for the storage type.
template <class F>
void by_dtype(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(float{});
    case DType::kBFloat16:
      return f(BFloat16{});
    case DType::kFloat16:
      return f(Float16{});
    case DType::kFloat64:
      return f(double{});
  }
}

template <Activation kActivation>
struct Tag {
  static constexpr Activation value = kActivation;
};

template <class F>
void by_activation(Activation activation, const F& f) {
  switch (activation) {
    case Activation::kNone:
      return f(Tag<Activation::kNone>{});
    case Activation::kRelu:
      return f(Tag<Activation::kRelu>{});
    case Activation::kGelu:
      return f(Tag<Activation::kGelu>{});
    case Activation::kGeluTanh:
      return f(Tag<Activation::kGeluTanh>{});
    case Activation::kSilu:
      return f(Tag<Activation::kSilu>{});
  }
}

template <class T>
void drop_span(const DropoutArgs& a, const FlatDropout& drop, int64_t first, const T* x, T* y,
               int64_t n) {
  using V = Vec<Compute<T>>;
  const V scale = V::set1(keep_scale<Compute<T>>(a.drop_threshold));
  KeepBits<kSpan> bits;
  drop.keep(first, n, &bits);
  for_columns<V::kLanes>(n, [&](int64_t j, int lanes) {
    const V v = load<V>(x + j, lanes) * scale;
    store(y + j, V::keep(bits.template mask<typename V::Mask>(j), v), lanes);
  });
}

}  // namespace

void dropout(const DropoutArgs& a) {
  const FlatDropout drop{static_cast<uint64_t>(*a.seed), a.drop_threshold,
                         keep_scale<float>(a.drop_threshold)};
  by_dtype(a.dtype, [&](auto type) {
    using T = decltype(type);
    for_spans(a.rows, a.cols, [&](int64_t row, int64_t first, int64_t n) {
      drop_span(a, drop, row * a.cols + first,
                static_cast<const T*>(a.x) + row * a.x_stride + first,
                static_cast<T*>(a.y) + row * a.y_stride + first, n);
    });
  });
}

void activation_fwd(const ActivationFwdArgs& a) {
  by_dtype(a.dtype, [&](auto type) {
    using T = decltype(type);
    using V = Vec<Compute<T>>;
    by_activation(a.activation, [&](auto tag) {
      for_spans(a.rows, a.cols, [&](int64_t row, int64_t first, int64_t n) {
        const T* x = static_cast<const T*>(a.x) + row * a.x_stride + first;
        T* y = static_cast<T*>(a.y) + row * a.y_stride + first;
        for_column_groups<V::kLanes, kActivationGroup>(n, [&](int64_t j, int lanes, auto count) {
          constexpr int kCount = decltype(count)::value;
          V v[kCount];
          for (int i = 0; i < kCount; ++i) v[i] = load<V>(x + j + i * V::kLanes, lanes);
          activate<decltype(tag)::value>(v);
          for (int i = 0; i < kCount; ++i) store(y + j + i * V::kLanes, v[i], lanes);
        });
      });
    });
  });
}

void activation_bwd(const ActivationBwdArgs& a) {
  by_dtype(a.dtype, [&](auto type) {
    using T = decltype(type);
    using V = Vec<Compute<T>>;
    by_activation(a.activation, [&](auto tag) {
      for_spans(a.rows, a.cols, [&](int64_t row, int64_t first, int64_t n) {
        const T* x = static_cast<const T*>(a.x) + row * a.x_stride + first;
        const T* dy = static_cast<const T*>(a.dy) + row * a.dy_stride + first;
        T* dx = static_cast<T*>(a.dx) + row * a.cols + first;
        for_column_groups<V::kLanes, kActivationGroup>(n, [&](int64_t j, int lanes, auto count) {
          constexpr int kCount = decltype(count)::value;
          V at[kCount], d[kCount];
          for (int i = 0; i < kCount; ++i) {
            at[i] = load<V>(x + j + i * V::kLanes, lanes);
            d[i] = load<V>(dy + j + i * V::kLanes, lanes);
          }
          activate_grad<decltype(tag)::value>(at, d);
          for (int i = 0; i < kCount; ++i) store(dx + j + i * V::kLanes, d[i], lanes);
        });
      });
    });
  });
}

}  // namespace LLMKERN_ISA
}  // namespace llmkern
