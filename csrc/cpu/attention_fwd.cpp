// Attention forward with an online softmax (Milakov and Gimelshein, "Online normalizer calculation
// for softmax", 2018; Dao et al., "FlashAttention", 2022).
//
// Scores are kept transposed, S^T[keys][lanes]: queries lie in the vector lanes, so k and v are
// only ever broadcast (no packing), maxima and sums over keys are vertical, and a panel of
// AttentionTile<C>::kLanes queries carries its own softmax state and its own causal edge. A task is
// a few panels of the query heads that share a kv head, so they share its blocks in the cache too.
// Blocks begin at multiples of kFwdKeys whatever the task: how panels are dealt out changes no bit.
#include "attention_common.h"
#include "attention_few.h"
#include "attention_fwd_plan.h"
#include "parallel.h"

namespace llmkern {
namespace LLMKERN_ISA {
namespace {

template <class T>
class Forward {
  using C = Compute<T>;
  using V = Vec<C>;
  static constexpr int kL = V::kLanes, kVecs = AttentionTile<C>::kVecs,
                       kLanes = AttentionTile<C>::kLanes;
  static constexpr int64_t kPanels = kFwdQueries / kLanes;
  static_assert(kFwdQueries % kLanes == 0, "a task is whole panels");
  static_assert(kFwdKeys % kDecisionsPerCounter == 0, "a key block is whole dropout counters");

 public:
  explicit Forward(const AttentionFwdArgs& args)
      : a_(args), s_(args.shape), plan_(fwd_plan(args.shape)) {}

  void run() const {
    if (s_.batch == 0 || s_.heads == 0) return;
    const int64_t pairs = s_.batch * s_.kv_heads, group = s_.heads / s_.kv_heads;
    const int64_t head_panels = (s_.q_len + kLanes - 1) / kLanes, panels = group * head_panels;
    // Four tasks a thread balance the load; beyond that, panels that share keys belong together.
    const int64_t fair = pairs * panels / (4 * max_threads());
    const int64_t span = max_of<int64_t>(1, min_of(kPanels, fair));
    const int64_t tasks = (panels + span - 1) / span;
    // Later queries first: under a causal mask they have more to do.
    parallel_for(pairs * tasks, [&](int64_t task, int thread) {
      const int64_t pair = task / tasks, first = (tasks - 1 - task % tasks) * span;
      Panel panel[kPanels];
      const int count = static_cast<int>(min_of(span, panels - first));
      for (int p = 0; p < count; ++p) {
        const int64_t at = first + p;
        const int64_t h = pair % s_.kv_heads * group + at / head_panels;
        open(&panel[p], pair / s_.kv_heads, h, at % head_panels * kLanes, scratch(thread), p);
      }
      attend(panel, count, scratch(thread));
      for (int p = 0; p < count; ++p) close(panel[p]);
    });
  }

 private:
  // Up to kLanes queries of one head, and their softmax so far. Wide: query and out are
  // [dim][kLanes]; few: [lanes][dim].
  struct Panel {
    AttentionHead<T> head;
    int64_t b, h, i0;
    int lanes;
    bool few, started;
    KeyRange band;
    C *query, *out, *max, *sum;
  };

  // Rows j0 .. j0 + keys of k and v: where they lie, and in the compute type for wide panels.
  struct KeyBlock {
    int64_t j0, keys;
    bool some_hidden;  // by the key mask
    const C *k, *v;
    int64_t k_stride, v_stride;
  };

  C* scratch(int thread) const {
    const uintptr_t base = (reinterpret_cast<uintptr_t>(a_.scratch) + 63) / 64 * 64;
    return reinterpret_cast<C*>(base + static_cast<uintptr_t>(plan_.thread_bytes * thread));
  }

