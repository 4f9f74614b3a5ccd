// Attention forward with an online softmax (Milakov and Gimelshein, "Online normalizer calculation
// for softmax", 2018; Dao et al., "FlashAttention", 2022), one (batch, head, query block) a task.
//
// Scores are kept transposed, S^T[keys][lanes]: queries lie in the vector lanes, so k and v are
// only ever broadcast (no packing), maxima and sums over keys are vertical, and a panel of
// Tile<C>::kLanes queries carries its own softmax state and its own causal edge.
#include "attention_common.h"
#include "attention_fwd_plan.h"
#include "parallel.h"

namespace llmkern {
namespace LLMKERN_ISA {
namespace {

template <class T>
class Forward {
  using C = Compute<T>;
  using V = Vec<C>;
  static constexpr int kL = V::kLanes, kVecs = Tile<C>::kVecs, kLanes = Tile<C>::kLanes;
  static constexpr int64_t kPanels = kFwdQueries / kLanes;
  static_assert(kFwdQueries % kLanes == 0, "a query block is whole panels");
  static_assert(kFwdKeys % kDecisionsPerCounter == 0, "a key block is whole dropout counters");

 public:
  explicit Forward(const AttentionFwdArgs& args)
      : a_(args), s_(args.shape), plan_(fwd_plan(args.shape)) {}

  void run() const {
    const int64_t blocks = (s_.q_len + kFwdQueries - 1) / kFwdQueries;
    // Later query blocks first: under a causal mask they are the long ones.
    parallel_for(s_.batch * s_.heads * blocks, [&](int64_t task, int thread) {
      const int64_t bh = task / blocks, block = blocks - 1 - task % blocks;
      query_block(bh / s_.heads, bh % s_.heads, block * kFwdQueries, scratch(thread));
    });
  }

 private:
  // A run of keys as the tile reads it: rows of compute type from key j0 on.
  struct KeyBlock {
    int64_t j0, keys;
    const C *k, *v;
    int64_t k_stride, v_stride;
    bool some_hidden;  // by the key mask
  };

  C* scratch(int thread) const {
    const uintptr_t base = (reinterpret_cast<uintptr_t>(a_.scratch) + 63) / 64 * 64;
    return reinterpret_cast<C*>(base + static_cast<uintptr_t>(plan_.thread_bytes * thread));
  }

  void query_block(int64_t b, int64_t h, int64_t i0, C* scratch) const {
    const AttentionHead<T> head = attention_head<T>(s_, a_.in, b, h);
    const int64_t queries = min_of(kFwdQueries, s_.q_len - i0);
    const int64_t panels = (queries + kLanes - 1) / kLanes;
    bool started[kPanels] = {};
    const V sink = V::set1(head.sink);
    const V sink_sum = V::set1(head.sink > static_cast<C>(-HUGE_VAL) ? C(1) : C(0));
    for (int64_t p = 0; p < panels; ++p) {
      pack_transposed(head.q + (i0 + p * kLanes) * head.q_stride, head.q_stride,
                      lanes_of(queries, p), s_.head_dim, static_cast<C>(s_.scale),
                      scratch + plan_.query + p * kLanes * s_.head_dim, kLanes);
      for (int v = 0; v < kVecs; ++v) {
        sink.store(scratch + plan_.max + p * kLanes + v * kL);
        sink_sum.store(scratch + plan_.sum + p * kLanes + v * kL);
      }
    }
    const KeyRange range = band_keys(s_, i0, i0 + queries);
    for (int64_t j0 = range.begin / 8 * 8; j0 < range.end; j0 += kFwdKeys) {
      const int64_t keys = min_of(kFwdKeys, range.end - j0);
      const Seen seen = head.key_mask ? key_mask_seen(head.key_mask + j0, keys) : Seen::kAll;
      if (seen == Seen::kNone) continue;
      const KeyBlock block = key_block(head, j0, keys, seen == Seen::kSome, scratch);
      for (int64_t p = 0; p < panels; ++p) {
        const PanelBlock at{i0 + p * kLanes, j0, lanes_of(queries, p), keys};
        panel_step(head, block, at, p, scratch, &started[p]);
      }
    }
    for (int64_t p = 0; p < panels; ++p) {
      finish(b, h, i0 + p * kLanes, lanes_of(queries, p), p, started[p], scratch);
    }
  }

  static int lanes_of(int64_t queries, int64_t p) {
    return static_cast<int>(min_of<int64_t>(kLanes, queries - p * kLanes));
  }

