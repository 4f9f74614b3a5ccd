// Backward attention. Work items are (batch, kv head, part of its query blocks, chunk of its keys);
// attention_bwd_plan.h says how many of each. Inside an item every query block meets every key
// block that it sees once, five products each (attention_bwd_block.h): dQ of the query block stays
// in L2 until it is finished, dK and dV are summed over all query blocks and query heads of the kv
// head.
#include <cmath>

#include "attention_bwd_block.h"
#include "parallel.h"

namespace llmkern {
namespace LLMKERN_ISA {
namespace {

template <class T>
class Backward {
 public:
  using C = Compute<T>;
  using V = Vec<C>;

  explicit Backward(const AttentionBwdArgs& args)
      : a_(args), s_(args.shape), plan_(bwd_plan(s_, max_threads())) {
    char* p = static_cast<char*>(a_.scratch);
    delta_ = reinterpret_cast<C*>(p);
    slots_ = p + plan_.delta_bytes;
    key_sums_ = slots_ + max_threads() * plan_.slot_bytes;
    query_sums_ = reinterpret_cast<C*>(key_sums_ + plan_.key_sums * plan_.keys_bytes);
  }

  void run() const {
    deltas();
    if (a_.dsinks) sink_gradients();
    const bool alone = a_.dbias && items_own_bias();
    if (a_.dq || a_.dk || a_.dv || alone) {
      const int64_t items = s_.batch * s_.kv_heads * plan_.parts * plan_.chunks;
      parallel_for(items, [&](int64_t t, int thread) { item(t, thread, alone); });
      if (plan_.parts > 1) add_key_sums();
      if (plan_.chunks > 1 && a_.dq) add_query_sums();
    }
    if (a_.dbias && !alone) bias_gradients();
  }

 private:
  // delta_i = <dO_i, O_i> - dlse_i; 0 for a row that saw no key.
  void deltas() const {
    const C* lse = static_cast<const C*>(a_.lse);
    const C* dlse = static_cast<const C*>(a_.dlse);
    const int64_t rows = s_.batch * s_.heads * s_.q_len;
    const int64_t grain = 1 + 16384 / (s_.value_dim + 1);
    parallel_ranges(rows, grain, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        const int64_t i = r % s_.q_len, h = r / s_.q_len % s_.heads, b = r / s_.q_len / s_.heads;
        const T* out = static_cast<const T*>(a_.out) + b * a_.out_stride[0] + h * a_.out_stride[1] +
                       i * a_.out_stride[2];
        const T* dout = static_cast<const T*>(a_.dout) + b * a_.dout_stride[0] +
                        h * a_.dout_stride[1] + i * a_.dout_stride[2];
        const C sum = dot(out, dout) - (dlse ? dlse[r] : C(0));
        delta_[r] = lse[r] == -static_cast<C>(HUGE_VAL) ? C(0) : sum;
      }
    });
  }

  C dot(const T* x, const T* y) const {
    V sum[2] = {V::zero(), V::zero()};
    int64_t d = 0;
    for (; d + 2 * V::kLanes <= s_.value_dim; d += 2 * V::kLanes) {
      sum[0] = V::fma(V::load(x + d), V::load(y + d), sum[0]);
      sum[1] = V::fma(V::load(x + d + V::kLanes), V::load(y + d + V::kLanes), sum[1]);
    }
    for (; d < s_.value_dim; d += V::kLanes) {
      const int n = static_cast<int>(min_of<int64_t>(V::kLanes, s_.value_dim - d));
      sum[0] = V::fma(V::load_n(x + d, n), V::load_n(y + d, n), sum[0]);
    }
    return (sum[0] + sum[1]).sum();
  }

