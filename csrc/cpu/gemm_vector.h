// Products of at most kVectorRows rows: the weight is read once, as it lies, at the speed of the
// memory that holds it. Rows of the weight along k: dot products, kLanes partial sums each. Rows
// along n: four of them at a time are added into the sums.
#pragma once

#include "gemm_epilogue.h"
#include "gemm_plan.h"

namespace llmkern {
namespace LLMKERN_ISA {

// sum[m][j] = x[m] . w[j], j < cols; kTogether rows of w share each load of x.
template <int kM, class T, class C = Compute<T>>
void dot_rows(const C* x, const T* w, int64_t w_stride, int64_t k, int64_t cols, C* sum,
              int64_t sum_stride) {
  using V = Vec<C>;
  constexpr int kTogether = kM == 1 ? 8 : kM == 2 ? 4 : 2;  // 8 chains: latency 4, 2 ports
  for (int64_t j = 0; j < cols; j += kTogether) {
    const T* row[kTogether];
    for (int i = 0; i < kTogether; ++i) row[i] = w + min_of(j + i, cols - 1) * w_stride;
    V s[kTogether][kM];
    for (int i = 0; i < kTogether; ++i)
      for (int m = 0; m < kM; ++m) s[i][m] = V::zero();
    for_columns<V::kLanes>(k, [&](int64_t c, int lanes) {
      V xm[kM];
      for (int m = 0; m < kM; ++m) xm[m] = load<V>(x + m * k + c, lanes);
      for (int i = 0; i < kTogether; ++i) {
        const V wi = load<V>(row[i] + c, lanes);
        for (int m = 0; m < kM; ++m) s[i][m] = V::fma(wi, xm[m], s[i][m]);
      }
    });
    for (int i = 0; i < kTogether && j + i < cols; ++i)
      for (int m = 0; m < kM; ++m) sum[m * sum_stride + j + i] = s[i][m].sum();
  }
}

// sum[m][j] += x[m][c .. c + kSteps) . w[c .. c + kSteps)[j]
template <int kM, int kSteps, class T, class C = Compute<T>>
void add_rows(const C* x, int64_t x_stride, const T* w, int64_t w_stride, int64_t cols, C* sum,
              int64_t sum_stride) {
  using V = Vec<C>;
  for_columns<V::kLanes>(cols, [&](int64_t j, int lanes) {
    V wk[kSteps];
    for (int c = 0; c < kSteps; ++c) wk[c] = load<V>(w + c * w_stride + j, lanes);
    for (int m = 0; m < kM; ++m) {
      V s = V::broadcast(x + m * x_stride) * wk[0];
      for (int c = 1; c < kSteps; ++c) s = V::fma(V::broadcast(x + m * x_stride + c), wk[c], s);
      C* const p = sum + m * sum_stride + j;
      store(p, load<V>(p, lanes) + s, lanes);
    }
  });
}

template <int kM, class T, class C = Compute<T>>
void vector_sums(const C* x, const T* w, const int64_t* stride, int64_t k, int64_t cols, C* sum,
                 int64_t sum_stride) {
  if (stride[1] == 1) return dot_rows<kM>(x, w, stride[0], k, cols, sum, sum_stride);
  constexpr int kSteps = 4;
  for (int64_t i = 0; i < kM * sum_stride; ++i) sum[i] = 0;
  int64_t c = 0;
  for (; c + kSteps <= k; c += kSteps)
    add_rows<kM, kSteps>(x + c, k, w + c * stride[1], stride[1], cols, sum, sum_stride);
  for (; c < k; ++c) add_rows<kM, 1>(x + c, k, w + c * stride[1], stride[1], cols, sum, sum_stride);
}

template <int kM, class T>
void gemm_vector(const GemmArgs& g) {
  using C = Compute<T>;
  const GemmShape& s = g.shape;
  const VectorPlan p = vector_plan(s, gemm_threads(s));
  C* const x = static_cast<C*>(g.scratch);
  const T* const a = static_cast<const T*>(g.a);
  for (int64_t m = 0; m < kM; ++m)
    for (int64_t c = 0; c < s.k; ++c)
      x[m * s.k + c] = as_float(a[m * s.a_stride[0] + c * s.a_stride[1]]);
  run_tasks(p.threads, ceil_div(s.n, p.cols), [&](int64_t task, int thread) {
    const int64_t col = task * p.cols, cols = min_of(p.cols, s.n - col);
    C* const sum = x + p.x + thread * p.thread;
    for (int part = 0; part < (s.gated ? 2 : 1); ++part)
      vector_sums<kM>(x, static_cast<const T*>(g.b[part]) + col * s.b_stride[part][0],
                      s.b_stride[part], s.k, cols, sum + part * kM * p.cols, p.cols);
    epilogue_block<T>(g.epilogue, s.gated, s.n, sum, sum + kM * p.cols, p.cols, 0, kM, col, cols);
  });
}

}  // namespace LLMKERN_ISA
}  // namespace llmkern