  // Rows straight from the tensors where they have the compute type; a copy where they have not,
  // and where a hidden key's NaN would otherwise be multiplied by 0.
  KeyBlock key_block(const AttentionHead<T>& head, int64_t j0, int64_t keys, bool some_hidden,
                     C* scratch) const {
    KeyBlock block{j0, keys, nullptr, nullptr, head.k_stride, head.v_stride, some_hidden};
    const T* k = head.k + j0 * head.k_stride;
    const T* v = head.v + j0 * head.v_stride;
    if (!some_hidden) {
      block.k = as_compute(k);
      block.v = as_compute(v);
    }
    const uint8_t* mask = some_hidden ? head.key_mask + j0 : nullptr;
    if (!block.k) {
      copy_rows(k, head.k_stride, keys, s_.head_dim, mask, scratch + plan_.keys, s_.head_dim);
      copy_rows(v, head.v_stride, keys, s_.value_dim, mask, scratch + plan_.values, s_.value_dim);
      block.k = scratch + plan_.keys;
      block.v = scratch + plan_.values;
      block.k_stride = s_.head_dim;
      block.v_stride = s_.value_dim;
    }
    return block;
  }

  static const C* as_compute(const C* rows) { return rows; }
  template <class Other>
  static const C* as_compute(const Other*) {
    return nullptr;
  }

  // One panel against one key block: scores, online softmax, values.
  void panel_step(AttentionHead<T> head, const KeyBlock& block, PanelBlock at, int64_t p,
                  C* scratch, bool* started) const {
    const KeyRange band = band_keys(s_, at.i0, at.i0 + at.lanes);
    at.j0 = max_of(block.j0, band.begin / 8 * 8);
    at.keys = min_of(block.j0 + block.keys, band.end) - at.j0;
    if (at.keys <= 0) return;
    const int64_t skip = at.j0 - block.j0;

    uint32_t bits[kFwdKeys], keep[kFwdKeys];
    Seen seen = Seen::kAll;
    const bool inside = at.j0 >= band.all_begin && at.j0 + at.keys <= band.all_end;
    if (!block.some_hidden) head.key_mask = nullptr;
    if (!inside || head.mask || head.key_mask) {
      seen = visible_bits(s_, head, at, true, bits);
      if (seen == Seen::kNone) return;
    }
    Seen bias_seen = Seen::kAll;
    if (head.bias) {
      bias_seen = load_bias(head, at, scratch + plan_.bias);
      if (bias_seen == Seen::kNone) return;
    }
    if (s_.drop_threshold) keep_bits<C>(s_, head.bh, at, keep);

    C* scores = scratch + plan_.scores;
    panel<AOrder::kRowMajor, kVecs, false>(
        at.keys, s_.head_dim, block.k + skip * block.k_stride, block.k_stride,
        scratch + plan_.query + p * kLanes * s_.head_dim, kLanes, 0, StoreTo<C>{scores, kLanes});
    const ScoreRules<C> rules{static_cast<C>(s_.softcap), head.slope, s_.shift,
                              head.bias ? scratch + plan_.bias : nullptr,
                              seen == Seen::kSome ? bits : nullptr};
    alignas(64) C rescale[kLanes];
    softmax(rules, at, s_.drop_threshold ? keep : nullptr, scores, scratch + plan_.max + p * kLanes,
            scratch + plan_.sum + p * kLanes, rescale);

    const bool hides = seen == Seen::kSome || bias_seen == Seen::kSome;
    add_values(block.v + skip * block.v_stride, block.v_stride, at.keys, hides, scores, rescale,
               scratch + plan_.out + p * kLanes * s_.value_dim, *started);
    *started = true;
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
    for (int64_t r = 0; r < at.keys; ++r) {
      for (int v = 0; v < kVecs; ++v) {
        C* x = scores + r * kLanes + v * kL;
        V prob = exp_nonpositive(V::load(x) - base[v]);
        total[v] = total[v] + prob;
        if (keep) prob = V::keep(V::Mask::from_bits(keep[r] >> (v * kL)), prob);
        prob.store(x);
      }
    }
    for (int v = 0; v < kVecs; ++v) total[v].store(sum + v * kL);
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

  // out / sum and log-sum-exp of one panel, written to the tensors.
  void finish(int64_t b, int64_t h, int64_t i0, int lanes, int64_t p, bool started,
              C* scratch) const {
    const C* max = scratch + plan_.max + p * kLanes;
    const C* sum = scratch + plan_.sum + p * kLanes;
    C* lse = static_cast<C*>(a_.lse) + (b * s_.heads + h) * s_.q_len + i0;
    const C kept = kept_scale<C>(s_);
    alignas(64) C factor[kLanes];
    for (int l = 0; l < kLanes; ++l) {
      const bool empty = sum[l] == C(0) || !started;
      factor[l] = empty ? C(0) : kept / sum[l];
      if (l < lanes)
        lse[l] = sum[l] == C(0) ? static_cast<C>(-HUGE_VAL) : max[l] + std::log(sum[l]);
    }
    T* out = static_cast<T*>(a_.out) + b * a_.out_stride[0] + h * a_.out_stride[1] +
             i0 * a_.out_stride[2];
    unpack_transposed(scratch + plan_.out + p * kLanes * s_.value_dim, kLanes, factor, lanes,
                      s_.value_dim, out, a_.out_stride[2]);
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
