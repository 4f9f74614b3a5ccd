// LayerNorm and RMSNorm, forward and backward (formulas: include/llmkern/norm.h). Rows are taken in
// blocks that stay in the first two cache levels, so memory sees each element once: forward passes
// over a block are the sum, the centred squares, the output; backward passes are the two means with
// the weight gradient, then dx. A row's arithmetic does not depend on its block. The weight
// gradient is summed in row ranges that the shape fixes, then across them, so no thread count
// changes a bit.
#include "llmkern/norm.h"

#include <cmath>

#include "columns.h"
#include "parallel.h"
#include "simd/dropout.h"

namespace llmkern {
namespace LLMKERN_ISA {
namespace {

// Rows worth a thread: below ~16k elements the fork costs more than it brings.
constexpr int64_t kGrainElements = 16384;
// Forward rows whose reductions overlap; the horizontal sum, square root and division of one row
// (about 60 cycles in a chain) hide behind the loads of the next.
constexpr int kFwdRows = 4;
// Backward rows that share one load and store of the weight-gradient sums.
constexpr int kBwdRows = 4;
// Columns that the dropout decisions are made for at a time.
constexpr int kDropColumns = 1024;
// Outputs from this size on go around the cache: they would be evicted before anyone reads them,
// and the cache would read every line first.
constexpr int64_t kStreamBytes = int64_t{1} << 25;

int64_t row_grain(const NormShape& s) {
  return s.cols > 0 ? max_of<int64_t>(1, kGrainElements / s.cols) : 1;
}

// Rows that can and should be written around the cache: float, whole vectors, aligned.
template <class T>
bool streams(const void* out, const NormShape&) {
  return false && out;
}
template <>
bool streams<float>(const void* out, const NormShape& s) {
  return out && s.cols % VecF::kLanes == 0 &&
         reinterpret_cast<uintptr_t>(out) % (sizeof(float) * VecF::kLanes) == 0 &&
         s.rows * s.cols * static_cast<int64_t>(sizeof(float)) >= kStreamBytes;
}

template <bool kStream, class T, class V>
inline void store_out(T* p, V v, int lanes) {
  if constexpr (kStream) {
    v.stream(p);
  } else {
    store(p, v, lanes);
  }
}

FlatDropout dropout_of(const NormShape& s) {
  return {s.drop_threshold ? static_cast<uint64_t>(*s.seed) : 0, s.drop_threshold,
          keep_scale<float>(s.drop_threshold)};
}

// f(column, value of drop(x) there, lanes) over a row; a dropped element is 0 even where x is Inf
// or NaN.
template <class V, class X, class F>
void for_dropped(const NormShape& s, int64_t row, const X* x, const F& f) {
  const FlatDropout drop = dropout_of(s);
  const V scale = V::set1(keep_scale<typename V::Scalar>(s.drop_threshold));
  KeepBits<kDropColumns> bits;
  for (int64_t begin = 0; begin < s.cols; begin += kDropColumns) {
    const int64_t n = min_of<int64_t>(kDropColumns, s.cols - begin);
    drop.keep(row * s.cols + begin, n, &bits);
    for_columns<V::kLanes>(n, [&](int64_t j, int lanes) {
      const V v = load<V>(x + begin + j, lanes) * scale;
      f(begin + j, V::keep(bits.template mask<typename V::Mask>(j), v), lanes);
    });
  }
}

// z = drop(x) + residual, written as T.
template <class X, class T>
void add_row(const NormShape& s, int64_t row, const X* x, const T* residual, T* z) {
  using V = Vec<Compute<T>>;
  const auto add = [&](int64_t j, V v, int lanes) {
    if (residual) v = v + load<V>(residual + j, lanes);
    store(z + j, v, lanes);
  };
  if (s.drop_threshold) {
    for_dropped<V>(s, row, x, add);
  } else {
    for_columns<V::kLanes>(s.cols,
                           [&](int64_t j, int lanes) { add(j, load<V>(x + j, lanes), lanes); });
  }
}

// weight (+ 1 with unit_offset), or 1 where there is none. Held by value: read through the argument
// struct, it would be loaded again after every store.
template <class V, class W>
struct Scale {
  const W* weight;
  V offset;
  Scale(const NormShape& s, const void* p)
      : weight(static_cast<const W*>(p)), offset(s.unit_offset ? V::set1(1) : V::zero()) {}
  V operator()(int64_t j, int lanes) const {
    return weight ? load<V>(weight + j, lanes) + offset : V::set1(1);
  }
};

// Sum of f(v) over the row in four chains: the add latency is 4 cycles.
template <class T, class F>
inline Compute<T> row_sum(const T* z, int64_t cols, const F& f) {
  using V = Vec<Compute<T>>;
  V a[4] = {V::zero(), V::zero(), V::zero(), V::zero()};
  int64_t j = 0;
  for (; j + 4 * V::kLanes <= cols; j += 4 * V::kLanes)
    for (int u = 0; u < 4; ++u) a[u] = f(a[u], V::load(z + j + u * V::kLanes), V::kLanes);
  for_columns<V::kLanes>(
      cols - j, [&](int64_t k, int lanes) { a[0] = f(a[0], load<V>(z + j + k, lanes), lanes); });
  return ((a[0] + a[1]) + (a[2] + a[3])).sum();
}

template <class T>
inline Compute<T> centred_squares(const T* z, int64_t cols, Compute<T> mean) {
  using V = Vec<Compute<T>>;
  const V centre = V::set1(mean);
  return row_sum(z, cols, [&](V a, V v, int lanes) {
    V d = v - centre;
    if (lanes != V::kLanes) d = V::keep(V::Mask::first(lanes), d);
    return V::fma(d, d, a);
  });
}

// The mean as an offset from the first element: exact where all elements are equal, and closer than
// a plain sum where they stand far from zero. kScale keeps the differences of any row of finite
// elements, and their sum, from overflow.
template <class T>
inline Compute<T> row_mean(const NormShape& s, const T* z) {
  using C = Compute<T>;
  using V = Vec<C>;
  constexpr C kScale = C(1) / C(int64_t{1} << 40);
  if (s.rms) return C(0);
  const C first = s.cols > 0 ? as_float(z[0]) : C(0);  // rows of nothing have no memory
  const V scale = V::set1(kScale), origin = V::set1(-first * kScale);
  const C sum = row_sum(z, s.cols, [=](V t, V v, int lanes) {
    V d = V::fma(v, scale, origin);  // exact products: one rounding with or without an FMA
    if (lanes != V::kLanes) d = V::keep(V::Mask::first(lanes), d);
    return t + d;
  });
  return std::fma(sum, C(1) / kScale / static_cast<C>(s.cols), first);
}

// Where the first element stands far from the others, the mean has the rounding of its distance:
// more than kFar deviations away, which takes more than kFar^2 columns, the mean is taken once
// more, as an offset from what was found.
constexpr int kFar = 8;

template <class T>
inline Compute<T> row_rstd(const NormShape& s, const T* z, Compute<T>& mean) {
  using C = Compute<T>;
  using V = Vec<C>;
  const C cols = static_cast<C>(s.cols);
  const C variance = centred_squares(z, s.cols, mean) / cols;
  if (!s.rms && s.cols > kFar * kFar) {
    const C distance = as_float(z[0]) - mean;
    if (distance * distance > C(kFar * kFar) * variance && std::isfinite(variance)) {
      const V centre = V::set1(mean);
      const C sum = row_sum(z, s.cols, [=](V t, V v, int lanes) {
        V d = v - centre;
        if (lanes != V::kLanes) d = V::keep(V::Mask::first(lanes), d);
        return t + d;
      });
      mean += sum / cols;  // too little to show in the variance
    }
  }
  return C(1) / std::sqrt(variance + static_cast<C>(s.eps));
}

template <bool kStream, class T, class W>
inline void write_row(int64_t cols, const T* z, Scale<Vec<Compute<T>>, W> scale, const W* bias,
                      T* y, Compute<T> mean, Compute<T> rstd) {
  using V = Vec<Compute<T>>;
  const V centre = V::set1(mean), r = V::set1(rstd);
  for_columns<V::kLanes>(cols, [=](int64_t j, int lanes) {
    V v = (load<V>(z + j, lanes) - centre) * r;
    if (scale.weight) {
      const V w = scale(j, lanes);
      v = bias ? V::fma(v, w, load<V>(bias + j, lanes)) : v * w;
    } else if (bias) {
      v = v + load<V>(bias + j, lanes);
    }
    store_out<kStream>(y + j, v, lanes);
  });
}

template <class X, class T, class W>
struct Forward {
  using C = Compute<T>;
  const NormFwdArgs& a;
  const NormShape& s;

