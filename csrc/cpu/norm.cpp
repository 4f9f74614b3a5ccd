// LayerNorm and RMSNorm, forward and backward (formulas: include/llmkern/norm.h). A row is read
// into the first-level cache once and passed over there: sum, centred squares, output. The weight
// gradient is summed in kNormBwdChunks fixed row ranges, then across them, so no thread count
// changes a bit.
#include "llmkern/norm.h"

#include <cmath>

#include "parallel.h"
#include "simd/dropout.h"
#include "simd/vec.h"

namespace llmkern {
namespace LLMKERN_ISA {
namespace {

// Rows worth a thread: below ~16k elements the fork costs more than it brings.
constexpr int64_t kGrainElements = 16384;

int64_t row_grain(const NormShape& s) {
  return s.cols > 0 ? max_of<int64_t>(1, kGrainElements / s.cols) : 1;
}

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

// z = drop(x) + residual, written as T.
template <class T>
void add_row(const NormShape& s, int64_t row, const T* x, const T* residual, T* z) {
  using C = Compute<T>;
  using V = Vec<C>;
  constexpr int64_t kBlock = 512;
  alignas(64) float factor[kBlock];
  alignas(64) C scaled[kBlock];
  const FlatDropout drop{s.drop_threshold ? static_cast<uint64_t>(*s.seed) : 0, s.drop_threshold,
                         s.drop_scale};
  for (int64_t begin = 0; begin < s.cols; begin += kBlock) {
    const int64_t n = min_of<int64_t>(kBlock, s.cols - begin);
    if (s.drop_threshold) {
      drop.fill(row * s.cols + begin, n, factor);
      // A dropped element is 0 even where x is Inf or NaN.
      for (int64_t j = 0; j < n; ++j)
        scaled[j] = factor[j] != 0.0f ? static_cast<C>(as_float(x[begin + j]) * factor[j]) : C(0);
    }
    for_columns<V::kLanes>(n, [&](int64_t j, int lanes) {
      V v = s.drop_threshold ? load<V>(scaled + j, lanes) : load<V>(x + begin + j, lanes);
      if (residual) v = v + load<V>(residual + begin + j, lanes);
      store(z + begin + j, v, lanes);
    });
  }
}

// Sum of f(v) over the row in four chains: the add latency is 4 cycles.
template <class T, class F>
Compute<T> row_sum(const T* z, int64_t cols, const F& f) {
  using V = Vec<Compute<T>>;
  V a[4] = {V::zero(), V::zero(), V::zero(), V::zero()};
  int64_t j = 0;
  for (; j + 4 * V::kLanes <= cols; j += 4 * V::kLanes)
    for (int u = 0; u < 4; ++u) a[u] = f(a[u], V::load(z + j + u * V::kLanes), V::kLanes);
  for_columns<V::kLanes>(
      cols - j, [&](int64_t k, int lanes) { a[0] = f(a[0], load<V>(z + j + k, lanes), lanes); });
  return ((a[0] + a[1]) + (a[2] + a[3])).sum();
}

template <class T, class W>
void norm_row(const NormShape& s, const T* z, const W* weight, const W* bias, T* y,
              Compute<T>* mean_out, Compute<T>* rstd_out) {
  using C = Compute<T>;
  using V = Vec<C>;
  const C n = static_cast<C>(s.cols);
  C mean = 0;
  if (!s.rms) mean = row_sum(z, s.cols, [](V a, V v, int) { return a + v; }) / n;
  const V centre = V::set1(mean);
  const C squares = row_sum(z, s.cols, [&](V a, V v, int lanes) {
    V d = v - centre;
    if (lanes != V::kLanes) d = V::keep(V::Mask::first(lanes), d);
    return V::fma(d, d, a);
  });
  const C rstd = C(1) / std::sqrt(squares / n + static_cast<C>(s.eps));
  const V r = V::set1(rstd), one = V::set1(1);
  for_columns<V::kLanes>(s.cols, [&](int64_t j, int lanes) {
    V v = (load<V>(z + j, lanes) - centre) * r;
    if (weight) {
      V w = load<V>(weight + j, lanes);
      if (s.unit_offset) w = w + one;
      v = bias ? V::fma(v, w, load<V>(bias + j, lanes)) : v * w;
    } else if (bias) {
      v = v + load<V>(bias + j, lanes);
    }
    store(y + j, v, lanes);
  });
  if (mean_out) *mean_out = mean;
  *rstd_out = rstd;
}

template <class T, class W>
void forward(const NormFwdArgs& a) {
  using C = Compute<T>;
  const NormShape& s = a.shape;
  const bool add = a.residual || s.drop_threshold;
  parallel_ranges(s.rows, row_grain(s), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const T* x = static_cast<const T*>(a.x) + i * a.x_stride;
      T* y = static_cast<T*>(a.y) + i * s.cols;
      const T* z = x;
      if (add) {
        // Without a buffer of its own, z lives in y until the row is normalised in place.
        T* sum = a.z ? static_cast<T*>(a.z) + i * s.cols : y;
        const T* residual =
            a.residual ? static_cast<const T*>(a.residual) + i * a.residual_stride : nullptr;
        add_row(s, i, x, residual, sum);
        z = sum;
      }
      norm_row(s, z, static_cast<const W*>(a.weight), static_cast<const W*>(a.bias), y,
               a.mean ? static_cast<C*>(a.mean) + i : nullptr, static_cast<C*>(a.rstd) + i);
    }
  });
}

template <class T, class W>
struct Backward {
  using C = Compute<T>;
  using V = Vec<C>;
  const NormBwdArgs& a;
  const NormShape& s;

