// One score block of the backward pass: kBwdKeys keys (rows) by kBwdQueries queries (lanes).
//
//   S^T = K Q^T, P^T = exp(S^T - lse), dP^T = V dO^T
//   dS^T = P^T o (drop(dP^T) - delta),  delta_i = <dO_i, O_i> - dlse_i
//   dV += drop(P^T) dO,  dK += dS^T Q,  dQ += dS K
//
// Hidden elements of both blocks are exactly 0, whatever their inputs hold. A row of K, Q or dO
// that is not finite would still turn those zeros into NaN inside the last three products, so such
// rows are taken out of them and added by add_row, which skips zero weights.
#pragma once

#include "attention_bwd_plan.h"
#include "attention_common.h"

namespace llmkern {
namespace LLMKERN_ISA {

struct Range {
  int64_t begin, end;
  int64_t size() const { return end > begin ? end - begin : 0; }
};

static inline Range intersect(Range a, Range b) {
  return {max_of(a.begin, b.begin), min_of(a.end, b.end)};
}

// The band of visible pairs in a block's own rows (keys) and lanes (queries): lane l sees rows
// l + offset - left to l + offset + right.
struct Band {
  int64_t offset, left, right, rows, lanes;

  // The rows that some lane of a non-empty range sees, and the other way round.
  Range rows_of(Range l) const {
    return intersect({l.begin + offset - left, l.end + offset + right}, {0, rows});
  }
  Range lanes_of(Range r) const {
    return intersect({r.begin - offset - right, r.end - offset + left}, {0, lanes});
  }
  bool hides_any() const { return offset + right + 1 < rows || lanes - 1 + offset - left > 0; }
};

template <class C>
static inline void clear_rows(C* p, int64_t rows, int64_t cols, int64_t ld) {
  for (int64_t r = 0; r < rows; ++r) std::memset(p + r * ld, 0, sizeof(C) * cols);
}

// dst[n] += w * src[n], the product that a weight of 0 does not enter.
template <class T, class C>
static inline void add_row(C w, const T* src, int64_t n, C* dst) {
  if (w == C(0)) return;
  for (int64_t j = 0; j < n; ++j) dst[j] += w * static_cast<C>(as_float(src[j]));
}

// Takes the rows that are not finite out of a block: they become 0 and their indices are returned.
template <class C>
struct BadRows {
  int64_t count;
  int64_t row[kBwdKeys];

  void remove_from(C* rows, int64_t n, int64_t cols, int64_t ld) {
    count = 0;
    if (rows_finite(rows, ld, n, cols)) return;
    for (int64_t r = 0; r < n; ++r) {
      if (rows_finite(rows + r * ld, ld, 1, cols)) continue;
      clear_rows(rows + r * ld, 1, cols, 0);
      row[count++] = r;
    }
  }
};

// The sums that blocks add to: rows of the block's queries, or of its keys; null: not wanted.
template <class C>
struct BwdSums {
  C *dq, *dk, *dv;
  int64_t dq_ld, dk_ld, dv_ld;
};

template <class T>
class BwdBlock {
 public:
  using C = Compute<T>;
  using V = Vec<C>;

  BwdBlock(const AttentionBwdArgs& args, const BwdPlan& plan, const C* delta, void* slot)
      : a_(args), s_(args.shape), plan_(plan), deltas_(delta), next_(static_cast<C*>(slot)) {
    lse_ = take(plan.lane_ld);
    delta_ = take(plan.lane_ld);
    qt_ = take(s_.head_dim * plan.lane_ld);
    dot_ = take(s_.value_dim * plan.lane_ld);
    q_ = take(kBwdQueries * plan.head_ld);
    do_ = take(kBwdQueries * plan.value_ld);
    k_ = take(plan.chunk_keys * plan.head_ld);
    v_ = take(plan.chunk_keys * plan.value_ld);
    score_ = take(kBwdKeys * plan.lane_ld);
    grad_ = take(kBwdKeys * plan.lane_ld);
    bias_ = take(kBwdKeys * plan.lane_ld);
    capped_ = take(kBwdKeys * plan.lane_ld);
  }

