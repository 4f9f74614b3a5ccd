// What forward and backward do to a block of scores, always in the transposed orientation: a block
// is S^T[keys][lanes], a row per key and a query per lane, one panel (AttentionTile<C>::kLanes
// queries) wide. Visibility is one bit per lane in a uint32_t per key, so the band, masks and
// dropout are integer work that costs nothing beside the scores.
#pragma once

#include "attention_tile.h"
#include "llmkern/attention.h"
#include "simd/math.h"
#include "simd/philox.h"
#include "simd/transpose.h"

namespace llmkern {
namespace LLMKERN_ISA {

constexpr uint32_t kAttentionStream = 0x61747465u;

static_assert(AttentionTile<float>::kLanes <= 32, "one uint32_t holds a panel's bits");
static_assert(AttentionTile<double>::kLanes == VecU::kLanes,
              "one Philox call serves a double panel");

// The first n lanes.
static inline uint32_t first_bits(int64_t n) {
  return n >= 32 ? ~0u : n <= 0 ? 0u : (1u << n) - 1u;
}

// One panel of queries against a run of keys. Lanes at and above `lanes` hold no query.
struct PanelBlock {
  int64_t i0, j0;
  int lanes;
  int64_t keys;
};

// Keys [begin, end) of the band that any of the queries [i0, i1) sees, and those that all of them
// do.
struct KeyRange {
  int64_t begin, end, all_begin, all_end;
};

static inline KeyRange band_keys(const AttentionShape& s, int64_t i0, int64_t i1) {
  const int64_t zero = 0;
  return {max_of(zero, i0 + s.shift - s.left), min_of(s.kv_len, i1 + s.shift + s.right),
          max_of(zero, i1 - 1 + s.shift - s.left), min_of(s.kv_len, i0 + 1 + s.shift + s.right)};
}

// One (batch, query head): where its operands start, and its score rules.
template <class T>
struct AttentionHead {
  using C = Compute<T>;
  const T *q, *k, *v;
  int64_t q_stride, k_stride, v_stride;  // of rows
  const C* bias;
  int64_t bias_i, bias_j;
  const uint8_t* mask;
  int64_t mask_i, mask_j;
  const uint8_t* key_mask;
  C slope;  // 0 without ALiBi
  C sink;   // -inf without sinks
  uint32_t bh;
};

template <class T>
static inline AttentionHead<T> attention_head(const AttentionShape& s, const AttentionInputs& in,
                                              int64_t b, int64_t h) {
  const int64_t g = h / (s.heads / s.kv_heads);
  AttentionHead<T> head{};
  head.q = static_cast<const T*>(in.q) + b * in.q_stride[0] + h * in.q_stride[1];
  head.k = static_cast<const T*>(in.k) + b * in.k_stride[0] + g * in.k_stride[1];
  head.v = static_cast<const T*>(in.v) + b * in.v_stride[0] + g * in.v_stride[1];
  head.q_stride = in.q_stride[2];
  head.k_stride = in.k_stride[2];
  head.v_stride = in.v_stride[2];
  if (in.bias) {
    head.bias =
        static_cast<const Compute<T>*>(in.bias) + b * in.bias_stride[0] + h * in.bias_stride[1];
    head.bias_i = in.bias_stride[2];
    head.bias_j = in.bias_stride[3];
  }
  if (in.mask) {
    head.mask = in.mask + b * in.mask_stride[0] + h * in.mask_stride[1];
    head.mask_i = in.mask_stride[2];
    head.mask_j = in.mask_stride[3];
  }
  if (in.key_mask) head.key_mask = in.key_mask + b * s.kv_len;
  if (in.slopes) head.slope = in.slopes[b * in.slopes_stride[0] + h * in.slopes_stride[1]];
  head.sink = in.sinks ? in.sinks[h] : -HUGE_VAL;
  head.bh = static_cast<uint32_t>(b * s.heads + h);
  return head;
}

// dst[d * ld + l] = scale * src[l * stride + d] for one panel; lanes without a row become 0.
template <class C, class T>
static void pack_transposed(const T* src, int64_t stride, int lanes, int64_t dim, C scale, C* dst,
                            int64_t ld) {
  using V = Vec<C>;
  constexpr int kL = V::kLanes;
  const V factor = V::set1(scale);
  for (int l0 = 0; l0 < AttentionTile<C>::kLanes; l0 += kL) {
    for (int64_t d = 0; d < dim; d += kL) {
      const int n = static_cast<int>(min_of<int64_t>(kL, dim - d));
      V t[kL];
      for (int l = 0; l < kL; ++l) {
        const T* p = src + (l0 + l) * stride + d;
        t[l] = l0 + l >= lanes ? V::zero() : n == kL ? V::load(p) : V::load_n(p, n);
      }
      transpose(t);
      for (int c = 0; c < n; ++c) (t[c] * factor).store(dst + (d + c) * ld + l0);
    }
  }
}

// dst[l * stride + d] = factor[l] * src[d * ld + l] for the panel's live lanes: the way back.
template <class C, class T>
static void unpack_transposed(const C* src, int64_t ld, const C* factor, int lanes, int64_t dim,
                              T* dst, int64_t stride) {
  using V = Vec<C>;
  constexpr int kL = V::kLanes;
  for (int l0 = 0; l0 < lanes; l0 += kL) {
    const V f = V::load(factor + l0);
    for (int64_t d = 0; d < dim; d += kL) {
      const int n = static_cast<int>(min_of<int64_t>(kL, dim - d));
      V t[kL];
      // A lane whose factor is 0 (a row that saw no key) gives 0 whatever it holds.
      for (int c = 0; c < kL; ++c) {
        const V x = c < n ? V::load(src + (d + c) * ld + l0) * f : V::zero();
        t[c] = V::keep(~V::eq(f, V::zero()), x);
      }
      transpose(t);
      for (int l = 0; l < min_of(kL, lanes - l0); ++l) {
        T* p = dst + (l0 + l) * stride + d;
        if (n == kL) {
          t[l].store(p);
        } else {
          t[l].store_n(p, n);
        }
      }
    }
  }
}

// Whether every element is finite: x * 0 is 0 for those only.
template <class C>
static inline bool rows_finite(const C* rows, int64_t stride, int64_t n, int64_t dim) {
  using V = Vec<C>;
  V acc = V::zero();
  for (int64_t r = 0; r < n; ++r) {
    const C* p = rows + r * stride;
    int64_t d = 0;
    for (; d + V::kLanes <= dim; d += V::kLanes) acc = V::fma(V::load(p + d), V::zero(), acc);
    if (d < dim) acc = V::fma(V::load_n(p + d, static_cast<int>(dim - d)), V::zero(), acc);
  }
  return V::eq(acc, acc).all();
}

// Rows as compute type, rows that key_mask hides as 0; dst is [n][ld].
template <class C, class T>
static void copy_rows(const T* src, int64_t stride, int64_t n, int64_t dim, const uint8_t* key_mask,
                      C* dst, int64_t ld) {
  using V = Vec<C>;
  for (int64_t r = 0; r < n; ++r) {
    const bool visible = !key_mask || key_mask[r];
    const T* p = src + r * stride;
    C* out = dst + r * ld;
    int64_t d = 0;
    for (; d + V::kLanes <= dim; d += V::kLanes)
      (visible ? V::load(p + d) : V::zero()).store(out + d);
    if (d < dim) {
      const int left = static_cast<int>(dim - d);
      (visible ? V::load_n(p + d, left) : V::zero()).store_n(out + d, left);
    }
  }
}

enum class Seen { kNone, kSome, kAll };

static inline Seen key_mask_seen(const uint8_t* key_mask, int64_t n) {
  int64_t visible = 0;
  for (int64_t r = 0; r < n; ++r) visible += key_mask[r] != 0;
  return visible == 0 ? Seen::kNone : visible == n ? Seen::kAll : Seen::kSome;
}

// bits[r] &= the band. Lane l sees key j iff j - right <= i0 + l + shift <= j + left.
static inline void band_bits(const AttentionShape& s, const PanelBlock& p, uint32_t* bits) {
  for (int64_t r = 0; r < p.keys; ++r) {
    const int64_t at = p.j0 + r - s.shift - p.i0;
    bits[r] &= first_bits(at + s.left + 1) & ~first_bits(at - s.right);
  }
}

// Each byte to 0 or 1.
static inline uint64_t nonzero_bytes(uint64_t x) {
  const uint64_t low = 0x7f7f7f7f7f7f7f7fu;
  return ((((x & low) + low) | x) >> 7) & 0x0101010101010101u;
}

// bits[r] &= mask[l * stride_i + r * stride_j]. With keys contiguous, 8 bytes of 8 queries at a
// time: byte k of the sum of x_l << l holds the lane bits of key k.
static void mask_bits(const uint8_t* mask, int64_t stride_i, int64_t stride_j, const PanelBlock& p,
                      uint32_t* bits) {
  if (stride_i == 0) {
    for (int64_t r = 0; r < p.keys; ++r) bits[r] &= mask[r * stride_j] ? ~0u : 0u;
    return;
  }
  if (stride_j != 1) {
    for (int64_t r = 0; r < p.keys; ++r) {
      uint32_t row = 0;
      for (int l = 0; l < p.lanes; ++l) {
        row |= static_cast<uint32_t>(mask[l * stride_i + r * stride_j] != 0) << l;
      }
      bits[r] &= row;
    }
    return;
  }
  for (int64_t r0 = 0; r0 < p.keys; r0 += 8) {
    const int64_t n = min_of<int64_t>(8, p.keys - r0);
    uint32_t row[8] = {};
    for (int l0 = 0; l0 < p.lanes; l0 += 8) {
      uint64_t sum = 0;
      for (int l = 0; l < min_of(8, p.lanes - l0); ++l) {
        uint64_t x = 0;
        std::memcpy(&x, mask + (l0 + l) * stride_i + r0, static_cast<size_t>(n));
        sum |= nonzero_bytes(x) << l;
      }
      for (int k = 0; k < 8; ++k) {
        row[k] |= static_cast<uint32_t>((sum >> (8 * k)) & 0xffu) << l0;
      }
    }
    for (int64_t k = 0; k < n; ++k) bits[r0 + k] &= row[k];
  }
}

// Visibility of a block by band, key mask and mask. Lanes that hold no query read as `idle`.
template <class T>
static Seen visible_bits(const AttentionShape& s, const AttentionHead<T>& head, const PanelBlock& p,
                         bool idle, uint32_t* bits) {
  const uint32_t panel = first_bits(AttentionTile<Compute<T>>::kLanes), live = first_bits(p.lanes);
  for (int64_t r = 0; r < p.keys; ++r) bits[r] = live;
  const KeyRange band = band_keys(s, p.i0, p.i0 + p.lanes);
  if (p.j0 < band.all_begin || p.j0 + p.keys > band.all_end) band_bits(s, p, bits);
  if (head.key_mask) {
    for (int64_t r = 0; r < p.keys; ++r) bits[r] = head.key_mask[p.j0 + r] ? bits[r] : 0u;
  }
  if (head.mask) {
    mask_bits(head.mask + p.i0 * head.mask_i + p.j0 * head.mask_j, head.mask_i, head.mask_j, p,
              bits);
  }
  uint32_t any = 0, all = panel;
  const uint32_t rest = idle ? panel & ~live : 0u;
  for (int64_t r = 0; r < p.keys; ++r) {
    any |= bits[r];
    bits[r] |= rest;
    all &= bits[r];
  }
  return any == 0 ? Seen::kNone : all == panel ? Seen::kAll : Seen::kSome;
}

// The bias of a block, transposed into tile[keys][kLanes] (0 in idle lanes). kNone: all of it is
// -inf; kSome: some is.
template <class T>
static Seen load_bias(const AttentionHead<T>& head, const PanelBlock& p, Compute<T>* tile) {
  using C = Compute<T>;
  using V = Vec<C>;
  constexpr int kL = V::kLanes, kLanes = AttentionTile<C>::kLanes;
  const V hidden = V::set1(static_cast<C>(-HUGE_VAL));
  const C* bias = head.bias + p.i0 * head.bias_i + p.j0 * head.bias_j;
  typename V::Mask hides = V::Mask::first(0), shows = hides;
  for (int l0 = 0; l0 < kLanes; l0 += kL) {
    const int lanes = max_of(0, min_of(kL, p.lanes - l0));
    const auto put = [&](int64_t r, V x) {
      const typename V::Mask is_hidden = V::eq(x, hidden);
      hides = hides | is_hidden;
      shows = shows | (~is_hidden & V::Mask::first(lanes));
      x.store(tile + r * kLanes + l0);
    };
    const C* column = bias + l0 * head.bias_i;
    if (head.bias_i == 0 || head.bias_i == 1 || lanes == 0) {
      for (int64_t r = 0; r < p.keys; ++r) {
        const C* x = column + r * head.bias_j;
        put(r, lanes == 0 ? V::zero() : head.bias_i == 0 ? V::set1(*x) : V::load_n(x, lanes));
      }
      continue;
    }
    for (int64_t r0 = 0; r0 < p.keys; r0 += kL) {
      const int n = static_cast<int>(min_of<int64_t>(kL, p.keys - r0));
      V t[kL];
      for (int l = 0; l < kL; ++l) {
        const C* x = column + l * head.bias_i + r0 * head.bias_j;
        if (l >= lanes) {
          t[l] = V::zero();
        } else if (head.bias_j == 1) {
          t[l] = n == kL ? V::load(x) : V::load_n(x, n);
        } else {
          C gathered[kL];
          for (int k = 0; k < n; ++k) gathered[k] = x[k * head.bias_j];
          t[l] = V::load_n(gathered, n);
        }
      }
      transpose(t);
      for (int k = 0; k < n; ++k) put(r0 + k, t[k]);
    }
  }
  return !shows.any() ? Seen::kNone : hides.any() ? Seen::kSome : Seen::kAll;
}

// The score rules for a block of scaled dot products: softcap, bias, ALiBi, visibility, in that
// order. Any of the tables may be null. `capped` receives softcap's tanh, for the backward pass.
template <class C>
struct ScoreRules {
  C softcap;  // 0: off
  C slope;    // 0: off
  int64_t shift;
  const C* bias;         // [keys][AttentionTile<C>::kLanes]
  const uint32_t* bits;  // a hidden score becomes -inf, NaN included