  // The row that is normalised, computed first where it is a sum. Without a buffer of its own the
  // sum lives in y until it is normalised in place.
  const T* summed(int64_t i) const {
    const X* x = static_cast<const X*>(a.x) + i * a.x_stride;
    if constexpr (sizeof(X) == sizeof(T)) {
      if (!a.residual && !s.drop_threshold) return reinterpret_cast<const T*>(x);
    }
    T* sum = static_cast<T*>(a.z ? a.z : a.y) + i * s.cols;
    const T* residual =
        a.residual ? static_cast<const T*>(a.residual) + i * a.residual_stride : nullptr;
    add_row(s, i, x, residual, sum);
    return sum;
  }

  template <bool kStream>
  void rows(int64_t begin, int64_t end) const {
    const Scale<Vec<C>, W> scale(s, a.weight);
    const W* bias = static_cast<const W*>(a.bias);
    for (int64_t i = begin; i < end; i += kFwdRows) {
      const int count = static_cast<int>(min_of<int64_t>(kFwdRows, end - i));
      const T* z[kFwdRows];
      C mean[kFwdRows], rstd[kFwdRows];
      for (int r = 0; r < count; ++r) z[r] = summed(i + r);
      for (int r = 0; r < count; ++r) mean[r] = row_mean(s, z[r]);
      for (int r = 0; r < count; ++r) rstd[r] = row_rstd(s, z[r], mean[r]);
      for (int r = 0; r < count; ++r) {
        T* y = static_cast<T*>(a.y) + (i + r) * s.cols;
        write_row<kStream>(s.cols, z[r], scale, bias, y, mean[r], rstd[r]);
        if (a.mean) static_cast<C*>(a.mean)[i + r] = mean[r];
        if (a.rstd) static_cast<C*>(a.rstd)[i + r] = rstd[r];
      }
    }
  }