  // K and V of a chunk in the compute type, once for all query blocks that meet it: strided rows
  // read again and again cost a fifth of the time. Rows that the key mask hides become 0.
  void load_keys(int64_t b, int64_t g, Range keys) {
    head_ = attention_head<T>(s_, a_.in, b, g * (s_.heads / s_.kv_heads));
    chunk_ = keys.begin;
    reload_keys(keys.begin, keys.size());
    const uint8_t* key_mask = head_.key_mask ? head_.key_mask + keys.begin : nullptr;
    copy_rows<C>(head_.v + keys.begin * head_.v_stride, head_.v_stride, keys.size(), s_.value_dim,
                 key_mask, v_, plan_.value_ld);
    finite_ = rows_finite(k_, plan_.head_ld, keys.size(), s_.head_dim);
  }

  // Queries [i0, i0 + size) of a head, both ways round: Q^T and dO^T as the lanes of scores, Q and
  // dO as the rows that dK and dV sum.
  void load_queries(int64_t b, int64_t h, int64_t i0, int64_t size) {
    b_ = b, h_ = h, i0_ = i0, queries_ = size;
    head_ = attention_head<T>(s_, a_.in, b, h);
    dout_ = static_cast<const T*>(a_.dout) + b * a_.dout_stride[0] + h * a_.dout_stride[1] +
            i0 * a_.dout_stride[2];
    copy_rows<C>(head_.q + i0 * head_.q_stride, head_.q_stride, size, s_.head_dim, nullptr, q_,
                 plan_.head_ld);
    copy_rows<C>(dout_, a_.dout_stride[2], size, s_.value_dim, nullptr, do_, plan_.value_ld);
    for (int64_t l = 0; l < size; l += kPanel) {
      const int live = static_cast<int>(min_of<int64_t>(kPanel, size - l));
      pack_transposed(q_ + l * plan_.head_ld, plan_.head_ld, live, s_.head_dim,
                      static_cast<C>(s_.scale), qt_ + l, plan_.lane_ld);
      pack_transposed(do_ + l * plan_.value_ld, plan_.value_ld, live, s_.value_dim, C(1), dot_ + l,
                      plan_.lane_ld);
    }
    bad_q_.remove_from(q_, size, s_.head_dim, plan_.head_ld);
    bad_do_.remove_from(do_, size, s_.value_dim, plan_.value_ld);
    const int64_t base = (b * s_.heads + h) * s_.q_len + i0;
    const C* lse = static_cast<const C*>(a_.lse) + base;
    const C infinity = static_cast<C>(HUGE_VAL);
    for (int64_t l = 0; l < kBwdQueries; ++l) {
      // Rows that see nothing and lanes without a row: exp(s - inf) = 0.
      lse_[l] = l < size && lse[l] != -infinity ? lse[l] : infinity;
      delta_[l] = l < size ? deltas_[base + l] : C(0);
    }
  }

  // Computes drop(P^T) and scale * dS^T of keys [j0, j0 + size), j0 a multiple of 8; false if all
  // of the block is hidden. Adds dS to dbias on the way, if given.
  bool gradients(int64_t j0, int64_t size, C* dbias) {
    j0_ = j0, keys_ = size;
    band_ = {i0_ + s_.shift - j0, s_.left, s_.right, size, queries_};
    bool any = false, all = true;
    for (int64_t l = 0, x = 0; l < queries_; l += kPanel, ++x) {
      panel_[x] = look(x, l);
      any |= panel_[x].seen != Seen::kNone;
      all &= panel_[x].seen == Seen::kAll;
    }
    if (!any) return false;
    mixed_ = !all;
    for (int64_t l = 0, x = 0; l < queries_; l += kPanel, ++x) panel_gradients(x, l, dbias);
    return true;
  }

