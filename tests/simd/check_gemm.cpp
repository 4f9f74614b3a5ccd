// Matrix products with their epilogues, the epilogue alone and the pass in front of the backward
// products, against plain double arithmetic: each way of cutting a product, operands of any
// strides, sizes around the register tile. One thread.
#include "check.h"
#include "decisions.h"
#include "gemm.cpp"
#include "linear.cpp"
#include "threads.cpp"

namespace llmkern {
namespace LLMKERN_ISA {
namespace {

constexpr int64_t kMost = 128 * 1024, kSeed = 0x123456789;

struct Case {
  int64_t m, n, k;
  int a_layout, b_layout;  // 0: k contiguous, 1: rows contiguous, 2: neither
  Activation activation;
  bool gated, bias, preact, residual;
  uint32_t drop_threshold;
};

double noise(int64_t i) { return static_cast<double>(i * 7919 % 1009) / 504.5 - 1.0; }

template <class T>
void fill(T* to, int64_t n, int64_t from) {
  for (int64_t i = 0; i < n; ++i) put(to + i, static_cast<Compute<T>>(noise(from + 3 * i)));
}

template <class T>
double value(T x) {
  return static_cast<double>(as_float(x));
}

template <class T>
struct Buffers {
  T a[kMost], b[2][kMost], bias[2][1024], residual[kMost], y[kMost], preact[2][kMost];
  T g[2][kMost], dbias[2][1024];
  alignas(64) Compute<T> scratch[1 << 20];
};

void strides_of(int layout, int64_t rows, int64_t k, int64_t (&stride)[2]) {
  stride[0] = layout == 0 ? k : layout == 1 ? 1 : 2 * k;
  stride[1] = layout == 0 ? 1 : layout == 1 ? rows : 2;
}

double act(Activation a, double x) {
  if (a == Activation::kRelu) return std::fmax(x, 0);
  if (a == Activation::kGelu) return 0.5 * x * std::erfc(-x * std::sqrt(0.5));
  return a == Activation::kSilu ? x / (1 + std::exp(-x)) : x;
}

double slope(Activation a, double x) {
  if (a == Activation::kRelu) return x > 0 ? 1 : 0;
  const double s = 1 / (1 + std::exp(-x)), pi = std::acos(-1.0);
  if (a == Activation::kGelu)
    return 0.5 * std::erfc(-x * std::sqrt(0.5)) + x * std::exp(-x * x / 2) / std::sqrt(2 * pi);
  return a == Activation::kSilu ? s + x * s * (1 - s) : 1;
}

double dropped(const Case& c, int64_t element, double x) {
  if (!c.drop_threshold) return x;
  const bool keep = flat_keeps(static_cast<uint64_t>(element), kSeed, c.drop_threshold);
  return keep ? x * 65536.0 / (65536 - c.drop_threshold) : 0;
}

void near(const char* what, int64_t at, double got, double want, double tolerance) {
  if (!(std::fabs(got - want) <= tolerance * (1 + std::fabs(want)))) fail(what, at, got, want);
}

template <class T>
double product(const Buffers<T>& t, const Case& c, const GemmShape& s, int part, int64_t i,
               int64_t j) {
  double sum = c.bias ? value(t.bias[part][j]) : 0;
  for (int64_t k = 0; k < c.k; ++k) {
    sum += value(t.a[i * s.a_stride[0] + k * s.a_stride[1]]) *
           value(t.b[part][j * s.b_stride[part][0] + k * s.b_stride[part][1]]);
  }
  return sum;
}

template <class T>
void check_outputs(const Buffers<T>& t, const Case& c, const GemmShape& s, double tolerance) {
  for (int64_t i = 0; i < c.m; ++i) {
    for (int64_t j = 0; j < c.n; ++j) {
      const int64_t at = i * c.n + j;
      const double z = product(t, c, s, 0, i, j), u = c.gated ? product(t, c, s, 1, i, j) : 1;
      if (c.preact) near("preact", at, value(t.preact[0][at]), z, tolerance);
      if (c.preact && c.gated) near("up preact", at, value(t.preact[1][at]), u, tolerance);
      const double want =
          dropped(c, at, act(c.activation, z) * u) + (c.residual ? value(t.residual[at]) : 0);
      // Each factor's rounding error is as large as the other factor makes it.
      near("y", at, value(t.y[at]), want, c.gated ? tolerance * (1 + std::fabs(u)) : tolerance);
    }
    if (value(t.y[c.m * c.n]) != 77) fail("y wrote past the end", c.m * c.n, 0, 77);
  }
}

// The pass in front of the backward products, with dy in `residual` and what forward kept.
template <class T>
void check_backward(Buffers<T>* t, const Case& c, DType dtype, double tolerance) {
  double sums[2][1024] = {};
  const bool up = c.gated;
  linear_bwd({dtype,
              c.m,
              c.n,
              c.activation,
              t->residual,
              c.n,
              {t->preact[0], up ? t->preact[1] : nullptr},
              c.drop_threshold,
              &kSeed,
              {t->g[0], up ? t->g[1] : nullptr},
              {t->dbias[0], up ? t->dbias[1] : nullptr},
              t->scratch});
  for (int64_t at = 0; at < c.m * c.n; ++at) {
    const double d = dropped(c, at, value(t->residual[at])), z = value(t->preact[0][at]);
    const double g = d * slope(c.activation, z) * (up ? value(t->preact[1][at]) : 1);
    near("g", at, value(t->g[0][at]), g, tolerance);
    sums[0][at % c.n] += g;
    if (!up) continue;
    near("up g", at, value(t->g[1][at]), d * act(c.activation, z), tolerance);
    sums[1][at % c.n] += d * act(c.activation, z);
  }
  for (int part = 0; part < (up ? 2 : 1); ++part)
    for (int64_t j = 0; j < c.n; ++j)
      near("dbias", j, value(t->dbias[part][j]), sums[part][j], 4 * tolerance);
}

template <class T>
void check(Buffers<T>* t, const Case& c, DType dtype, double tolerance) {
  GemmShape s{dtype, c.m, c.n, c.k, {}, {}, c.gated};
  strides_of(c.a_layout, c.m, c.k, s.a_stride);
  for (int part = 0; part < 2; ++part) {
    strides_of(c.b_layout, c.n, c.k, s.b_stride[part]);
    fill(t->b[part], 2 * c.n * c.k, 2 + part);
    fill(t->bias[part], c.n, 4 + part);
  }
  // What a case uses and no more: filling all of it took longer than the products.
  fill(t->a, 2 * c.m * c.k, 1);
  fill(t->residual, c.m * c.n, 6);
  for (int64_t i = 0; i <= c.m * c.n; ++i) put(t->y + i, Compute<T>(77));
  int64_t bytes = 0;
  gemm_scratch({s, &bytes});
  if (bytes > static_cast<int64_t>(sizeof(t->scratch))) {
    fail("scratch", static_cast<double>(c.k), static_cast<double>(bytes), sizeof(t->scratch));
    return;
  }
  const int64_t behind = 1024, values = bytes / static_cast<int64_t>(sizeof(Compute<T>)) + behind;
  for (int64_t i = 0; i < values && i < int64_t{1} << 20; ++i)
    t->scratch[i] = static_cast<Compute<T>>(NAN);
  const LinearEpilogue e{c.activation,
                         {c.bias ? t->bias[0] : nullptr, c.bias ? t->bias[1] : nullptr},
                         {c.preact ? t->preact[0] : nullptr, c.preact ? t->preact[1] : nullptr},
                         c.residual ? t->residual : nullptr,
                         c.n,
                         c.drop_threshold,
                         &kSeed,
                         t->y,
                         c.n};
  gemm({s, t->a, {t->b[0], c.gated ? t->b[1] : nullptr}, e, t->scratch});
  check_outputs(*t, c, s, tolerance);
  if (!c.preact) return;
  // The product of a library, without bias, is where y or preact go.
  Case plain = c;
  plain.bias = false;
  for (int part = 0; part < (c.gated ? 2 : 1); ++part)
    for (int64_t at = 0; at < c.m * c.n; ++at)
      put(t->preact[part] + at,
          static_cast<Compute<T>>(product(*t, plain, s, part, at / c.n, at % c.n)));
  linear_epilogue({dtype, c.m, c.n, {t->preact[0], c.gated ? t->preact[1] : nullptr}, e});
  check_outputs(*t, c, s, 2 * tolerance);
  check_backward(t, c, dtype, tolerance);
}

template <class T>
void check_all(DType dtype, double tolerance) {
  static Buffers<T> t;
  const int64_t sizes[][3] = {{1, 1, 1},    {1, 70, 33},    {2, 65, 257}, {4, 129, 16},
                              {5, 7, 3},    {13, 31, 20},   {14, 32, 17}, {15, 33, 64},
                              {30, 64, 70}, {29, 100, 300}, {61, 16, 40}, {97, 67, 19},
                              {3, 5, 0},    {40, 96, 530}};
  const Activation kinds[] = {Activation::kNone, Activation::kRelu, Activation::kGelu,
                              Activation::kSilu};
  int turn = 0;
  for (const auto& size : sizes) {
    for (int layouts = 0; layouts < 9; ++layouts, ++turn) {
      const bool gated = turn % 5 == 1;
      // 9 layouts and 4, 5, 3, 2 of the rest: no two sizes meet the same pairs.
      const Activation kind = gated ? Activation::kSilu : kinds[turn % 4];
      const bool preact = turn % 3 != 0;
      check(&t,
            {size[0], size[1], size[2], layouts / 3, layouts % 3, kind, gated, turn % 2 == 0,
             preact, !gated && turn % 7 < 3, !gated && turn % 4 == 2 ? 13107u : 0u},
            dtype, tolerance * (1 + 0.1 * std::sqrt(static_cast<double>(size[2]))));
      Case bare{};
      bare.m = size[0];
      bare.n = size[1];
      bare.k = size[2];
      bare.a_layout = layouts / 3;
      bare.b_layout = layouts % 3;
      bare.activation = Activation::kNone;
      check(&t, bare, dtype, tolerance * (1 + 0.1 * std::sqrt(static_cast<double>(size[2]))));
    }
  }
}

}  // namespace

int run() {
  check_all<float>(DType::kFloat32, 4e-6);
  check_all<double>(DType::kFloat64, 1e-14);
  check_all<BFloat16>(DType::kBFloat16, 8e-3);
  check_all<Float16>(DType::kFloat16, 1e-3);
  if (failures) std::printf("%d failures\n", failures);
  return failures ? 1 : 0;
}

}  // namespace LLMKERN_ISA
}  // namespace llmkern

int main() { return llmkern::LLMKERN_ISA::run(); }
