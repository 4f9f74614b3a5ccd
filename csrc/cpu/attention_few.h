// Scores and values for a panel with few queries (decoding): the vector lanes lie along the head
// dimension, since along the queries most would be empty. k and v are read in place in their
// storage type, each row once per query out of L1; at one query this is bound by the memory that
// feeds them.
#pragma once

#include "attention_common.h"

namespace llmkern {
namespace LLMKERN_ISA {

// A register tile costs the same for 1 query as for AttentionTile<C>::kLanes of them; the cost here
// grows with the queries.
constexpr int kFewQueries = 4;

template <class V, class E>
static inline V load_lanes(const E* p, int64_t left) {
  return left >= V::kLanes ? V::load(p) : V::load_n(p, static_cast<int>(left));
}

// scores[r * kLanes + i] = <k_r, q_i>; the other lanes become 0. q is [queries][dim], scaled.
template <class C, class E>
static void few_scores(const E* k, int64_t stride, int64_t keys, const C* q, int queries,
                       int64_t dim, C* scores) {
  using V = Vec<C>;
  constexpr int kL = V::kLanes, kLanes = AttentionTile<C>::kLanes;
  for (int64_t r = 0; r < keys; ++r) {
    for (int v = 0; v < AttentionTile<C>::kVecs; ++v) V::zero().store(scores + r * kLanes + v * kL);
  }
  for (int64_t r0 = 0; r0 < keys; r0 += kL) {
    const int64_t last = keys - 1 - r0;
    for (int i = 0; i < queries; ++i) {
      V dot[kL];
      for (int u = 0; u < kL; ++u) dot[u] = V::zero();
      for (int64_t d = 0; d < dim; d += kL) {
        const V x = load_lanes<V>(q + i * dim + d, dim - d);
        // Past the last key its row is read again.
        for (int u = 0; u < kL; ++u) {
          const E* row = k + (r0 + min_of<int64_t>(u, last)) * stride;
          dot[u] = V::fma(load_lanes<V>(row + d, dim - d), x, dot[u]);
        }
      }
      transpose(dot);
      for (int half = kL / 2; half > 0; half /= 2) {
        for (int u = 0; u < half; ++u) dot[u] = dot[u] + dot[u + half];
      }
      C sums[kL];
      dot[0].store(sums);
      for (int64_t u = 0; u <= min_of<int64_t>(last, kL - 1); ++u) {
        scores[(r0 + u) * kLanes + i] = sums[u];
      }
    }
  }
}

// out[i][d] = out[i][d] * rescale[i] + sum_r probs[r][i] v_r[d]. A key whose probability is 0 is
// not multiplied: hidden ones may hold NaN.
template <class C, class E>
static void few_values(const E* v, int64_t stride, int64_t keys, const C* probs, int queries,
                       int64_t dim, const C* rescale, C* out, bool started) {
  using V = Vec<C>;
  constexpr int kL = V::kLanes, kLanes = AttentionTile<C>::kLanes, kSums = 8;
  for (int i = 0; i < queries; ++i) {
    for (int64_t d0 = 0; d0 < dim; d0 += kSums * kL) {
      const int64_t left = dim - d0;
      const int vectors = static_cast<int>(min_of<int64_t>(kSums, (left + kL - 1) / kL));
      C* at = out + i * dim + d0;
      V sum[kSums];
      for (int u = 0; u < kSums; ++u) {
        sum[u] = started && u < vectors ? load_lanes<V>(at + u * kL, left - u * kL) : V::zero();
        sum[u] = sum[u] * V::set1(rescale[i]);
      }
      for (int64_t r = 0; r < keys; ++r) {
        if (probs[r * kLanes + i] == C(0)) continue;
        const V p = V::broadcast(probs + r * kLanes + i);
        const E* row = v + r * stride + d0;
        if (left >= kSums * kL) {
          for (int u = 0; u < kSums; ++u) sum[u] = V::fma(p, V::load(row + u * kL), sum[u]);
        } else {
          for (int u = 0; u < vectors; ++u) {
            sum[u] = V::fma(p, load_lanes<V>(row + u * kL, left - u * kL), sum[u]);
          }
        }
      }
      for (int u = 0; u < vectors; ++u) {
        if (left - u * kL >= kL) {
          sum[u].store(at + u * kL);
        } else {
          sum[u].store_n(at + u * kL, static_cast<int>(left - u * kL));
        }
      }
    }
  }
}

// dst[i * dst_stride + d] = factor[i] * src[i * src_stride + d]; 0 where the factor is 0.
template <class T, class C>
static void scale_rows(const C* src, int64_t src_stride, const C* factor, int rows, int64_t dim,
                       T* dst, int64_t dst_stride) {
  using V = Vec<C>;
  for (int i = 0; i < rows; ++i) {
    for (int64_t d = 0; d < dim; d += V::kLanes) {
      V x = V::zero();
      if (factor[i] != C(0)) {
        x = load_lanes<V>(src + i * src_stride + d, dim - d) * V::set1(factor[i]);
      }
      T* p = dst + i * dst_stride + d;
      if (dim - d >= V::kLanes) {
        x.store(p);
      } else {
        x.store_n(p, static_cast<int>(dim - d));
      }
    }
  }
}

}  // namespace LLMKERN_ISA
}  // namespace llmkern