  void run() const {
    const bool stream = streams<T>(a.y, s);
    parallel_ranges(s.rows, row_grain(s), [&](int64_t begin, int64_t end) {
      if constexpr (sizeof(T) == sizeof(float)) {
        if (stream) return rows<true>(begin, end);
      }
      rows<false>(begin, end);
    });
  }
};

template <class X, class T, class W>
struct Backward {
  using C = Compute<T>;
  using V = Vec<C>;
  const NormBwdArgs& a;
  const NormShape& s;

  struct Row {
    const T *z, *dy;
    C mean, rstd;
    C mean_g, mean_gx;  // of g = dy * w and of g * xhat
  };

  Row row(int64_t i) const {
    const T* z = static_cast<const T*>(a.z) + i * a.z_stride;
    const T* dy = static_cast<const T*>(a.dy) + i * a.dy_stride;
    if (!a.rstd) {
      C mean = row_mean(s, z);
      const C rstd = row_rstd(s, z, mean);
      return {z, dy, mean, rstd, C(0), C(0)};
    }
    const C mean = s.rms ? C(0) : static_cast<const C*>(a.mean)[i];
    return {z, dy, mean, static_cast<const C*>(a.rstd)[i], C(0), C(0)};
  }

  // The two means of kRows rows, and with kAffine their share of the weight gradients.
  template <int kRows, bool kAffine>
  void reduce_rows(Row* r, C* dweight, C* dbias) const {
    const Scale<V, W> scale(s, a.weight);
    V sum_g[kRows], sum_gx[kRows];
    const T *z[kRows], *dy[kRows];
    for (int k = 0; k < kRows; ++k) {
      sum_g[k] = sum_gx[k] = V::zero();
      z[k] = r[k].z;
      dy[k] = r[k].dy;
    }
    for_columns<V::kLanes>(s.cols, [&](int64_t j, int lanes) {
      const V w = scale(j, lanes);
      V sum_weight = kAffine ? load<V>(dweight + j, lanes) : V::zero();
      V sum_bias = kAffine ? load<V>(dbias + j, lanes) : V::zero();
      for (int k = 0; k < kRows; ++k) {
        V xhat = (load<V>(z[k] + j, lanes) - V::set1(r[k].mean)) * V::set1(r[k].rstd);
        if (lanes != V::kLanes) xhat = V::keep(V::Mask::first(lanes), xhat);
        const V d = load<V>(dy[k] + j, lanes), g = d * w;
        sum_g[k] = sum_g[k] + g;
        sum_gx[k] = V::fma(g, xhat, sum_gx[k]);
        sum_weight = V::fma(d, xhat, sum_weight);
        sum_bias = sum_bias + d;
      }
      if (kAffine) {
        store(dweight + j, sum_weight, lanes);
        store(dbias + j, sum_bias, lanes);
      }
    });
    const C n = static_cast<C>(s.cols);
    for (int k = 0; k < kRows; ++k) {
      r[k].mean_g = s.rms ? C(0) : sum_g[k].sum() / n;
      r[k].mean_gx = sum_gx[k].sum() / n;
    }
  }