  // Adds the block's products to the sums. Once for each gradients().
  void accumulate(const BwdSums<C>& sums) {
    const auto lanes_of = [&](Range keys) { return band_.lanes_of(keys); };
    const auto keys_of = [&](Range lanes) { return band_.rows_of(lanes); };
    if (sums.dv) {
      add_bad(bad_do_, score_, dout_, a_.dout_stride[2], s_.value_dim, sums.dv, sums.dv_ld);
      product<AOrder::kRowMajor>(keys_, s_.value_dim, queries_, score_, do_, plan_.value_ld,
                                 sums.dv, sums.dv_ld, lanes_of);
    }
    if (sums.dk) {
      add_bad(bad_q_, grad_, head_.q + i0_ * head_.q_stride, head_.q_stride, s_.head_dim, sums.dk,
              sums.dk_ld);
      product<AOrder::kRowMajor>(keys_, s_.head_dim, queries_, grad_, q_, plan_.head_ld, sums.dk,
                                 sums.dk_ld, lanes_of);
    }
    if (!sums.dq) return;
    C* k = keys_at(j0_);
    const bool guard = mixed_ && !finite_;
    if (guard) add_bad_keys(k, sums);
    product<AOrder::kColMajor>(queries_, s_.head_dim, keys_, grad_, k, plan_.head_ld, sums.dq,
                               sums.dq_ld, keys_of);
    if (guard) reload_keys(j0_, keys_);
  }

 private:
  static constexpr int64_t kPanel = AttentionTile<C>::kLanes, kPanels = kBwdQueries / kPanel;
  static_assert(kBwdQueries % kPanel == 0, "a block is a whole number of panels");

  // A panel of queries against the keys that its band reaches: rows [begin, begin + keys).
  struct Panel {
    Seen seen;
    int64_t begin;
    PanelBlock block;
  };

  C* take(int64_t scalars) {
    C* p = next_;
    next_ += scalars;
    return p;
  }

  C* bias_of(int64_t x) const { return bias_ + x * kBwdKeys * kPanel; }

  // What panel x sees; fills its visibility bits and bias.
  Panel look(int64_t x, int64_t l) {
    const int64_t live = min_of(kPanel, queries_ - l);
    Range rows = band_.rows_of({l, l + live});
    rows.begin = rows.begin / 8 * 8;  // dropout counters hold 8 keys
    Panel panel{
        Seen::kNone, rows.begin, {i0_ + l, j0_ + rows.begin, static_cast<int>(live), rows.size()}};
    if (rows.size() == 0) return panel;
    // A bias of -inf hides too, and then the rules want the bits of all that is left.
    const bool open = !band_.hides_any() && !head_.mask && !head_.key_mask && !head_.bias;
    panel.seen = open ? Seen::kAll : visible_bits(s_, head_, panel.block, true, bits_[x]);
    if (panel.seen == Seen::kNone || !head_.bias) return panel;
    const Seen by_bias = load_bias(head_, panel.block, bias_of(x));
    if (by_bias != Seen::kAll) panel.seen = by_bias;
    return panel;
  }

  void reload_keys(int64_t j0, int64_t size) {
    const uint8_t* key_mask = head_.key_mask ? head_.key_mask + j0 : nullptr;
    copy_rows<C>(head_.k + j0 * head_.k_stride, head_.k_stride, size, s_.head_dim, key_mask,
                 keys_at(j0), plan_.head_ld);
  }

  C* keys_at(int64_t j) const { return k_ + (j - chunk_) * plan_.head_ld; }

  void panel_gradients(int64_t x, int64_t l, C* dbias) {
    const Panel& panel = panel_[x];
    const int64_t ld = plan_.lane_ld, keys = panel.seen == Seen::kNone ? 0 : panel.block.keys;
    C *score = score_ + l, *grad = grad_ + l;
    const int64_t begin = keys ? panel.begin : keys_, end = begin + keys;
    clear_rows(score, begin, kPanel, ld);
    clear_rows(grad, begin, kPanel, ld);
    if (keys == 0) return;
    clear_rows(score + end * ld, keys_ - end, kPanel, ld);
    clear_rows(grad + end * ld, keys_ - end, kPanel, ld);
    score += begin * ld;
    grad += begin * ld;
    tile_matmul<AOrder::kRowMajor>(keys, kPanel, s_.head_dim, keys_at(panel.block.j0),
                                   plan_.head_ld, qt_ + l, ld, StoreTo<C>{score, ld});
    tile_matmul<AOrder::kRowMajor>(keys, kPanel, s_.value_dim,
                                   v_ + (panel.block.j0 - chunk_) * plan_.value_ld, plan_.value_ld,
                                   dot_ + l, ld, StoreTo<C>{grad, ld});
    const ScoreRules<C> rules{static_cast<C>(s_.softcap), head_.slope, s_.shift,
                              head_.bias ? bias_of(x) : nullptr,
                              panel.seen == Seen::kAll ? nullptr : bits_[x]};
    const bool ruled = !rules.none();
    if (ruled) {
      C* capped = rules.softcap != C(0) ? capped_ : nullptr;
      apply_rules(rules, panel.block, score, ld, capped, [](int64_t, int, V) {});
    }
    if (s_.drop_threshold) keep_bits<C>(s_, head_.bh, panel.block, keep_);
    Elements at{panel.block, l, score, grad, dbias};
    if (ruled || s_.drop_threshold || dbias) {
      elements<true>(at);
    } else {
      elements<false>(at);
    }
    if (dbias && bias_is_one()) *at.dbias_at(a_, b_, h_) += at.bias_sum.sum();
  }

