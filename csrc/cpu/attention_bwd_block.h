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
    const T* q = head_.q + i0 * head_.q_stride;
    for (int64_t l = 0; l < size; l += kPanel) {
      const int live = static_cast<int>(min_of<int64_t>(kPanel, size - l));
      pack_transposed(q + l * head_.q_stride, head_.q_stride, live, s_.head_dim,
                      static_cast<C>(s_.scale), qt_ + l, plan_.lane_ld);
      pack_transposed(dout_ + l * a_.dout_stride[2], a_.dout_stride[2], live, s_.value_dim, C(1),
                      dot_ + l, plan_.lane_ld);
    }
    copy_rows<C>(q, head_.q_stride, size, s_.head_dim, nullptr, q_, plan_.head_ld);
    copy_rows<C>(dout_, a_.dout_stride[2], size, s_.value_dim, nullptr, do_, plan_.value_ld);
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
  static constexpr int64_t kPanel = Tile<C>::kLanes, kPanels = kBwdQueries / kPanel;
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
    panel.seen = visible_bits(s_, head_, panel.block, true, bits_[x]);
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
    if (rules.none() && !dbias && !s_.drop_threshold) {
      plain_gradients(keys, l, score, grad);
    } else {
      ruled_gradients(rules, panel.block, l, score, grad, dbias);
    }
  }

  // P^T over S^T and scale * dS^T over dP^T, where nothing is hidden, dropped or biased.
  void plain_gradients(int64_t keys, int64_t l, C* score, C* grad) const {
    const V scale = V::set1(static_cast<C>(s_.scale));
    for (int64_t r = 0; r < keys; ++r) {
      for (int64_t v = 0; v < kPanel; v += V::kLanes) {
        C *at = score + r * plan_.lane_ld + v, *grad_at = grad + r * plan_.lane_ld + v;
        const V p = exp(V::load(at) - V::load(lse_ + l + v));
        p.store(at);
        (p * scale * (V::load(grad_at) - V::load(delta_ + l + v))).store(grad_at);
      }
    }
  }

  void ruled_gradients(const ScoreRules<C>& rules, const PanelBlock& block, int64_t l, C* score,
                       C* grad, C* dbias) {
    const int64_t ld = plan_.lane_ld;
    const V hidden = V::set1(static_cast<C>(-HUGE_VAL)), one = V::set1(C(1));
    const V scale = V::set1(static_cast<C>(s_.scale)), kept = V::set1(kept_scale<C>(s_));
    uint32_t keep[kBwdKeys];
    if (s_.drop_threshold) keep_bits<C>(s_, head_.bh, block, keep);
    const auto finish = [&](int64_t r, int v, V s) {
      const int64_t lane = l + v * V::kLanes;
      C *at = score + r * ld + v * V::kLanes, *grad_at = grad + r * ld + v * V::kLanes;
      const typename V::Mask visible = ~V::eq(s, hidden);
      const V p = V::keep(visible, exp(s - V::load(lse_ + lane)));
      V dp = V::load(grad_at), dropped = p;
      if (s_.drop_threshold) {
        const typename V::Mask keeps = V::Mask::from_bits(keep[r] >> (v * V::kLanes));
        dp = V::keep(keeps, dp * kept);
        dropped = V::keep(keeps, p * kept);
      }
      dropped.store(at);
      V ds = p * (dp - V::load(delta_ + lane));
      if (dbias) add_bias_gradient(V::keep(visible, ds), block, r, v, dbias);
      if (rules.softcap != C(0)) {
        const V t = V::load(capped_ + r * ld + v * V::kLanes);
        ds = ds * V::fnma(t, t, one);
      }
      V::keep(visible, ds * scale).store(grad_at);
    };
    apply_rules(rules, block, score, ld, rules.softcap != C(0) ? capped_ : nullptr, finish);
  }

  // Idle lanes hold 0.
  void add_bias_gradient(V ds, const PanelBlock& block, int64_t r, int v, C* dbias) const {
    const int64_t* stride = a_.dbias_stride;
    const int64_t first = v * V::kLanes, n = min_of<int64_t>(V::kLanes, block.lanes - first);
    C* out = dbias + b_ * stride[0] + h_ * stride[1] + (block.i0 + first) * stride[2] +
             (block.j0 + r) * stride[3];
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
    constexpr int64_t kStep = Tile<C>::kRows;
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
  uint32_t bits_[kPanels][kBwdKeys];
};

}  // namespace LLMKERN_ISA
}  // namespace llmkern