  // A sink has the probability exp(sink - lse) and no value: dsink = sum_i p_i (0 - delta_i).
  void sink_gradients() const {
    const C* lse = static_cast<const C*>(a_.lse);
    parallel_for(s_.heads, [&](int64_t h, int) {
      double sum = 0.0;
      const double sink = a_.in.sinks[h];
      for (int64_t b = 0; b < s_.batch && sink != -HUGE_VAL; ++b) {
        const int64_t base = (b * s_.heads + h) * s_.q_len;
        for (int64_t i = base; i < base + s_.q_len; ++i)
          sum -= std::exp(sink - static_cast<double>(lse[i])) * static_cast<double>(delta_[i]);
      }
      a_.dsinks[h] = static_cast<float>(sum);
    });
  }

  // Whether no two items add to the same element of dbias.
  bool items_own_bias() const {
    const int64_t* stride = a_.dbias_stride;
    const bool one_item_a_row = plan_.parts == 1 && s_.kv_heads == 1;
    return (stride[0] != 0 || s_.batch == 1) &&
           (stride[1] != 0 || s_.heads == 1 || one_item_a_row) &&
           (stride[2] != 0 || plan_.parts == 1) && (stride[3] != 0 || plan_.chunks == 1);
  }

  BwdBlock<T> block(int thread) const {
    return BwdBlock<T>(a_, plan_, delta_, slots_ + thread * plan_.slot_bytes);
  }

  // The rows of dk and dv that an item adds to.
  BwdSums<C> key_sums(int64_t b, int64_t g, int64_t sum) const {
    BwdSums<C> sums{nullptr, nullptr, nullptr, plan_.head_ld, s_.head_dim, s_.value_dim};
    if (plan_.sum_keys) {
      C* base = reinterpret_cast<C*>(key_sums_ + sum * plan_.keys_bytes);
      if (a_.dk) sums.dk = base;
      if (a_.dv) sums.dv = base + s_.kv_len * s_.head_dim;
      return sums;
    }
    if (a_.dk) sums.dk = static_cast<C*>(a_.dk) + b * a_.dk_stride[0] + g * a_.dk_stride[1];
    if (a_.dv) sums.dv = static_cast<C*>(a_.dv) + b * a_.dv_stride[0] + g * a_.dv_stride[1];
    sums.dk_ld = a_.dk_stride[2];
    sums.dv_ld = a_.dv_stride[2];
    return sums;
  }

  void item(int64_t t, int thread, bool with_bias) const {
    const int64_t chunk = t % plan_.chunks, part = t / plan_.chunks % plan_.parts;
    const int64_t pair = t / plan_.chunks / plan_.parts;
    const int64_t b = pair / s_.kv_heads, g = pair % s_.kv_heads, group = s_.heads / s_.kv_heads;
    const Range keys =
        intersect({chunk * plan_.chunk_keys, (chunk + 1) * plan_.chunk_keys}, {0, s_.kv_len});
    const BwdSums<C> sums = key_sums(b, g, plan_.parts > 1 ? pair * plan_.parts + part : thread);
    if (sums.dk)
      clear_rows(sums.dk + keys.begin * sums.dk_ld, keys.size(), s_.head_dim, sums.dk_ld);
    if (sums.dv)
      clear_rows(sums.dv + keys.begin * sums.dv_ld, keys.size(), s_.value_dim, sums.dv_ld);
    const Range unmasked = intersect(keys, unmasked_keys(b));
    BwdBlock<T> blocks = block(thread);
    for (int64_t u = part; u < group * plan_.q_blocks; u += plan_.parts) {
      const int64_t h = g * group + u / plan_.q_blocks, i0 = u % plan_.q_blocks * kBwdQueries;
      const int64_t size = min_of(kBwdQueries, s_.q_len - i0);
      blocks.load_queries(b, h, i0, size);
      for_key_blocks(intersect(unmasked, blocks.band_of(i0, size)), [&](int64_t j0, int64_t n) {
        if (!blocks.gradients(j0, n, with_bias ? static_cast<C*>(a_.dbias) : nullptr)) return;
        BwdSums<C> at = sums;
        at.dq = a_.dq ? blocks.dq() : nullptr;
        if (at.dk) at.dk += j0 * at.dk_ld;
        if (at.dv) at.dv += j0 * at.dv_ld;
        blocks.accumulate(at);
      });
      if (a_.dq) finish_queries(blocks.dq(), b, h, i0, size, chunk);
    }
    if (plan_.sum_keys && plan_.parts == 1) {
      store_keys(reinterpret_cast<const C*>(key_sums_ + thread * plan_.keys_bytes), 1, b, g, keys);
    }
  }