  void open(Panel* p, int64_t b, int64_t h, int64_t i0, C* scratch, int slot) const {
    p->head = attention_head<T>(s_, a_.in, b, h);
    p->b = b;
    p->h = h;
    p->i0 = i0;
    p->lanes = static_cast<int>(min_of<int64_t>(kLanes, s_.q_len - i0));
    p->few = p->lanes <= kFewQueries;
    p->started = false;
    p->band = band_keys(s_, i0, i0 + p->lanes);
    p->query = scratch + plan_.query + slot * kLanes * s_.head_dim;
    p->out = scratch + plan_.out + slot * kLanes * s_.value_dim;
    p->max = scratch + plan_.max + slot * kLanes;
    p->sum = scratch + plan_.sum + slot * kLanes;
    const T* q = p->head.q + i0 * p->head.q_stride;
    const C scale = static_cast<C>(s_.scale);
    if (p->few) {
      copy_rows(q, p->head.q_stride, p->lanes, s_.head_dim, nullptr, p->query, s_.head_dim);
      for (int64_t e = 0; e < p->lanes * s_.head_dim; ++e) p->query[e] *= scale;
    } else {
      pack_transposed(q, p->head.q_stride, p->lanes, s_.head_dim, scale, p->query, kLanes);
    }
    // A sink is a key with this score and value 0.
    const bool sink = p->head.sink > static_cast<C>(-HUGE_VAL);
    for (int l = 0; l < kLanes; ++l) {
      p->max[l] = p->head.sink;
      p->sum[l] = sink ? C(1) : C(0);
    }
  }

  void attend(Panel* panel, int count, C* scratch) const {
    int64_t begin = s_.kv_len, end = 0;
    for (int p = 0; p < count; ++p) {
      begin = min_of(begin, panel[p].band.begin);
      end = max_of(end, panel[p].band.end);
    }
    const AttentionHead<T>& head = panel[0].head;
    for (int64_t j0 = begin / kFwdKeys * kFwdKeys; j0 < end; j0 += kFwdKeys) {
      const int64_t keys = min_of(kFwdKeys, s_.kv_len - j0);
      bool wanted = false, wide = false;
      for (int p = 0; p < count; ++p) {
        const bool meets = panel[p].band.begin < j0 + keys && panel[p].band.end > j0;
        wanted |= meets;
        wide |= meets && !panel[p].few;
      }
      if (!wanted) continue;
      const Seen seen = head.key_mask ? key_mask_seen(head.key_mask + j0, keys) : Seen::kAll;
      if (seen == Seen::kNone) continue;
      KeyBlock block{j0, keys, seen == Seen::kSome, nullptr, nullptr, 0, 0};
      if (wide) load_keys(head, &block, scratch);
      for (int p = 0; p < count; ++p) step(&panel[p], block, scratch);
    }
  }

  // Rows straight from the tensors where they have the compute type; a copy where they have not,
  // and where a hidden key's NaN would otherwise be multiplied by 0.
  void load_keys(const AttentionHead<T>& head, KeyBlock* block, C* scratch) const {
    const T* k = head.k + block->j0 * head.k_stride;
    const T* v = head.v + block->j0 * head.v_stride;
    if constexpr (sizeof(T) == sizeof(C)) {
      if (!block->some_hidden) {
        block->k = k;
        block->v = v;
        block->k_stride = head.k_stride;
        block->v_stride = head.v_stride;
        return;
      }
    }
    const uint8_t* mask = block->some_hidden ? head.key_mask + block->j0 : nullptr;
    C *k_copy = scratch + plan_.keys, *v_copy = scratch + plan_.values;
    copy_rows(k, head.k_stride, block->keys, s_.head_dim, mask, k_copy, s_.head_dim);
    copy_rows(v, head.v_stride, block->keys, s_.value_dim, mask, v_copy, s_.value_dim);
    block->k = k_copy;
    block->v = v_copy;
    block->k_stride = s_.head_dim;
    block->v_stride = s_.value_dim;
  }