  // A panel of finished scores and of dP^T, and what becomes of them.
  struct Elements {
    const PanelBlock& block;
    int64_t lane;
    C *score, *grad, *dbias;
    V bias_sum = V::zero();
    C* dbias_at(const AttentionBwdArgs& a, int64_t b, int64_t h) const {
      return dbias + b * a.dbias_stride[0] + h * a.dbias_stride[1] + block.i0 * a.dbias_stride[2] +
             block.j0 * a.dbias_stride[3];
    }
  };

  template <bool kRuled>
  void elements(Elements& at) const {
    int64_t r = 0;
    for (; r + 2 <= at.block.keys; r += 2) element_rows<kRuled, 2>(at, r);
    if (r < at.block.keys) element_rows<kRuled, 1>(at, r);
  }

  // Rows r .. r + R - 1: scores become drop(P^T), dP^T becomes scale * dS^T. The exponents are at
  // most rounding above 0. !kRuled: nothing is hidden, dropped, capped or wanted for dbias.
  template <bool kRuled, int R>
  void element_rows(Elements& at, int64_t r) const {
    constexpr int kVecs = AttentionTile<C>::kVecs, kL = V::kLanes;
    const V hidden = V::set1(static_cast<C>(-HUGE_VAL)), scale = V::set1(static_cast<C>(s_.scale));
    C *score = at.score + r * plan_.lane_ld, *grad = at.grad + r * plan_.lane_ld;
    V p[R * kVecs];
    typename V::Mask visible[R * kVecs];
    const auto offset = [&](int i) { return i / kVecs * plan_.lane_ld + i % kVecs * kL; };
    for (int i = 0; i < R * kVecs; ++i) {
      const V s = V::load(score + offset(i));
      if (kRuled) visible[i] = ~V::eq(s, hidden);
      p[i] = s - V::load(lse_ + at.lane + i % kVecs * kL);
    }
    exp_nonpositive(p);
    for (int i = 0; i < R * kVecs; ++i) {
      V dp = V::load(grad + offset(i)), weight = p[i];
      const V delta = V::load(delta_ + at.lane + i % kVecs * kL);
      if (kRuled) {
        weight = p[i] = V::keep(visible[i], p[i]);
        if (s_.drop_threshold) {
          const V kept = V::set1(kept_scale<C>(s_));
          const auto keeps = V::Mask::from_bits(keep_[r + i / kVecs] >> (i % kVecs * kL));
          dp = V::keep(keeps, dp * kept);
          weight = V::keep(keeps, weight * kept);
        }
      }
      weight.store(score + offset(i));
      V ds = p[i] * (dp - delta);
      if (kRuled) {
        ds = V::keep(visible[i], ds);
        if (at.dbias) add_bias_gradient(at, ds, r + i / kVecs, i % kVecs);
        if (s_.softcap > 0.0) {
          const V t = V::load(capped_ + r * plan_.lane_ld + offset(i));
          ds = V::keep(visible[i], ds * V::fnma(t, t, V::set1(C(1))));
        }
      }
      (ds * scale).store(grad + offset(i));
    }
  }

  // dbias is one number for this head: its gradient is summed over the panel first.
  bool bias_is_one() const { return a_.dbias_stride[2] == 0 && a_.dbias_stride[3] == 0; }

