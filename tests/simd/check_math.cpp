// Elementary functions, activations and their derivatives against libm in double, over the whole
// float range. Prints the largest error of each; exits 1 if one is beyond its bound.
#include "check.h"
#include "simd/activation.h"

namespace llmkern {
namespace LLMKERN_ISA {
namespace {

// f on every float whose bit pattern is a multiple of a prime (some 4 million, all exponents, both
// signs) and on the special values. Errors are in ulp of max(|exact|, smallest): a derivative
// crosses zero by cancellation, and results near the end of the normal range may be flushed.
template <class F, class G>
void check(const char* name, double bound, double smallest, const F& f, const G& exact) {
  constexpr int kLanes = VecF::kLanes;
  constexpr uint32_t kStep = 1021;
  double worst = 0;
  float worst_at = 0;
  const float special[] = {0.0f,          -0.0f,          HUGE_VALF, -HUGE_VALF, NAN,
                           3.4028235e38f, -3.4028235e38f, 1e-45f,    -1e-45f,    1.17549435e-38f,
                           13.2f,         -13.2f,         88.72f,    -87.33f};
  constexpr uint32_t kSpecial = sizeof(special) / sizeof(float);
  const uint32_t count = kSpecial + 0xffffffffu / kStep;
  for (uint32_t i = 0; i < count; i += kLanes) {
    float x[kLanes], y[kLanes];
    for (uint32_t l = 0; l < kLanes; ++l)
      x[l] = i + l < kSpecial ? special[i + l] : float_of((i + l - kSpecial) * kStep);
    f(VecF::load(x)).store(y);
    for (int l = 0; l < kLanes; ++l) {
      const double want = exact(static_cast<double>(x[l]));
      const double error = ulps(y[l], want, smallest);
      if (error > bound) fail(name, x[l], y[l], want);
      if (error > worst) worst = error, worst_at = x[l];
    }
  }
  std::printf("%-16s %.2f ulp at %g\n", name, worst, worst_at);
}

// The double form at a few points: the same formulas, so this finds a wrong constant or sign.
template <class F, class G>
void check_double(const char* name, const F& f, const G& exact) {
  const double inputs[] = {-HUGE_VAL, -1e300, -50.0, -3.0, -0.5,  0.0,
                           1e-9,      0.7,    4.0,   60.0, 1e300, HUGE_VAL};
  for (double x : inputs) {
    double y[VecD::kLanes];
    f(VecD::set1(x)).store(y);
    const double want = exact(x);
    if (!(std::fabs(y[0] - want) <= 1e-14 * (1 + std::fabs(want))) && y[0] != want)
      fail(name, x, y[0], want);
  }
}

double cdf(double x) { return 0.5 * std::erfc(-x * std::sqrt(0.5)); }
double density(double x) { return std::exp(-0.5 * x * x) / std::sqrt(2 * std::acos(-1.0)); }
double logistic(double x) { return 1 / (1 + std::exp(-x)); }
double slope(double x) { return std::sqrt(8 / std::acos(-1.0)) * (1 + 3 * 0.044715 * x * x); }
double inner(double x) { return std::sqrt(8 / std::acos(-1.0)) * (x + 0.044715 * x * x * x); }

// Where a product of the formula is 0 * inf, the limit; formulas otherwise.
template <class F>
double or_limit(double x, double at_minus, double at_plus, const F& f) {
  if (x < -1e6) return at_minus;
  if (x > 1e6) return at_plus;
  return f(x);
}

double relu(double x) { return x <= 0 ? 0 : x; }
double relu_grad(double x) { return x <= 0 ? 0 : 1; }
double gelu(double x) {
  return or_limit(x, 0, x, [](double t) { return t * cdf(t); });
}
double gelu_grad(double x) {
  return or_limit(x, 0, 1, [](double t) { return cdf(t) + t * density(t); });
}
double gelu_tanh(double x) {
  return or_limit(x, 0, x, [](double t) { return t * logistic(inner(t)); });
}
double gelu_tanh_grad(double x) {
  return or_limit(x, 0, 1, [](double t) {
    const double s = logistic(inner(t));
    return s * (1 + t * slope(t) * logistic(-inner(t)));
  });
}
double silu(double x) {
  return or_limit(x, 0, x, [](double t) { return t * logistic(t); });
}
double silu_grad(double x) {
  return or_limit(x, 0, 1, [](double t) { return logistic(t) * (1 + t * logistic(-t)); });
}

template <Activation kActivation, class F, class G>
void check_activation(const char* name, const F& exact, const G& exact_grad) {
  char tail_name[64], grad_name[64];
  std::snprintf(tail_name, sizeof(tail_name), "%s tail", name);
  std::snprintf(grad_name, sizeof(grad_name), "%s_grad", name);
  const auto f = [](auto x) { return activate<kActivation>(x); };
  const auto g = [](auto x) { return activate_grad<kActivation>(x, decltype(x)::set1(1)); };
  check(name, 8, 0.02, f, exact);
  // Relative accuracy down to where the value vanishes; gelu_tanh pays the rounding of its
  // argument, and gelu too on a machine without fused multiply-add.
  check(tail_name, 200, 1e-29, f, exact);
  check(grad_name, 4.5, 0.5, g, exact_grad);
  check_double(name, f, exact);
  check_double(grad_name, g, exact_grad);
}

}  // namespace

int run() {
  check(
      "exp", 5, 1e-30, [](VecF x) { return exp(x); }, [](double x) { return std::exp(x); });
  check(
      "tanh", 2.5, 1e-38, [](VecF x) { return tanh(x); }, [](double x) { return std::tanh(x); });
  check_double(
      "exp", [](VecD x) { return exp(x); }, [](double x) { return std::exp(x); });
  check_double(
      "tanh", [](VecD x) { return tanh(x); }, [](double x) { return std::tanh(x); });
  check_activation<Activation::kRelu>("relu", relu, relu_grad);
  check_activation<Activation::kGelu>("gelu", gelu, gelu_grad);
  check_activation<Activation::kGeluTanh>("gelu_tanh", gelu_tanh, gelu_tanh_grad);
  check_activation<Activation::kSilu>("silu", silu, silu_grad);
  if (failures) std::printf("%d failures\n", failures);
  return failures ? 1 : 0;
}

}  // namespace LLMKERN_ISA
}  // namespace llmkern

int main() { return llmkern::LLMKERN_ISA::run(); }
