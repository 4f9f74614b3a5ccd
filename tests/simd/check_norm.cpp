// LayerNorm and RMSNorm, forward and backward, against the formula in double, with every option and
// pair of dtypes, at lengths around the vectors and the dropout stretch. One thread.
#include "check.h"
#include "decisions.h"
#include "norm.cpp"
#include "threads.cpp"

namespace llmkern {
namespace LLMKERN_ISA {
namespace {

constexpr int64_t kMostRows = 40, kMostCols = 1100, kGap = 3;  // kGap: rows are not contiguous
constexpr int64_t kMost = kMostRows * (kMostCols + kGap), kSeed = -77;
constexpr double kEps = 1e-5;

struct Case {
  int64_t rows, cols;
  bool rms, residual, weight, bias, unit_offset, dz;
  uint32_t drop_threshold;
};

double noise(int64_t i) { return static_cast<double>(i * 7919 % 1009) / 504.5 - 0.9; }

template <class T>
void fill(T* to, int64_t n, int64_t from) {
  for (int64_t i = 0; i < n; ++i) put(to + i, static_cast<Compute<T>>(noise(from + 3 * i)));
}

template <class T>
double value(T x) {
  return static_cast<double>(as_float(x));
}

template <class T>
double rounded(double x) {
  T t;
  put(&t, static_cast<Compute<T>>(x));
  return value(t);
}

// [begin] of a guard element behind the last that the kernel may write.
template <class T>
struct Guarded {
  T x[kMost + 1];
  void close(int64_t n) { put(x + n, Compute<T>(77)); }
  void check(const char* what, int64_t n) const {
    if (value(x[n]) != 77) fail(what, n, value(x[n]), 77);
  }
};

void near(const char* what, int64_t at, double got, double want, double tolerance) {
  if (!(std::fabs(got - want) <= tolerance * (1 + std::fabs(want)))) fail(what, at, got, want);
}

template <class X, class T, class W>
struct Tensors {
  using C = Compute<T>;
  X x[kMost];
  T residual[kMost], dy[kMost], dz[kMost];
  W weight[kMostCols], bias[kMostCols];
  Guarded<T> y, z, dresidual;
  Guarded<X> dx;
  Guarded<W> dweight, dbias;
  C mean[kMostRows], rstd[kMostRows], scratch[2 * kMostCols * kMostRows];
};

// Sums of the weight gradients, and one row in double.
struct Exact {
  double z[kMostCols], xhat[kMostCols], g[kMostCols];
  double dweight[kMostCols], dbias[kMostCols];
};

double dropped(const Case& c, int64_t element, double x) {
  if (!c.drop_threshold) return x;
  const bool keep =
      flat_keeps(static_cast<uint64_t>(element), static_cast<uint64_t>(kSeed), c.drop_threshold);
  return keep ? x * 65536.0 / (65536 - c.drop_threshold) : 0;
}

template <class X, class T, class W>
void check_row(const Tensors<X, T, W>& t, const Case& c, int64_t i, double tolerance,
               double x_tolerance, Exact* e) {
  const int64_t n = c.cols, row = i * n, strided = i * (n + kGap);
  const bool add = c.residual || c.drop_threshold;
  double mean = 0, square = 0, mean_g = 0, mean_gx = 0;
  for (int64_t j = 0; j < n; ++j) {
    const double sum = dropped(c, row + j, value(t.x[strided + j])) +
                       (c.residual ? value(t.residual[strided + j]) : 0);
    e->z[j] = add ? value(t.z.x[row + j]) : rounded<T>(sum);
    near("z", row + j, e->z[j], sum, tolerance);
    mean += c.rms ? 0 : e->z[j] / static_cast<double>(n);
  }
  for (int64_t j = 0; j < n; ++j) square += (e->z[j] - mean) * (e->z[j] - mean);
  const double rstd = 1 / std::sqrt(square / static_cast<double>(n) + kEps);
  for (int64_t j = 0; j < n; ++j) {
    const double w = c.weight ? value(t.weight[j]) + (c.unit_offset ? 1 : 0) : 1;
    const double dy = value(t.dy[strided + j]);
    e->xhat[j] = (e->z[j] - mean) * rstd;
    e->g[j] = dy * w;
    near("y", row + j, value(t.y.x[row + j]), e->xhat[j] * w + (c.bias ? value(t.bias[j]) : 0),
         tolerance);
    e->dweight[j] += dy * e->xhat[j];
    e->dbias[j] += dy;
    mean_g += c.rms ? 0 : e->g[j] / static_cast<double>(n);
    mean_gx += e->g[j] * e->xhat[j] / static_cast<double>(n);
  }
  for (int64_t j = 0; j < n; ++j) {
    const double want =
        (e->g[j] - mean_g - e->xhat[j] * mean_gx) * rstd + (c.dz ? value(t.dz[row + j]) : 0);
    // Of a row with hardly any variance rstd is large, and so are rounding errors.
    const double allowed = tolerance * (1 + rstd);
    if (add) near("dresidual", row + j, value(t.dresidual.x[row + j]), want, allowed);
    near("dx", row + j, value(t.dx.x[row + j]), dropped(c, row + j, want),
         2 * x_tolerance * (1 + rstd));
  }
}

template <class X, class T, class W>
void run_kernels(Tensors<X, T, W>* t, const Case& c, const NormShape& s) {
  const int64_t stride = c.cols + kGap, n = c.rows * c.cols;
  const bool add = c.residual || c.drop_threshold;
  fill(t->x, c.rows * stride, 1);
  fill(t->residual, c.rows * stride, 2);
  fill(t->dy, c.rows * stride, 3);
  fill(t->dz, n, 4);
  fill(t->weight, c.cols, 5);
  fill(t->bias, c.cols, 6);
  t->y.close(n);
  t->z.close(n);
  t->dx.close(n);
  t->dresidual.close(n);
  t->dweight.close(c.cols);
  t->dbias.close(c.cols);
  const void *weight = c.weight ? t->weight : nullptr, *bias = c.bias ? t->bias : nullptr;
  const void* residual = c.residual ? t->residual : nullptr;
  void* mean = c.rms ? nullptr : t->mean;
  norm_fwd({s, t->x, stride, residual, stride, weight, bias, add ? t->z.x : nullptr, t->y.x, mean,
            t->rstd});
  const void* z = add ? static_cast<const void*>(t->z.x) : t->x;
  norm_bwd({s, z, add ? c.cols : stride, weight, mean, t->rstd, t->dy, stride,
            c.dz ? t->dz : nullptr, t->dx.x, add ? t->dresidual.x : nullptr,
            c.weight ? t->dweight.x : nullptr, c.bias ? t->dbias.x : nullptr, t->scratch});
  t->y.check("y wrote past the end", n);
  t->z.check("z wrote past the end", n);
  t->dx.check("dx wrote past the end", n);
  t->dresidual.check("dresidual wrote past the end", n);
  t->dweight.check("dweight wrote past the end", c.cols);
  t->dbias.check("dbias wrote past the end", c.cols);
}

template <class X, class T, class W>
void check_all(DType x, DType dtype, DType w, double tolerance, double x_tolerance) {
  static Tensors<X, T, W> t;
  static Exact e;
  const int64_t lengths[] = {1, 2, 15, 16, 17, 33, 64, 67, 130, 1023, 1025};
  for (int64_t cols : lengths) {
    for (int options = 0; options < 64; ++options) {
      const auto bit = [&](int i) { return (options >> i & 1) != 0; };
      // A sum of two dtypes has a residual; a bias goes with layer norm.
      const bool residual = bit(1) || !std::is_same_v<X, T>;
      const Case c{bit(5) ? 37 : 5,
                   cols,
                   bit(0),
                   residual,
                   bit(2),
                   bit(2) && !bit(0),
                   bit(3),
                   bit(1) && bit(4),
                   residual && bit(4) ? 20000u : 0u};
      const NormShape s{dtype, x, w, c.rows, c.cols, kEps, c.rms, c.unit_offset, c.drop_threshold,
                        &kSeed};
      e = Exact{};
      run_kernels(&t, c, s);
      for (int64_t i = 0; i < c.rows; ++i) check_row(t, c, i, tolerance, x_tolerance, &e);
      for (int64_t j = 0; j < cols; ++j) {
        if (c.weight) near("dweight", j, value(t.dweight.x[j]), e.dweight[j], 4 * tolerance);
        if (c.bias) near("dbias", j, value(t.dbias.x[j]), e.dbias[j], 4 * tolerance);
      }
    }
  }
}

// Rows of equal elements have that element as their mean, saved or computed again: y is the bias,
// dweight 0, and so is dx where the row is one element.
template <class X, class T, class W>
void check_equal(DType x, DType dtype, DType w) {
  static Tensors<X, T, W> t;
  const int64_t lengths[] = {1, 3, 17, 67, 768, 1025};
  const double values[] = {12345.6, -1000.1, 1e-30, 65504};
  for (int64_t cols : lengths) {
    for (double value_of_row : values) {
      const Case c{5, cols, false, false, true, true, false, false, 0};
      const NormShape s{dtype, x, w, c.rows, cols, kEps, false, false, 0, &kSeed};
      fill(t.dy, c.rows * cols, 3);
      fill(t.weight, cols, 5);
      fill(t.bias, cols, 6);
      for (int64_t i = 0; i < c.rows * cols; ++i) {
        put(t.x + i, static_cast<Compute<X>>(value_of_row));
      }
      norm_fwd({s, t.x, cols, nullptr, 0, t.weight, t.bias, nullptr, t.y.x, t.mean, t.rstd});
      for (int pass = 0; pass < 2; ++pass) {
        const bool saved = pass == 0;
        norm_bwd({s, t.x, cols, t.weight, saved ? t.mean : nullptr, saved ? t.rstd : nullptr, t.dy,
                  cols, nullptr, t.dx.x, nullptr, t.dweight.x, t.dbias.x, t.scratch});
        for (int64_t j = 0; j < cols; ++j) near("dweight", j, value(t.dweight.x[j]), 0, 0);
        for (int64_t j = 0; cols == 1 && j < c.rows; ++j) near("dx", j, value(t.dx.x[j]), 0, 0);
      }
      for (int64_t i = 0; i < c.rows * cols; ++i) {
        near("y", i, value(t.y.x[i]), rounded<T>(value(t.bias[i % cols])), 0);
      }
    }
  }
}

}  // namespace

int run() {
  const DType f32 = DType::kFloat32, f64 = DType::kFloat64;
  const DType bf16 = DType::kBFloat16, f16 = DType::kFloat16;
  check_all<float, float, float>(f32, f32, f32, 4e-6, 4e-6);
  check_all<double, double, double>(f64, f64, f64, 1e-13, 1e-13);
  check_all<BFloat16, BFloat16, BFloat16>(bf16, bf16, bf16, 8e-3, 8e-3);
  check_all<BFloat16, BFloat16, float>(bf16, bf16, f32, 8e-3, 8e-3);
  check_all<Float16, Float16, Float16>(f16, f16, f16, 1e-3, 1e-3);
  check_all<Float16, float, float>(f16, f32, f32, 4e-6, 1e-3);
  check_all<BFloat16, float, float>(bf16, f32, f32, 4e-6, 8e-3);
  check_equal<float, float, float>(f32, f32, f32);
  check_equal<double, double, double>(f64, f64, f64);
  check_equal<BFloat16, BFloat16, BFloat16>(bf16, bf16, bf16);
  check_equal<Float16, Float16, float>(f16, f16, f32);
  if (failures) std::printf("%d failures\n", failures);
  return failures ? 1 : 0;
}

}  // namespace LLMKERN_ISA
}  // namespace llmkern

int main() { return llmkern::LLMKERN_ISA::run(); }
