// Dropout, activations and their derivatives over memory against plain double arithmetic: every
// dtype, contiguous and strided rows, lengths around the vectors and the span of a task, in place
// too. One thread.
#include "check.h"
#include "decisions.h"
#include "elementwise.cpp"
#include "threads.cpp"

namespace llmkern {
namespace LLMKERN_ISA {
namespace {

constexpr int64_t kMost = 3 * 4200, kSeed = 0x7edcba9876543210;

template <class T>
double value(T x) {
  return static_cast<double>(as_float(x));
}

// From -9 to 9, and at the front what has no finite result.
template <class T>
void fill(T* to, int64_t n, int64_t from) {
  const double special[] = {HUGE_VAL, -HUGE_VAL, NAN, 0.0, -0.0};
  for (int64_t i = 0; i < n; ++i) {
    const double x = static_cast<double>((from + i) * 7919 % 1009) / 56.0 - 9.0;
    put(to + i, static_cast<Compute<T>>(from == 1 && i < 5 ? special[i] : x));
  }
}

template <class T>
struct Buffers {
  T x[kMost + 1], dy[kMost + 1], y[kMost + 1];
};

// [rows][cols] with row strides; 77 marks what must stay.
struct Layout {
  int64_t rows, cols, x_stride, y_stride;
};

template <class T, class F>
void compare(const char* what, const Buffers<T>& b, const Layout& l, double tolerance, const F& f) {
  for (int64_t i = 0; i < l.rows; ++i) {
    for (int64_t j = 0; j < l.y_stride && i * l.y_stride + j < kMost; ++j) {
      const double got = value(b.y[i * l.y_stride + j]);
      const double want = j < l.cols ? f(i, j) : 77;
      const bool same = got == want || (std::isnan(got) && std::isnan(want));
      if (!same && !(std::fabs(got - want) <= tolerance * (1 + std::fabs(want))))
        fail(what, i * l.cols + j, got, want);
    }
  }
}

template <class T>
void reset(Buffers<T>* b) {
  fill(b->x, kMost, 1);
  fill(b->dy, kMost, 2);
  for (int64_t i = 0; i <= kMost; ++i) put(b->y + i, Compute<T>(77));
}

template <class T>
void check_dropout(Buffers<T>* b, const Layout& l, DType dtype, double tolerance) {
  const uint32_t thresholds[] = {0, 6554, 65535, 65536};
  for (uint32_t threshold : thresholds) {
    reset(b);
    dropout({dtype, l.rows, l.cols, b->x, l.x_stride, b->y, l.y_stride, threshold, &kSeed});
    compare("dropout", *b, l, tolerance, [&](int64_t i, int64_t j) {
      const uint64_t element = static_cast<uint64_t>(i * l.cols + j);
      if (!flat_keeps(element, static_cast<uint64_t>(kSeed), threshold)) return 0.0;
      T rounded;  // a large factor takes float16 beyond its range
      put(&rounded,
          static_cast<Compute<T>>(value(b->x[i * l.x_stride + j]) * 65536.0 / (65536 - threshold)));
      return value(rounded);
    });
  }
}

double density(double x) { return std::exp(-x * x / 2) / std::sqrt(2 * std::acos(-1.0)); }
double tanh_slope(double x) { return std::sqrt(2 / std::acos(-1.0)) * (1 + 0.134145 * x * x); }
double tanh_inner(double x) { return std::sqrt(2 / std::acos(-1.0)) * (x + 0.044715 * x * x * x); }

// f(x) and f'(x); at -inf the limits.
double function(Activation a, double x) {
  if (a == Activation::kNone) return x;
  if (x == -HUGE_VAL) return 0;
  if (a == Activation::kRelu) return std::isnan(x) ? x : std::fmax(x, 0);
  if (a == Activation::kGelu) return 0.5 * x * std::erfc(-x * std::sqrt(0.5));
  if (a == Activation::kGeluTanh) return x / (1 + std::exp(-2 * tanh_inner(x)));
  return x / (1 + std::exp(-x));
}

double derivative(Activation a, double x) {
  if (a == Activation::kNone) return 1;
  if (a == Activation::kRelu) return x <= 0 ? 0 : 1;
  if (std::isinf(x)) return x > 0 ? 1 : 0;
  if (a == Activation::kGelu) return 0.5 * std::erfc(-x * std::sqrt(0.5)) + x * density(x);
  const double u = a == Activation::kSilu ? x : 2 * tanh_inner(x);
  const double slope = a == Activation::kSilu ? 1 : 2 * tanh_slope(x);
  const double s = 1 / (1 + std::exp(-u));
  return s + x * slope * s * (1 - s);
}

template <class T>
void check_activation(Buffers<T>* b, const Layout& l, Activation a, DType dtype, double tolerance) {
  const auto x = [&](int64_t i, int64_t j) { return value(b->x[i * l.x_stride + j]); };
  const auto want = [&](int64_t i, int64_t j) { return function(a, x(i, j)); };
  reset(b);
  activation_fwd({dtype, a, l.rows, l.cols, b->x, l.x_stride, b->y, l.y_stride});
  compare("activation", *b, l, tolerance, want);
  reset(b);
  for (int64_t i = 0; i < kMost; ++i) b->y[i] = b->x[i];
  activation_fwd({dtype, a, l.rows, l.cols, b->y, l.cols, b->y, l.cols});
  compare("activation in place", *b, {1, l.rows * l.cols, 0, l.rows * l.cols}, tolerance,
          [&](int64_t, int64_t j) { return function(a, value(b->x[j])); });
  reset(b);
  activation_bwd({dtype, a, l.rows, l.cols, b->x, l.x_stride, b->dy, l.x_stride, b->y});
  compare("derivative", *b, {l.rows, l.cols, l.x_stride, l.cols}, tolerance,
          [&](int64_t i, int64_t j) {
            const double dy = value(b->dy[i * l.x_stride + j]), slope = derivative(a, x(i, j));
            return slope == 0 ? 0 : dy * slope;
          });
}

template <class T>
void check_all(DType dtype, double tolerance) {
  static Buffers<T> b;
  const int64_t lengths[] = {1, 2, 7, 8, 15, 16, 17, 31, 33, 64, 100, 2047, 2048, 2049, 4100};
  for (int64_t cols : lengths) {
    const Layout layouts[] = {
        {1, cols, cols, cols}, {3, cols, cols, cols}, {3, cols, cols + 5, cols + 2}};
    for (const Layout& l : layouts) {
      check_dropout(&b, l, dtype, tolerance);
      for (int a = 0; a < 5; ++a)
        check_activation(&b, l, static_cast<Activation>(a), dtype, tolerance);
    }
  }
}

}  // namespace

int run() {
  check_all<float>(DType::kFloat32, 2e-6);
  check_all<double>(DType::kFloat64, 1e-14);
  check_all<BFloat16>(DType::kBFloat16, 4e-3);
  check_all<Float16>(DType::kFloat16, 5e-4);
  if (failures) std::printf("%d failures\n", failures);
  return failures ? 1 : 0;
}

}  // namespace LLMKERN_ISA
}  // namespace llmkern

int main() { return llmkern::LLMKERN_ISA::run(); }