  template <int kRows>
  void reduce_rows(Row* r, C* dweight, C* dbias) const {
    if (dweight) return reduce_rows<kRows, true>(r, dweight, dbias);
    reduce_rows<kRows, false>(r, nullptr, nullptr);
  }

  // out = (g - mean_g - xhat * mean_gx) * rstd (+ dz). Of a row of one element that is 0; said
  // outright, as the compiler may fuse the product g into a difference that keeps its rounding.
  template <bool kStream, class Out>
  void write_gradient(const Row& r, const T* dz, Out* out) const {
    const V mean = V::set1(r.mean);
    const V rstd = V::set1(s.cols == 1 && !s.rms ? C(0) : r.rstd);
    const V mean_g = V::set1(r.mean_g), slope = V::set1(r.mean_gx * r.rstd);
    const Scale<V, W> scale(s, a.weight);
    const T *z = r.z, *dy = r.dy;
    for_columns<V::kLanes>(s.cols, [=](int64_t j, int lanes) {
      const V g = load<V>(dy + j, lanes) * scale(j, lanes);
      V d = V::fnma(load<V>(z + j, lanes) - mean, slope, g - mean_g) * rstd;
      if (dz) d = d + load<V>(dz + j, lanes);
      store_out<kStream>(out + j, d, lanes);
    });
  }

  template <bool kStream>
  void finish_row(int64_t i, const Row& r) const {
    X* dx = static_cast<X*>(a.dx) + i * s.cols;
    const T* dz = a.dz ? static_cast<const T*>(a.dz) + i * s.cols : nullptr;
    if (!a.dresidual) return write_gradient<kStream>(r, dz, dx);
    T* dresidual = static_cast<T*>(a.dresidual) + i * s.cols;
    write_gradient<false>(r, dz, dresidual);
    const auto put_dx = [&](int64_t j, V v, int lanes) { store(dx + j, v, lanes); };
    if (s.drop_threshold) return for_dropped<V>(s, i, dresidual, put_dx);
    for_columns<V::kLanes>(
        s.cols, [&](int64_t j, int lanes) { put_dx(j, load<V>(dresidual + j, lanes), lanes); });
  }