  // Idle lanes are no query's: where a key holds NaN they do too, seen by a query or not.
  void add_bias_gradient(Elements& at, V ds, int64_t r, int v) const {
    const int64_t* stride = a_.dbias_stride;
    const int64_t first = v * V::kLanes, n = min_of<int64_t>(V::kLanes, at.block.lanes - first);
    if (n <= 0) return;
    if (n < V::kLanes) ds = V::keep(V::Mask::first(static_cast<int>(n)), ds);
    if (bias_is_one()) {
      at.bias_sum = at.bias_sum + ds;
      return;
    }
    C* out = at.dbias_at(a_, b_, h_) + first * stride[2] + r * stride[3];
    if (stride[2] == 0) {
      *out += ds.sum();
      return;
    }
    alignas(64) C t[V::kLanes];
    ds.store(t);
    for (int64_t u = 0; u < n; ++u) out[u * stride[2]] += t[u];
  }

  // sums[key] += weight(key, row) * row for the rows that were taken out of Q or dO.
  void add_bad(const BadRows<C>& bad, const C* weights, const T* rows, int64_t stride, int64_t n,
               C* sums, int64_t sums_ld) const {
    for (int64_t u = 0; u < bad.count; ++u) {
      for (int64_t m = 0; m < keys_; ++m) {
        add_row(weights[m * plan_.lane_ld + bad.row[u]], rows + bad.row[u] * stride, n,
                sums + m * sums_ld);
      }
    }
  }

  // dq += weight(key, query) * key for the keys that are not finite, which are taken out of k.
  void add_bad_keys(C* k, const BwdSums<C>& sums) {
    bad_k_.remove_from(k, keys_, s_.head_dim, plan_.head_ld);
    for (int64_t n = 0; n < bad_k_.count; ++n) {
      const T* bad = head_.k + (j0_ + bad_k_.row[n]) * head_.k_stride;
      const C* weights = grad_ + bad_k_.row[n] * plan_.lane_ld;
      for (int64_t l = 0; l < queries_; ++l)
        add_row(weights[l], bad, s_.head_dim, sums.dq + l * sums.dq_ld);
    }
  }

  // c[rows][lanes] += weights b. Where the band cuts the block, each register tile of rows sums
  // over the part of the depth that it can see: depth_of(rows).
  template <AOrder kOrder, class F>
  void product(int64_t rows, int64_t lanes, int64_t depth, const C* weights, const C* b,
               int64_t ldb, C* c, int64_t ldc, const F& depth_of) const {
    const int64_t lda = plan_.lane_ld;
    if (!band_.hides_any()) {
      tile_matmul<kOrder>(rows, lanes, depth, weights, lda, b, ldb, AddTo<C>{c, ldc});
      return;
    }
    constexpr int64_t kStep = AttentionTile<C>::kRows;
    for (int64_t m = 0; m < rows; m += kStep) {
      const int64_t count = min_of(kStep, rows - m);
      const Range k = depth_of(Range{m, m + count});
      if (k.size() == 0) continue;
      const C* at = weights + (kOrder == AOrder::kRowMajor ? m * lda + k.begin : k.begin * lda + m);
      tile_matmul<kOrder>(count, lanes, k.size(), at, lda, b + k.begin * ldb, ldb,
                          AddTo<C>{c + m * ldc, ldc});
    }
  }

  const AttentionBwdArgs& a_;
  const AttentionShape& s_;
  const BwdPlan& plan_;
  const C* deltas_;
  C* next_;
  C *lse_, *delta_, *qt_, *dot_, *q_, *do_, *k_, *v_, *score_, *grad_, *bias_, *capped_;
  int64_t b_, h_, i0_, queries_, chunk_, j0_, keys_;
  AttentionHead<T> head_;
  const T* dout_;
  Band band_;
  bool mixed_, finite_;  // some of the block is hidden; all of K's chunk is finite
  BadRows<C> bad_q_, bad_do_, bad_k_;
  Panel panel_[kPanels];
  uint32_t bits_[kPanels][kBwdKeys], keep_[kBwdKeys];
};

}  // namespace LLMKERN_ISA
}  // namespace llmkern