  V weight_at(int64_t j, int lanes) const {
    if (!a.weight) return V::set1(1);
    const V w = load<V>(static_cast<const W*>(a.weight) + j, lanes);
    return s.unit_offset ? w + V::set1(1) : w;
  }

  // One row: the two means of the formula and the weight-gradient partials in one pass, dx in
  // another.
  void row(int64_t i, C* dweight, C* dbias) const {
    const T* z = static_cast<const T*>(a.z) + i * a.z_stride;
    const T* dy = static_cast<const T*>(a.dy) + i * a.dy_stride;
    const V mean = V::set1(s.rms ? C(0) : static_cast<const C*>(a.mean)[i]);
    const V rstd = V::set1(static_cast<const C*>(a.rstd)[i]);
    V sum_g = V::zero(), sum_gx = V::zero();
    for_columns<V::kLanes>(s.cols, [&](int64_t j, int lanes) {
      V xhat = (load<V>(z + j, lanes) - mean) * rstd;
      if (lanes != V::kLanes) xhat = V::keep(V::Mask::first(lanes), xhat);
      const V d = load<V>(dy + j, lanes);
      const V g = d * weight_at(j, lanes);
      sum_g = sum_g + g;
      sum_gx = V::fma(g, xhat, sum_gx);
      if (dweight) store(dweight + j, V::fma(d, xhat, load<V>(dweight + j, lanes)), lanes);
      if (dbias) store(dbias + j, load<V>(dbias + j, lanes) + d, lanes);
    });
    const C n = static_cast<C>(s.cols);
    const V mean_g = V::set1(s.rms ? C(0) : sum_g.sum() / n);
    const V mean_gx = V::set1(sum_gx.sum() / n);
    T* dx = static_cast<T*>(a.dx) + i * s.cols;
    T* dresidual = a.dresidual ? static_cast<T*>(a.dresidual) + i * s.cols : dx;
    const T* dz = a.dz ? static_cast<const T*>(a.dz) + i * s.cols : nullptr;
    for_columns<V::kLanes>(s.cols, [&](int64_t j, int lanes) {
      const V xhat = (load<V>(z + j, lanes) - mean) * rstd;
      const V g = load<V>(dy + j, lanes) * weight_at(j, lanes);
      V d = V::fnma(xhat, mean_gx, g - mean_g) * rstd;
      if (dz) d = d + load<V>(dz + j, lanes);
      store(dresidual + j, d, lanes);
    });
    if (s.drop_threshold) drop_row(i, dresidual, dx);
  }