  // From the first to the last key that the key mask of batch b shows.
  Range unmasked_keys(int64_t b) const {
    Range keys{0, s_.kv_len};
    if (!a_.in.key_mask) return keys;
    const uint8_t* mask = a_.in.key_mask + b * s_.kv_len;
    while (keys.size() && !mask[keys.begin]) ++keys.begin;
    while (keys.size() && !mask[keys.end - 1]) --keys.end;
    return keys;
  }

  // f(j0, size) over blocks of about equal size. j0 is a multiple of 8, for dropout's counters.
  template <class F>
  static void for_key_blocks(Range keys, const F& f) {
    if (keys.size() == 0) return;
    keys.begin = keys.begin / 8 * 8;
    const int64_t blocks = bwd_ceil_div(keys.size(), kBwdKeys);
    const int64_t step = bwd_ceil_div(bwd_ceil_div(keys.size(), blocks), 8) * 8;
    for (int64_t j0 = keys.begin; j0 < keys.end; j0 += step) f(j0, min_of(step, keys.end - j0));
  }

  void finish_queries(const C* dq, int64_t b, int64_t h, int64_t i0, int64_t size,
                      int64_t chunk) const {
    const int64_t first = (b * s_.heads + h) * s_.q_len + i0;
    const int64_t rows = s_.batch * s_.heads * s_.q_len;
    for (int64_t l = 0; l < size; ++l) {
      const C* sum = dq + l * plan_.head_ld;
      if (plan_.chunks > 1) {
        C* out = query_sums_ + (chunk * rows + first + l) * s_.head_dim;
        store_sum(sum, 0, 1, s_.head_dim, out);
      } else {
        store_sum(sum, 0, 1, s_.head_dim, dq_row(b, h, i0 + l));
      }
    }
  }

  T* dq_row(int64_t b, int64_t h, int64_t i) const {
    return static_cast<T*>(a_.dq) + b * a_.dq_stride[0] + h * a_.dq_stride[1] + i * a_.dq_stride[2];
  }

  // out[n] = the sum of `count` rows, in order, rounded once.
  template <class Out>
  static void store_sum(const C* rows, int64_t stride, int64_t count, int64_t n, Out* out) {
    for (int64_t d = 0; d < n; d += V::kLanes) {
      const int lanes = static_cast<int>(min_of<int64_t>(V::kLanes, n - d));
      V sum = V::load_n(rows + d, lanes);
      for (int64_t c = 1; c < count; ++c) sum = sum + V::load_n(rows + c * stride + d, lanes);
      if (lanes == V::kLanes) {
        sum.store(out + d);
      } else {
        sum.store_n(out + d, lanes);
      }
    }
  }

  // dk and dv of some keys from `count` sums that follow each other in scratch.
  void store_keys(const C* sums, int64_t count, int64_t b, int64_t g, Range keys) const {
    const int64_t stride = plan_.keys_bytes / static_cast<int64_t>(sizeof(C));
    for (int64_t j = keys.begin; j < keys.end; ++j) {
      if (a_.dk) {
        T* out = static_cast<T*>(a_.dk) + b * a_.dk_stride[0] + g * a_.dk_stride[1] +
                 j * a_.dk_stride[2];
        store_sum(sums + j * s_.head_dim, stride, count, s_.head_dim, out);
      }
      if (a_.dv) {
        T* out = static_cast<T*>(a_.dv) + b * a_.dv_stride[0] + g * a_.dv_stride[1] +
                 j * a_.dv_stride[2];
        store_sum(sums + s_.kv_len * s_.head_dim + j * s_.value_dim, stride, count, s_.value_dim,
                  out);
      }
    }
  }