  // One panel against one key block: scores, online softmax, values.
  void step(Panel* p, const KeyBlock& block, C* scratch) const {
    PanelBlock at{p->i0, max_of(block.j0, p->band.begin / 8 * 8), p->lanes, 0};
    at.keys = min_of(block.j0 + block.keys, p->band.end) - at.j0;
    if (at.keys <= 0) return;

    uint32_t bits[kFwdKeys], keep[kFwdKeys];
    Seen seen = Seen::kAll;
    AttentionHead<T> head = p->head;
    if (!block.some_hidden) head.key_mask = nullptr;
    const bool inside = at.j0 >= p->band.all_begin && at.j0 + at.keys <= p->band.all_end;
    if (!inside || head.mask || head.key_mask) {
      seen = visible_bits(s_, head, at, true, bits);
      if (seen == Seen::kNone) return;
    }
    C* bias = scratch + plan_.bias;
    const Seen bias_seen = head.bias ? load_bias(head, at, bias) : Seen::kAll;
    if (bias_seen == Seen::kNone) return;
    if (s_.drop_threshold) keep_bits<C>(s_, head.bh, at, keep);

    C* scores = scratch + plan_.scores;
    const int64_t skip = at.j0 - block.j0;
    if (p->few) {
      few_scores(head.k + at.j0 * head.k_stride, head.k_stride, at.keys, p->query, p->lanes,
                 s_.head_dim, scores);
    } else {
      panel<AOrder::kRowMajor, kVecs, false>(at.keys, s_.head_dim, block.k + skip * block.k_stride,
                                             block.k_stride, p->query, kLanes, 0,
                                             StoreTo<C>{scores, kLanes});
    }
    const ScoreRules<C> rules{static_cast<C>(s_.softcap), head.slope, s_.shift,
                              head.bias ? bias : nullptr, seen == Seen::kSome ? bits : nullptr};
    alignas(64) C rescale[kLanes];
    softmax(rules, at, s_.drop_threshold ? keep : nullptr, scores, p->max, p->sum, rescale);
    if (p->few) {
      few_values(head.v + at.j0 * head.v_stride, head.v_stride, at.keys, scores, p->lanes,
                 s_.value_dim, rescale, p->out, p->started);
    } else {
      const bool hides = seen == Seen::kSome || bias_seen == Seen::kSome;
      add_values(block.v + skip * block.v_stride, block.v_stride, at.keys, hides, scores, rescale,
                 p->out, p->started);
    }
    p->started = true;
  }

  // Turns scores into unnormalised probabilities in place and brings max and sum up to date;
  // rescale: what the output so far must be multiplied by.
  void softmax(const ScoreRules<C>& rules, const PanelBlock& at, const uint32_t* keep, C* scores,
               C* max, C* sum, C* rescale) const {
    V most[kVecs], base[kVecs], total[kVecs];
    for (int v = 0; v < kVecs; ++v) most[v] = V::load(max + v * kL);
    // A NaN score leaves the maximum alone and makes its row NaN through the exponential.
    if (rules.none()) {
      for (int64_t r = 0; r < at.keys; ++r) {
        for (int v = 0; v < kVecs; ++v) {
          most[v] = V::max(V::load(scores + r * kLanes + v * kL), most[v]);
        }
      }
    } else {
      apply_rules<C>(rules, at, scores, kLanes, nullptr,
                     [&](int64_t, int v, V x) { most[v] = V::max(x, most[v]); });
    }
    // Where nothing is visible yet the maximum is -inf; a finite base keeps -inf - base from NaN.
    const V lowest =
        V::set1(static_cast<C>(sizeof(C) == 8 ? -1.7976931348623157e308 : -3.4028234e38));
    for (int v = 0; v < kVecs; ++v) {
      base[v] = V::max(most[v], lowest);
      const V old = exp_nonpositive(V::load(max + v * kL) - base[v]);
      old.store(rescale + v * kL);
      total[v] = V::load(sum + v * kL) * old;
      most[v].store(max + v * kL);
    }
    int64_t r = 0;
    for (; r + 2 <= at.keys; r += 2) exponentials<2>(scores, r, base, total, keep);
    if (r < at.keys) exponentials<1>(scores, r, base, total, keep);
    for (int v = 0; v < kVecs; ++v) total[v].store(sum + v * kL);
  }

