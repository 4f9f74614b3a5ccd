// The attention forward kernel against the formula in double, every feature at once and one by one,
// at sizes around its panels, blocks and the path for few queries. One thread: the OpenMP entry
// points that parallel.h calls are defined here.
#include "attention_fwd.cpp"
#include "check.h"

extern "C" int omp_in_parallel(void) { return 0; }
extern "C" int omp_get_max_threads(void) { return 1; }
extern "C" int omp_get_thread_num(void) { return 0; }

namespace llmkern {
namespace LLMKERN_ISA {
namespace {

constexpr int64_t kHeads = 4, kKvHeads = 2, kMostLen = 150, kMostDim = 80;

struct Case {
  int64_t q_len, kv_len, head_dim, value_dim, shift, left, right;
  double softcap;
  bool bias, mask, key_mask, slopes, sinks;
};

double noise(int64_t i) { return static_cast<double>(i * 7919 % 1009) / 504.5 - 1.0; }

template <class T>
struct Tensors {
  T q[kHeads * kMostLen * kMostDim], k[kKvHeads * kMostLen * kMostDim];
  T v[kKvHeads * kMostLen * kMostDim], out[kHeads * kMostLen * kMostDim];
  Compute<T> bias[kMostLen * kMostLen], lse[kHeads * kMostLen], scratch[1 << 17];
  uint8_t mask[kMostLen * kMostLen], key_mask[kMostLen];
  float slopes[kHeads], sinks[kHeads];
};

template <class T>
void fill(T* to, int64_t n, int64_t from, double scale) {
  for (int64_t i = 0; i < n; ++i) {
    put(to + i, static_cast<Compute<T>>(scale * noise(from + i)));
  }
}

template <class T>
bool visible(const Tensors<T>& t, const Case& c, int64_t i, int64_t j) {
  const int64_t at = i + c.shift;
  if (j < at - c.left || j > at + c.right) return false;
  if (c.bias && t.bias[i * c.kv_len + j] == -HUGE_VAL) return false;
  if (c.mask && !t.mask[i * c.kv_len + j]) return false;
  return !c.key_mask || t.key_mask[j];
}

template <class T>
double score(const Tensors<T>& t, const Case& c, int64_t h, int64_t i, int64_t j) {
  double s = 0;
  for (int64_t d = 0; d < c.head_dim; ++d) {
    s += static_cast<double>(as_float(t.q[(h * c.q_len + i) * c.head_dim + d])) *
         static_cast<double>(as_float(t.k[(h / 2 * c.kv_len + j) * c.head_dim + d]));
  }
  s *= 0.5;
  if (c.softcap > 0) s = c.softcap * std::tanh(s / c.softcap);
  if (c.bias) s += static_cast<double>(t.bias[i * c.kv_len + j]);
  if (c.slopes) {
    s -= static_cast<double>(t.slopes[h]) * std::fabs(static_cast<double>(i + c.shift - j));
  }
  return s;
}

template <class T>
void check_row(const Tensors<T>& t, const Case& c, int64_t h, int64_t i, double tolerance) {
  double weight[kMostLen], sum = c.sinks ? std::exp(static_cast<double>(t.sinks[h])) : 0;
  for (int64_t j = 0; j < c.kv_len; ++j) {
    weight[j] = visible(t, c, i, j) ? std::exp(score(t, c, h, i, j)) : 0;
    sum += weight[j];
  }
  const double lse = static_cast<double>(t.lse[h * c.q_len + i]);
  const double want_lse = std::log(sum);
  if (!(lse == want_lse || std::fabs(lse - want_lse) <= tolerance)) fail("lse", i, lse, want_lse);
  for (int64_t d = 0; d < c.value_dim; ++d) {
    double want = 0;
    for (int64_t j = 0; j < c.kv_len; ++j) {
      if (weight[j] > 0) {
        want += weight[j] / sum *
                static_cast<double>(as_float(t.v[(h / 2 * c.kv_len + j) * c.value_dim + d]));
      }
    }
    const double got = static_cast<double>(as_float(t.out[(h * c.q_len + i) * c.value_dim + d]));
    if (!(std::fabs(got - want) <= tolerance)) fail("out", i * 1000 + d, got, want);
  }
}

template <class T>
void check(Tensors<T>* t, const Case& c, DType dtype, double tolerance) {
  fill(t->q, kHeads * c.q_len * c.head_dim, 1, 1.0);
  fill(t->k, kKvHeads * c.kv_len * c.head_dim, 2, 1.0);
  fill(t->v, kKvHeads * c.kv_len * c.value_dim, 3, 1.0);
  fill(t->bias, c.q_len * c.kv_len, 4, 2.0);
  fill(t->slopes, kHeads, 5, 0.2);
  fill(t->sinks, kHeads, 6, 1.0);
  for (int64_t i = 0; i < c.q_len * c.kv_len; ++i) {
    if (noise(i) < -0.6) t->bias[i] = static_cast<Compute<T>>(-HUGE_VAL);
    t->mask[i] = noise(3 * i + 1) < 0.5;
  }
  for (int64_t j = 0; j < c.kv_len; ++j) {
    t->key_mask[j] = noise(5 * j) < 0.5;
    // What no query sees may be anything.
    if (c.key_mask && !t->key_mask[j]) put(t->v + j * c.value_dim, static_cast<Compute<T>>(NAN));
  }
  AttentionFwdArgs a{};
  a.shape = {dtype, 1,         kHeads,  kKvHeads, c.q_len, c.kv_len, c.head_dim, c.value_dim,
             0.5,   c.softcap, c.shift, c.left,   c.right, 0,        1.0f,       nullptr};
  const auto rows = [](int64_t(&stride)[3], int64_t len, int64_t dim) {
    stride[1] = len * dim;
    stride[2] = dim;
  };
  a.in.q = t->q;
  a.in.k = t->k;
  a.in.v = t->v;
  rows(a.in.q_stride, c.q_len, c.head_dim);
  rows(a.in.k_stride, c.kv_len, c.head_dim);
  rows(a.in.v_stride, c.kv_len, c.value_dim);
  a.in.bias = c.bias ? t->bias : nullptr;
  a.in.mask = c.mask ? t->mask : nullptr;
  a.in.bias_stride[2] = a.in.mask_stride[2] = c.kv_len;
  a.in.bias_stride[3] = a.in.mask_stride[3] = 1;
  a.in.key_mask = c.key_mask ? t->key_mask : nullptr;
  a.in.slopes = c.slopes ? t->slopes : nullptr;
  a.in.slopes_stride[1] = 1;
  a.in.sinks = c.sinks ? t->sinks : nullptr;
  a.out = t->out;
  rows(a.out_stride, c.q_len, c.value_dim);
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
  constexpr int64_t kAny = kUnbounded;
  const Case cases[] = {
      {1, 1, 1, 1, 0, kAny, kAny, 0, false, false, false, false, false},
      {3, 100, 20, 9, 97, kAny, 0, 0, true, false, true, false, true},
      {5, 97, 64, 80, 0, kAny, kAny, 0, false, false, true, false, false},
      {33, 33, 64, 64, 0, kAny, 0, 0, false, false, false, false, false},
      {70, 130, 17, 33, 60, 40, 3, 0, false, true, false, true, false},
      {41, 96, 8, 16, 0, kAny, kAny, 1.5, true, false, false, false, false},
      {129, 150, 40, 24, 21, 100, 5, 2.0, true, true, true, true, true},
  };
  for (const Case& c : cases) check(t, c, dtype, tolerance);
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