  void add_key_sums() const {
    const int64_t blocks = bwd_ceil_div(s_.kv_len, kBwdKeys);
    parallel_for(s_.batch * s_.kv_heads * blocks, [&](int64_t t, int) {
      const int64_t pair = t / blocks, j0 = t % blocks * kBwdKeys;
      const char* sums = key_sums_ + pair * plan_.parts * plan_.keys_bytes;
      store_keys(reinterpret_cast<const C*>(sums), plan_.parts, pair / s_.kv_heads,
                 pair % s_.kv_heads, {j0, min_of(j0 + kBwdKeys, s_.kv_len)});
    });
  }

  void add_query_sums() const {
    const int64_t rows = s_.batch * s_.heads * s_.q_len;
    parallel_ranges(rows, 1 + 4096 / (s_.head_dim + 1), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        store_sum(query_sums_ + r * s_.head_dim, rows * s_.head_dim, plan_.chunks, s_.head_dim,
                  dq_row(r / s_.q_len / s_.heads, r / s_.q_len % s_.heads, r % s_.q_len));
      }
    });
  }

  // dbias where it is summed over batches, heads or queries that different items hold: one task
  // for each tile of dbias, which recomputes the blocks of scores that add to it.
  void bias_gradients() const {
    const int64_t* stride = a_.dbias_stride;
    const int64_t key_blocks = bwd_ceil_div(s_.kv_len, kBwdKeys);
    const int64_t extent[4] = {s_.batch, s_.heads, plan_.q_blocks, key_blocks};
    int64_t tiles[4], tasks = 1;
    for (int d = 0; d < 4; ++d)
      tasks *= tiles[d] = stride[d] != 0 ? extent[d] : min_of<int64_t>(1, extent[d]);
    parallel_for(tasks, [&](int64_t t, int thread) {
      Range at[4];
      for (int d = 3; d >= 0; --d) {
        const int64_t tile = t % tiles[d];
        at[d] = stride[d] != 0 ? Range{tile, tile + 1} : Range{0, extent[d]};
        t /= tiles[d];
      }
      bias_tile(at, thread);
    });
  }

  void bias_tile(const Range at[4], int thread) const {
    BwdBlock<T> blocks = block(thread);
    for (int64_t b = at[0].begin; b < at[0].end; ++b) {
      const Range unmasked =
          intersect(unmasked_keys(b), {at[3].begin * kBwdKeys, at[3].end * kBwdKeys});
      for (int64_t h = at[1].begin; h < at[1].end; ++h) {
        for (int64_t x = at[2].begin; x < at[2].end; ++x) {
          const int64_t i0 = x * kBwdQueries, size = min_of(kBwdQueries, s_.q_len - i0);
          const Range keys = intersect(unmasked, blocks.band_of(i0, size));
          if (keys.size() == 0) continue;
          blocks.load_queries(b, h, i0, size);
          for_key_blocks(keys, [&](int64_t j0, int64_t n) {
            blocks.gradients(j0, n, static_cast<C*>(a_.dbias));
          });
        }
      }
    }
  }

  const AttentionBwdArgs& a_;
  const AttentionShape& s_;
  const BwdPlan plan_;
  C* delta_;
  char *slots_, *key_sums_;
  C* query_sums_;
};

}  // namespace

void attention_bwd(const AttentionBwdArgs& a) {
  switch (a.shape.dtype) {
    case DType::kFloat32:
      return Backward<float>(a).run();
    case DType::kBFloat16:
      return Backward<BFloat16>(a).run();
    case DType::kFloat16:
      return Backward<Float16>(a).run();
    case DType::kFloat64:
      return Backward<double>(a).run();
  }
}

}  // namespace LLMKERN_ISA
}  // namespace llmkern