  bool none() const { return softcap == C(0) && slope == C(0) && !bias && !bits; }
};

// seen(row, vector, score) is called with each finished score.
template <class C, class F>
static inline void apply_rules(const ScoreRules<C>& rules, const PanelBlock& p, C* scores,
                               int64_t ld, C* capped, const F& seen) {
  using V = Vec<C>;
  constexpr int kL = V::kLanes, kLanes = AttentionTile<C>::kLanes;
  const V hidden = V::set1(static_cast<C>(-HUGE_VAL));
  C lane_index[kLanes];
  for (int l = 0; l < kLanes; ++l) lane_index[l] = static_cast<C>(l);
  for (int64_t r = 0; r < p.keys; ++r) {
    for (int v = 0; v < AttentionTile<C>::kVecs; ++v) {
      C* at = scores + r * ld + v * kL;
      V x = V::load(at);
      if (rules.softcap != C(0)) {
        const V t = tanh(x * V::set1(C(1) / rules.softcap));
        if (capped) t.store(capped + r * ld + v * kL);
        x = t * V::set1(rules.softcap);
      }
      if (rules.bias) {
        const V b = V::load(rules.bias + r * kLanes + v * kL);
        x = V::select(V::eq(b, hidden), hidden, x + b);
      }
      if (rules.slope != C(0)) {
        const V offset = V::set1(static_cast<C>(p.i0 + rules.shift - p.j0 - r));
        x = V::fnma(V::set1(rules.slope), V::abs(offset + V::load(lane_index + v * kL)), x);
      }
      if (rules.bits) x = V::select(V::Mask::from_bits(rules.bits[r] >> (v * kL)), x, hidden);
      x.store(at);
      seen(r, v, x);
    }
  }
}

// Factor of a kept probability, in full precision (s.drop_scale is a float); 0 if none is kept.
template <class C>
static inline C kept_scale(const AttentionShape& s) {
  return s.drop_threshold < 65536 ? C(65536) / static_cast<C>(65536 - s.drop_threshold) : C(0);
}

// keep[r], bit l: whether dropout keeps (i0 + l, j0 + r). j0 must be a multiple of 8.
template <class C>
static void keep_bits(const AttentionShape& s, uint32_t bh, const PanelBlock& p, uint32_t* keep) {
  const uint64_t seed = static_cast<uint64_t>(*s.seed);
  const VecU threshold = VecU::set1(s.drop_threshold), low = VecU::set1(0xffffu);
  for (int64_t r0 = 0; r0 < p.keys; r0 += kDecisionsPerCounter) {
    uint32_t row[kDecisionsPerCounter] = {};
    for (int l0 = 0; l0 < AttentionTile<C>::kLanes; l0 += VecU::kLanes) {
      const VecU query = VecU::set1(static_cast<uint32_t>(p.i0 + l0)) + VecU::iota();
      VecU c[4] = {VecU::set1(static_cast<uint32_t>((p.j0 + r0) / kDecisionsPerCounter)), query,
                   VecU::set1(bh), VecU::set1(kAttentionStream)};
      philox(c, seed);
      for (int w = 0; w < 4; ++w) {
        row[2 * w] |= (~VecU::less(c[w] & low, threshold)).bits() << l0;
        row[2 * w + 1] |= (~VecU::less(c[w].template shr<16>(), threshold)).bits() << l0;
      }
    }
    const int64_t n = min_of<int64_t>(kDecisionsPerCounter, p.keys - r0);
    for (int64_t k = 0; k < n; ++k) keep[r0 + k] = row[k];
  }
}

}  // namespace LLMKERN_ISA
}  // namespace llmkern
