// The attention forward kernel against the formula in double. One thread.
#include "attention_fwd.cpp"
#include "attention_problem.h"
#include "threads.cpp"

namespace llmkern {
namespace LLMKERN_ISA {
namespace {

template <class T>
struct Tensors : Inputs<T> {
  T out[kHeads * kMostLen * kMostDim];
  Compute<T> lse[kHeads * kMostLen], scratch[1 << 17];
};

template <class T>
void check_row(const Tensors<T>& t, const Case& c, int64_t h, int64_t i, double tolerance) {
  double weight[kMostLen], sum = c.sinks ? std::exp(static_cast<double>(t.sinks[h])) : 0, capped;
  for (int64_t j = 0; j < c.kv_len; ++j) {
    weight[j] = t.visible(c, i, j) ? std::exp(t.score(c, h, i, j, &capped)) : 0;
    sum += weight[j];
  }
  const double lse = static_cast<double>(t.lse[h * c.q_len + i]);
  const double want_lse = std::log(sum);
  if (!(lse == want_lse || std::fabs(lse - want_lse) <= tolerance)) fail("lse", i, lse, want_lse);
  for (int64_t d = 0; d < c.value_dim; ++d) {
    double want = 0;
    for (int64_t j = 0; j < c.kv_len; ++j) {
      if (weight[j] > 0) {
        want += weight[j] / sum * t.kept(c, h, i, j) *
                value(t.v[(h / 2 * c.kv_len + j) * c.value_dim + d]);
      }
    }
    const double got = value(t.out[(h * c.q_len + i) * c.value_dim + d]);
    if (!(std::fabs(got - want) <= tolerance)) fail("out", i * 1000 + d, got, want);
  }
}

template <class T>
void check(Tensors<T>* t, const Case& c, DType dtype, double tolerance) {
  t->make(c);
  AttentionFwdArgs a{};
  a.shape = t->shape(c, dtype);
  a.in = t->arguments(c);
  a.out = t->out;
  t->rows(a.out_stride, c.q_len, c.value_dim);
  a.lse = t->lse;
  a.scratch = t->scratch;
  if (attention_fwd_scratch_bytes(a.shape, 1) > static_cast<int64_t>(sizeof(t->scratch))) {
    fail("scratch", 0, static_cast<double>(attention_fwd_scratch_bytes(a.shape, 1)), 0);
    return;
  }
  attention_fwd(a);
  for (int64_t h = 0; h < kHeads; ++h) {
    for (int64_t i = 0; i < c.q_len; ++i) check_row(*t, c, h, i, tolerance);
  }
}

template <class T>
void check_all(Tensors<T>* t, DType dtype, double tolerance) {
  for (const Case& c : kCases) check(t, c, dtype, tolerance);
}

}  // namespace

int run() {
  static Tensors<float> floats;
  static Tensors<double> doubles;
  static Tensors<BFloat16> bfloats;
  static Tensors<Float16> halves;
  check_all(&floats, DType::kFloat32, 1e-5);
  check_all(&doubles, DType::kFloat64, 1e-12);
  check_all(&bfloats, DType::kBFloat16, 1e-2);
  check_all(&halves, DType::kFloat16, 1e-3);
  if (failures) std::printf("%d failures\n", failures);
  return failures ? 1 : 0;
}

}  // namespace LLMKERN_ISA
}  // namespace llmkern

int main() { return llmkern::LLMKERN_ISA::run(); }