  // Rows r .. r + R - 1: scores become exp(score - base), are summed, and then dropped out.
  template <int R>
  static inline void exponentials(C* scores, int64_t r, const V (&base)[kVecs], V (&total)[kVecs],
                                  const uint32_t* keep) {
    C* at = scores + r * kLanes;
    V x[R * kVecs];
    for (int i = 0; i < R * kVecs; ++i) x[i] = V::load(at + i * kL) - base[i % kVecs];
    exp_nonpositive(x);
    for (int i = 0; i < R * kVecs; ++i) {
      total[i % kVecs] = total[i % kVecs] + x[i];
      if (keep) x[i] = V::keep(V::Mask::from_bits(keep[r + i / kVecs] >> (i % kVecs * kL)), x[i]);
      x[i].store(at + i * kL);
    }
  }

  // out[Dv][lanes] = out * rescale + v^T P^T.
  void add_values(const C* v, int64_t stride, int64_t keys, bool hides, const C* probs,
                  const C* rescale, C* out, bool started) const {
    if (hides && !rows_finite(v, stride, keys, s_.value_dim)) {
      add_values_apart(v, stride, keys, probs, rescale, out, started);
    } else if (started) {
      panel<AOrder::kColMajor, kVecs, false>(s_.value_dim, keys, v, stride, probs, kLanes, 0,
                                             RescaleAddTo<C>{out, kLanes, rescale});
    } else {
      panel<AOrder::kColMajor, kVecs, false>(s_.value_dim, keys, v, stride, probs, kLanes, 0,
                                             StoreTo<C>{out, kLanes});
    }
  }

  // The same for values with NaN or Inf in them: 0 * NaN is NaN, so a query multiplies only what it
  // sees.
  void add_values_apart(const C* v, int64_t stride, int64_t keys, const C* probs, const C* rescale,
                        C* out, bool started) const {
    for (int64_t d = 0; d < s_.value_dim; ++d) {
      for (int u = 0; u < kVecs; ++u) {
        C* at = out + d * kLanes + u * kL;
        V sum = started ? V::load(at) * V::load(rescale + u * kL) : V::zero();
        for (int64_t r = 0; r < keys; ++r) {
          const V prob = V::load(probs + r * kLanes + u * kL);
          const V with = V::fma(prob, V::broadcast(v + r * stride + d), sum);
          sum = V::select(V::eq(prob, V::zero()), sum, with);
        }
        sum.store(at);
      }
    }
  }

  // out / sum and log-sum-exp, written to the tensors.
  void close(const Panel& p) const {
    C* lse = static_cast<C*>(a_.lse) + (p.b * s_.heads + p.h) * s_.q_len + p.i0;
    const C kept = kept_scale<C>(s_);
    alignas(64) C factor[kLanes];
    for (int l = 0; l < kLanes; ++l) {
      const bool empty = p.sum[l] == C(0);
      factor[l] = empty || !p.started ? C(0) : kept / p.sum[l];
      if (l < p.lanes) {
        lse[l] = empty ? static_cast<C>(-HUGE_VAL) : p.max[l] + std::log(p.sum[l]);
      }
    }
    T* out = static_cast<T*>(a_.out) + p.b * a_.out_stride[0] + p.h * a_.out_stride[1] +
             p.i0 * a_.out_stride[2];
    if (p.few) {
      scale_rows(p.out, s_.value_dim, factor, p.lanes, s_.value_dim, out, a_.out_stride[2]);
    } else {
      unpack_transposed(p.out, kLanes, factor, p.lanes, s_.value_dim, out, a_.out_stride[2]);
    }
  }

  const AttentionFwdArgs& a_;
  const AttentionShape& s_;
  const FwdPlan plan_;
};

}  // namespace

void attention_fwd(const AttentionFwdArgs& a) {
  switch (a.shape.dtype) {
    case DType::kFloat32:
      return Forward<float>(a).run();
    case DType::kBFloat16:
      return Forward<BFloat16>(a).run();
    case DType::kFloat16:
      return Forward<Float16>(a).run();
    case DType::kFloat64:
      return Forward<double>(a).run();
  }
}

}  // namespace LLMKERN_ISA
}  // namespace llmkern
