// The attention backward kernel against the derivative of the formula in double: gradients of q, k,
// v, of a bias of each shape, and of sinks. out and lse come from the formula too. One thread.
#include "attention_bwd.cpp"
#include "attention_problem.h"
#include "threads.cpp"

namespace llmkern {
namespace LLMKERN_ISA {
namespace {

constexpr int64_t kRows = kHeads * kMostLen, kScores = kMostLen * kMostLen;

template <class T>
struct Tensors : Inputs<T> {
  using C = Compute<T>;
  T out[kRows * kMostDim], dout[kRows * kMostDim];
  T dq[kRows * kMostDim], dk[kRows * kMostDim], dv[kRows * kMostDim];
  C lse[kRows], dlse[kRows], dbias[kScores], scratch[1 << 20];
  float dsinks[kHeads];
};

// What the formula gives.
struct Exact {
  double dq[kRows * kMostDim], dk[kRows * kMostDim], dv[kRows * kMostDim];
  double dbias[kScores], dsinks[kHeads];
};

// p_j of a row, its out and lse.
template <class T>
void forward_row(Tensors<T>* t, const Case& c, int64_t h, int64_t i, double* p, double* capped) {
  const int64_t row = h * c.q_len + i;
  double sum = c.sinks ? std::exp(static_cast<double>(t->sinks[h])) : 0;
  for (int64_t j = 0; j < c.kv_len; ++j) {
    p[j] = t->visible(c, i, j) ? std::exp(t->score(c, h, i, j, capped + j)) : 0;
    sum += p[j];
  }
  t->lse[row] = static_cast<Compute<T>>(std::log(sum));
  for (int64_t j = 0; j < c.kv_len; ++j) p[j] = sum > 0 ? p[j] / sum : 0;
  for (int64_t d = 0; d < c.value_dim; ++d) {
    double out = 0;
    for (int64_t j = 0; j < c.kv_len; ++j) {
      if (p[j] > 0) {
        out += p[j] * t->kept(c, h, i, j) * value(t->v[(h / 2 * c.kv_len + j) * c.value_dim + d]);
      }
    }
    put(t->out + row * c.value_dim + d, static_cast<Compute<T>>(out));
  }
}

template <class T>
void backward_row(Tensors<T>* t, const Case& c, int64_t h, int64_t i, Exact* e) {
  double p[kMostLen], capped[kMostLen], dp[kMostLen];
  forward_row(t, c, h, i, p, capped);
  const int64_t row = h * c.q_len + i, keys = h / 2 * c.kv_len;
  double delta = t->lse[row] == -HUGE_VAL ? 0 : -static_cast<double>(t->dlse[row]);
  for (int64_t j = 0; j < c.kv_len; ++j) {
    dp[j] = 0;
    if (p[j] == 0) continue;
    const double kept = t->kept(c, h, i, j);
    for (int64_t d = 0; d < c.value_dim; ++d) {
      const double g = value(t->dout[row * c.value_dim + d]);
      dp[j] += kept * g * value(t->v[(keys + j) * c.value_dim + d]);
      e->dv[(keys + j) * c.value_dim + d] += p[j] * kept * g;
    }
    delta += p[j] * dp[j];
  }
  for (int64_t j = 0; j < c.kv_len; ++j) {
    if (p[j] == 0) continue;
    const double ds = p[j] * (dp[j] - delta), raw = kScoreScale * ds * (1 - capped[j] * capped[j]);
    e->dbias[i * c.kv_len + j] += ds;
    for (int64_t d = 0; d < c.head_dim; ++d) {
      e->dq[row * c.head_dim + d] += raw * value(t->k[(keys + j) * c.head_dim + d]);
      e->dk[(keys + j) * c.head_dim + d] += raw * value(t->q[row * c.head_dim + d]);
    }
  }
  if (c.sinks) {
    const double lse = static_cast<double>(t->lse[row]);
    e->dsinks[h] -= std::exp(static_cast<double>(t->sinks[h]) - lse) * delta;
  }
}

template <class T>
void compare(const char* what, const T* got, const double* want, int64_t n, double tolerance) {
  double most = 1;
  for (int64_t i = 0; i < n; ++i) most = max_of(most, std::fabs(want[i]));
  for (int64_t i = 0; i < n; ++i) {
    if (!(std::fabs(value(got[i]) - want[i]) <= tolerance * most))
      fail(what, i, value(got[i]), want[i]);
  }
}

// A bias that broadcasts over queries or keys or both, beside the full one: sums of its gradient.
template <class T>
void check_bias(Tensors<T>* t, const Case& c, const AttentionBwdArgs& full, const Exact& e,
                double tolerance) {
  for (int kind = 0; kind < 4; ++kind) {
    AttentionBwdArgs a = full;
    const int64_t rows = kind & 1 ? 1 : c.q_len, cols = kind & 2 ? 1 : c.kv_len;
    a.dbias = t->dbias;
    a.dbias_stride[2] = rows > 1 ? cols : 0;
    a.dbias_stride[3] = cols > 1 ? 1 : 0;
    static double want[kScores];
    for (int64_t x = 0; x < rows * cols; ++x) want[x] = t->dbias[x] = 0;
    for (int64_t i = 0; i < c.q_len; ++i)
      for (int64_t j = 0; j < c.kv_len; ++j)
        want[i % rows * cols + j % cols] += e.dbias[i * c.kv_len + j];
    attention_bwd(a);
    compare("dbias", t->dbias, want, rows * cols, tolerance);
  }
}

template <class T>
void check(Tensors<T>* t, const Case& c, DType dtype, double tolerance) {
  static Exact e;
  e = Exact{};
  t->make(c);
  fill(t->dout, kHeads * c.q_len * c.value_dim, 7, 1.0);
  fill(t->dlse, kHeads * c.q_len, 8, 1.0);
  for (int64_t h = 0; h < kHeads; ++h)
    for (int64_t i = 0; i < c.q_len; ++i) backward_row(t, c, h, i, &e);
  AttentionBwdArgs a{};
  a.shape = t->shape(c, dtype);
  a.in = t->arguments(c);
  a.out = t->out;
  a.dout = t->dout;
  t->rows(a.out_stride, c.q_len, c.value_dim);
  t->rows(a.dout_stride, c.q_len, c.value_dim);
  a.lse = t->lse;
  a.dlse = t->dlse;
  a.dq = t->dq;
  a.dk = t->dk;
  a.dv = t->dv;
  t->rows(a.dq_stride, c.q_len, c.head_dim);
  t->rows(a.dk_stride, c.kv_len, c.head_dim);
  t->rows(a.dv_stride, c.kv_len, c.value_dim);
  a.dsinks = c.sinks ? t->dsinks : nullptr;
  a.scratch = t->scratch;
  if (attention_bwd_scratch_bytes(a.shape, 1) > static_cast<int64_t>(sizeof(t->scratch))) {
    fail("scratch", 0, static_cast<double>(attention_bwd_scratch_bytes(a.shape, 1)), 0);
    return;
  }
  fill(t->scratch, sizeof(t->scratch) / sizeof(Compute<T>), 0, NAN);
  attention_bwd(a);
  compare("dq", t->dq, e.dq, kHeads * c.q_len * c.head_dim, tolerance);
  compare("dk", t->dk, e.dk, kKvHeads * c.kv_len * c.head_dim, tolerance);
  compare("dv", t->dv, e.dv, kKvHeads * c.kv_len * c.value_dim, tolerance);
  if (c.sinks) compare("dsinks", t->dsinks, e.dsinks, kHeads, max_of(1e-6, tolerance));
  if (!c.bias) return;
  a.dq = a.dk = a.dv = nullptr;
  check_bias(t, c, a, e, 4 * tolerance);
}

template <class T>
void check_all(DType dtype, double tolerance) {
  static Tensors<T> t;
  for (const Case& c : kCases) check(&t, c, dtype, tolerance);
}

}  // namespace

int run() {
  check_all<float>(DType::kFloat32, 1e-5);
  check_all<double>(DType::kFloat64, 1e-12);
  check_all<BFloat16>(DType::kBFloat16, 2e-2);
  check_all<Float16>(DType::kFloat16, 3e-3);
  if (failures) std::printf("%d failures\n", failures);
  return failures ? 1 : 0;
}

}  // namespace LLMKERN_ISA
}  // namespace llmkern

int main() { return llmkern::LLMKERN_ISA::run(); }