  template <bool kStream>
  void rows(int64_t begin, int64_t end, C* dweight, C* dbias) const {
    for (int64_t j = 0; dweight && j < s.cols; ++j) dweight[j] = dbias[j] = 0;
    for (int64_t i = begin; i < end; i += kBwdRows) {
      const int count = static_cast<int>(min_of<int64_t>(kBwdRows, end - i));
      Row r[kBwdRows];
      for (int k = 0; k < count; ++k) r[k] = row(i + k);
      if (count == kBwdRows) {
        reduce_rows<kBwdRows>(r, dweight, dbias);
      } else {
        for (int k = 0; k < count; ++k) reduce_rows<1>(r + k, dweight, dbias);
      }
      for (int k = 0; a.dx && k < count; ++k) finish_row<kStream>(i + k, r[k]);
    }
  }

  void run() const {
    const int64_t chunks = norm_bwd_chunks(s.rows);
    C* partial = static_cast<C*>(a.scratch);
    const bool wants_weight = a.dweight != nullptr, wants_bias = a.dbias != nullptr;
    const int64_t grain = max_of<int64_t>(1, chunks * row_grain(s) / max_of<int64_t>(1, s.rows));
    const bool stream = streams<X>(a.dx, s);
    parallel_ranges(chunks, grain, [&](int64_t first, int64_t last) {
      for (int64_t c = first; c < last; ++c) {
        C* dweight = wants_weight || wants_bias ? partial + c * 2 * s.cols : nullptr;
        C* dbias = dweight ? dweight + s.cols : nullptr;
        const int64_t begin = s.rows * c / chunks, end = s.rows * (c + 1) / chunks;
        if constexpr (sizeof(X) == sizeof(float)) {
          if (stream) {
            rows<true>(begin, end, dweight, dbias);
            continue;
          }
        }
        rows<false>(begin, end, dweight, dbias);
      }
    });
    if (wants_weight) sum_chunks(partial, chunks, static_cast<W*>(a.dweight));
    if (wants_bias) sum_chunks(partial + s.cols, chunks, static_cast<W*>(a.dbias));
  }

  void sum_chunks(const C* partial, int64_t chunks, W* out) const {
    for_columns<V::kLanes>(s.cols, [&](int64_t j, int lanes) {
      V sum = V::zero();
      for (int64_t c = 0; c < chunks; ++c) sum = sum + load<V>(partial + c * 2 * s.cols + j, lanes);
      store(out + j, sum, lanes);
    });
  }
};

template <template <class, class, class> class Kernel, class H, class A>
void run_half(const A& a) {
  const NormShape& s = a.shape;
  if (s.dtype == DType::kFloat32) {
    Kernel<H, float, float>{a, s}.run();
  } else if (s.weight_dtype == DType::kFloat32) {
    Kernel<H, H, float>{a, s}.run();
  } else {
    Kernel<H, H, H>{a, s}.run();
  }
}

template <template <class, class, class> class Kernel, class A>
void run(const A& a) {
  switch (a.shape.x_dtype) {
    case DType::kFloat32:
      return Kernel<float, float, float>{a, a.shape}.run();
    case DType::kBFloat16:
      return run_half<Kernel, BFloat16>(a);
    case DType::kFloat16:
      return run_half<Kernel, Float16>(a);
    case DType::kFloat64:
      return Kernel<double, double, double>{a, a.shape}.run();
  }
}

}  // namespace

void norm_fwd(const NormFwdArgs& a) { run<Forward>(a); }

void norm_bwd(const NormBwdArgs& a) { run<Backward>(a); }

}  // namespace LLMKERN_ISA
}  // namespace llmkern