  void drop_row(int64_t i, const T* from, T* to) const {
    constexpr int64_t kBlock = 512;
    alignas(64) float factor[kBlock];
    const FlatDropout drop{static_cast<uint64_t>(*s.seed), s.drop_threshold, s.drop_scale};
    for (int64_t begin = 0; begin < s.cols; begin += kBlock) {
      const int64_t n = min_of<int64_t>(kBlock, s.cols - begin);
      drop.fill(i * s.cols + begin, n, factor);
      for (int64_t j = 0; j < n; ++j) {
        const C v =
            factor[j] != 0.0f ? static_cast<C>(as_float(from[begin + j]) * factor[j]) : C(0);
        put(to + begin + j, v);
      }
    }
  }

  void run() const {
    const int64_t chunks = min_of<int64_t>(kNormBwdChunks, s.rows);
    C* partial = static_cast<C*>(a.scratch);
    const bool wants_weight = a.dweight != nullptr, wants_bias = a.dbias != nullptr;
    const int64_t grain = max_of<int64_t>(1, chunks * row_grain(s) / max_of<int64_t>(1, s.rows));
    parallel_ranges(chunks, grain, [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) {
        C* dweight = wants_weight ? partial + c * 2 * s.cols : nullptr;
        C* dbias = wants_bias ? partial + (c * 2 + 1) * s.cols : nullptr;
        for (int64_t j = 0; dweight && j < s.cols; ++j) dweight[j] = 0;
        for (int64_t j = 0; dbias && j < s.cols; ++j) dbias[j] = 0;
        for (int64_t i = s.rows * c / chunks; i < s.rows * (c + 1) / chunks; ++i)
          row(i, dweight, dbias);
      }
    });
    if (wants_weight) reduce(partial, chunks, static_cast<W*>(a.dweight));
    if (wants_bias) reduce(partial + s.cols, chunks, static_cast<W*>(a.dbias));
  }

  void reduce(const C* partial, int64_t chunks, W* out) const {
    for_columns<V::kLanes>(s.cols, [&](int64_t j, int lanes) {
      V sum = V::zero();
      for (int64_t c = 0; c < chunks; ++c) sum = sum + load<V>(partial + c * 2 * s.cols + j, lanes);
      store(out + j, sum, lanes);
    });
  }
};

template <class T, class W>
void backward(const NormBwdArgs& a) {
  Backward<T, W>{a, a.shape}.run();
}

// f.template run<T, W>() for the pair of storage types.
template <class A, class FloatF, class BFloatF, class HalfF, class MixedB, class MixedH,
          class DoubleF>
void by_dtype(const NormShape& s, const A& a, FloatF f32, BFloatF bf16, HalfF f16, MixedB bf16_f32,
              MixedH f16_f32, DoubleF f64) {
  const bool mixed = s.weight_dtype == DType::kFloat32;
  switch (s.dtype) {
    case DType::kFloat32:
      return f32(a);
    case DType::kBFloat16:
      return mixed ? bf16_f32(a) : bf16(a);
    case DType::kFloat16:
      return mixed ? f16_f32(a) : f16(a);
    case DType::kFloat64:
      return f64(a);
  }
}

}  // namespace

void norm_fwd(const NormFwdArgs& a) {
  by_dtype(a.shape, a, forward<float, float>, forward<BFloat16, BFloat16>,
           forward<Float16, Float16>, forward<BFloat16, float>, forward<Float16, float>,
           forward<double, double>);
}

void norm_bwd(const NormBwdArgs& a) {
  by_dtype(a.shape, a, backward<float, float>, backward<BFloat16, BFloat16>,
           backward<Float16, Float16>, backward<BFloat16, float>, backward<Float16, float>,
           backward<double, double>);
}

}  // namespace LLMKERN_ISA
}  // namespace llmkern
