// Backward attention in tiles of queries by keys (attention_bwd_plan.h), five products for each
// block of a tile (attention_bwd_block.h). With many (batch, kv head) pairs a task is a pair: it
// runs its tiles one after the other and adds each to the totals. With few, a task is a tile, and
// the tiles of a wave are added up, in the same order, when all of them are there.
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
    totals_ = slots_ + max_threads() * plan_.slot_bytes;
    tiles_ = totals_ + plan_.totals * plan_.totals_bytes;
  }

  void run() {
    deltas();
    if (a_.dsinks) sink_gradients();
    bias_in_tiles_ = a_.dbias && tiles_own_bias();
    if (a_.dq || a_.dk || a_.dv || bias_in_tiles_) {
      if (plan_.wave > 0) {
        waves();
      } else {
        parallel_for(s_.batch * s_.kv_heads, [&](int64_t t, int thread) { pair(t, thread); });
      }
    }
    if (a_.dbias && !bias_in_tiles_) bias_gradients();
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

  // Whether each element of dbias has one score only.
  bool tiles_own_bias() const {
    const int64_t* stride = a_.dbias_stride;
    return (stride[0] != 0 || s_.batch == 1) && (stride[1] != 0 || s_.heads == 1) &&
           (stride[2] != 0 || s_.q_len == 1) && (stride[3] != 0 || s_.kv_len == 1);
  }

  BwdBlock<T> block(int thread) const {
    return BwdBlock<T>(a_, plan_, delta_, slots_ + thread * plan_.slot_bytes);
  }

  // The sums of a tile: dq of its query blocks, dk and dv of its keys.
  BwdSums<C> tile_sums(int64_t index) const {
    C* p = reinterpret_cast<C*>(tiles_ + index * plan_.tile_bytes);
    C* dk = p + kBwdTileBlocks * kBwdQueries * s_.head_dim;
    return {a_.dq ? p : nullptr,
            a_.dk ? dk : nullptr,
            a_.dv ? dk + plan_.chunk_keys * s_.head_dim : nullptr,
            s_.head_dim,
            s_.head_dim,
            s_.value_dim};
  }

  // The totals of a pair's dk and dv: the output itself, or scratch where that has 16 bits.
  BwdSums<C> totals(int64_t pair, int64_t index) const {
    BwdSums<C> to{nullptr, nullptr, nullptr, 0, s_.head_dim, s_.value_dim};
    if (plan_.round_keys) {
      C* base = reinterpret_cast<C*>(totals_ + index * plan_.totals_bytes);
      if (a_.dk) to.dk = base;
      if (a_.dv) to.dv = base + s_.kv_len * s_.head_dim;
      return to;
    }
    const int64_t b = pair / s_.kv_heads, g = pair % s_.kv_heads;
    if (a_.dk) to.dk = static_cast<C*>(a_.dk) + b * a_.dk_stride[0] + g * a_.dk_stride[1];
    if (a_.dv) to.dv = static_cast<C*>(a_.dv) + b * a_.dv_stride[0] + g * a_.dv_stride[1];
    to.dk_ld = a_.dk_stride[2];
    to.dv_ld = a_.dv_stride[2];
    return to;
  }

  // A query block of a pair: `unit` counts over the query heads of the kv head, then over blocks.
  struct Unit {
    int64_t h, i0, size;
  };
  Unit unit_of(int64_t pair, int64_t unit) const {
    const int64_t g = pair % s_.kv_heads, i0 = unit % plan_.q_blocks * kBwdQueries;
    return {g * (s_.heads / s_.kv_heads) + unit / plan_.q_blocks, i0,
            min_of(kBwdQueries, s_.q_len - i0)};
  }
  Range units_of(int64_t segment) const {
    const int64_t units = s_.heads / s_.kv_heads * plan_.q_blocks;
    return intersect({segment * kBwdTileBlocks, (segment + 1) * kBwdTileBlocks}, {0, units});
  }
  Range keys_of(int64_t chunk) const {
    return intersect({chunk * plan_.chunk_keys, (chunk + 1) * plan_.chunk_keys}, {0, s_.kv_len});
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

  // Whether some query of the segment reaches `keys` through the band.
  bool sees(int64_t pair, int64_t segment, Range keys) const {
    const Range units = units_of(segment);
    for (int64_t u = units.begin; u < units.end; ++u) {
      const Unit unit = unit_of(pair, u);
      if (intersect(keys, band_of(unit)).size() > 0) return true;
    }
    return false;
  }
  Range band_of(const Unit& unit) const {
    const KeyRange keys = band_keys(s_, unit.i0, unit.i0 + unit.size);
    return {keys.begin, keys.end};
  }

  // Sums of one tile, from zero; false if it holds nothing to see. unmasked: keys of the batch.
  bool tile(BwdBlock<T>& blocks, int64_t pair, int64_t segment, int64_t chunk, Range unmasked,
            const BwdSums<C>& sums) const {
    const Range all = keys_of(chunk), keys = intersect(unmasked, all), units = units_of(segment);
    if (!sees(pair, segment, keys)) return false;
    if (sums.dq) clear_rows(sums.dq, units.size() * kBwdQueries, s_.head_dim, sums.dq_ld);
    if (sums.dk) clear_rows(sums.dk, all.size(), s_.head_dim, sums.dk_ld);
    if (sums.dv) clear_rows(sums.dv, all.size(), s_.value_dim, sums.dv_ld);
    const int64_t b = pair / s_.kv_heads;
    blocks.load_keys(b, pair % s_.kv_heads, all);
    for (int64_t u = units.begin; u < units.end; ++u) {
      const Unit unit = unit_of(pair, u);
      const Range visible = intersect(keys, band_of(unit));
      if (visible.size() == 0) continue;
      blocks.load_queries(b, unit.h, unit.i0, unit.size);
      for_key_blocks(visible, [&](int64_t j0, int64_t n) {
        C* dbias = bias_in_tiles_ ? static_cast<C*>(a_.dbias) : nullptr;
        if (!blocks.gradients(j0, n, dbias)) return;
        BwdSums<C> at = sums;
        if (at.dq) at.dq += (u - units.begin) * kBwdQueries * at.dq_ld;
        if (at.dk) at.dk += (j0 - all.begin) * at.dk_ld;
        if (at.dv) at.dv += (j0 - all.begin) * at.dv_ld;
        blocks.accumulate(at);
      });
    }
    return true;
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

  void pair(int64_t t, int thread) const {
    const BwdSums<C> total = totals(t, thread), sums = tile_sums(2 * thread);
    const BwdSums<C> queries = tile_sums(2 * thread + 1);
    const Range unmasked = unmasked_keys(t / s_.kv_heads);
    BwdBlock<T> blocks = block(thread);
    clear_totals(total, {0, s_.kv_len});
    for (int64_t segment = 0; segment < plan_.segments; ++segment) {
      const int64_t rows = units_of(segment).size() * kBwdQueries;
      if (a_.dq) clear_rows(queries.dq, rows, s_.head_dim, queries.dq_ld);
      for (int64_t chunk = 0; chunk < plan_.chunks; ++chunk) {
        if (!tile(blocks, t, segment, chunk, unmasked, sums)) continue;
        add_keys(sums, chunk, total);
        if (a_.dq) add_rows(sums.dq, sums.dq_ld, rows, s_.head_dim, queries.dq, queries.dq_ld);
      }
      if (a_.dq) store_queries(queries, t, segment);
    }
    if (plan_.round_keys) store_keys(total, t, {0, s_.kv_len});
  }

  // The index of a tile of the wave that starts at segment `first`.
  int64_t tile_index(int64_t pair, int64_t segment, int64_t first, int64_t chunk) const {
    return (pair * plan_.wave + segment - first) * plan_.chunks + chunk;
  }

  void waves() const {
    const int64_t pairs = s_.batch * s_.kv_heads, columns = pairs * plan_.chunks;
    parallel_for(columns, [&](int64_t t, int) {
      clear_totals(totals(t / plan_.chunks, t / plan_.chunks), keys_of(t % plan_.chunks));
    });
    for (int64_t first = 0; first < plan_.segments; first += plan_.wave) {
      const int64_t wave = min_of(plan_.wave, plan_.segments - first);
      parallel_for(columns * wave, [&](int64_t t, int thread) {
        // The last segments first: under a causal mask they have the most to do.
        const int64_t segment = first + wave - 1 - t / columns, pair = t % columns / plan_.chunks;
        const int64_t chunk = t % plan_.chunks;
        BwdBlock<T> blocks = block(thread);
        tile(blocks, pair, segment, chunk, unmasked_keys(pair / s_.kv_heads),
             tile_sums(tile_index(pair, segment, first, chunk)));
      });
      parallel_for(columns + pairs * wave, [&](int64_t t, int) {
        if (t < columns) {
          add_column(t / plan_.chunks, t % plan_.chunks, first, wave);
        } else {
          add_row_of_tiles((t - columns) / wave, first + (t - columns) % wave, first);
        }
      });
    }
    if (!plan_.round_keys) return;
    parallel_for(columns, [&](int64_t t, int) {
      const int64_t pair = t / plan_.chunks;
      store_keys(totals(pair, pair), pair, keys_of(t % plan_.chunks));
    });
  }

  // Tiles of one chunk of keys into the totals, in order of segments.
  void add_column(int64_t pair, int64_t chunk, int64_t first, int64_t wave) const {
    const Range keys = intersect(keys_of(chunk), unmasked_keys(pair / s_.kv_heads));
    for (int64_t segment = first; segment < first + wave; ++segment) {
      if (!sees(pair, segment, keys)) continue;
      add_keys(tile_sums(tile_index(pair, segment, first, chunk)), chunk, totals(pair, pair));
    }
  }

  // The dq of one segment: its tiles in order of chunks. They are added into the first of them.
  void add_row_of_tiles(int64_t pair, int64_t segment, int64_t first) const {
    if (!a_.dq) return;
    const Range unmasked = unmasked_keys(pair / s_.kv_heads);
    const int64_t rows = units_of(segment).size() * kBwdQueries;
    const BwdSums<C> to = tile_sums(tile_index(pair, segment, first, 0));
    for (int64_t chunk = 0; chunk < plan_.chunks; ++chunk) {
      const bool seen = sees(pair, segment, intersect(keys_of(chunk), unmasked));
      const BwdSums<C> from = tile_sums(tile_index(pair, segment, first, chunk));
      if (chunk == 0) {
        if (!seen) clear_rows(to.dq, rows, s_.head_dim, to.dq_ld);
      } else if (seen) {
        add_rows(from.dq, from.dq_ld, rows, s_.head_dim, to.dq, to.dq_ld);
      }
    }
    store_queries(to, pair, segment);
  }

  void clear_totals(const BwdSums<C>& total, Range keys) const {
    if (total.dk)
      clear_rows(total.dk + keys.begin * total.dk_ld, keys.size(), s_.head_dim, total.dk_ld);
    if (total.dv)
      clear_rows(total.dv + keys.begin * total.dv_ld, keys.size(), s_.value_dim, total.dv_ld);
  }

  static void add_rows(const C* from, int64_t from_ld, int64_t rows, int64_t n, C* to,
                       int64_t to_ld) {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t d = 0; d < n; ++d) to[r * to_ld + d] += from[r * from_ld + d];
  }

  void add_keys(const BwdSums<C>& sums, int64_t chunk, const BwdSums<C>& total) const {
    const Range keys = keys_of(chunk);
    if (sums.dk)
      add_rows(sums.dk, sums.dk_ld, keys.size(), s_.head_dim, total.dk + keys.begin * total.dk_ld,
               total.dk_ld);
    if (sums.dv)
      add_rows(sums.dv, sums.dv_ld, keys.size(), s_.value_dim, total.dv + keys.begin * total.dv_ld,
               total.dv_ld);
  }

  static void store_row(const C* from, int64_t n, T* to) {
    int64_t d = 0;
    for (; d + V::kLanes <= n; d += V::kLanes) V::load(from + d).store(to + d);
    const int left = static_cast<int>(n - d);
    if (left > 0) V::load_n(from + d, left).store_n(to + d, left);
  }

  void store_queries(const BwdSums<C>& sums, int64_t pair, int64_t segment) const {
    const Range units = units_of(segment);
    for (int64_t u = units.begin; u < units.end; ++u) {
      const Unit unit = unit_of(pair, u);
      T* dq = static_cast<T*>(a_.dq) + pair / s_.kv_heads * a_.dq_stride[0] +
              unit.h * a_.dq_stride[1] + unit.i0 * a_.dq_stride[2];
      const C* from = sums.dq + (u - units.begin) * kBwdQueries * sums.dq_ld;
      for (int64_t l = 0; l < unit.size; ++l)
        store_row(from + l * sums.dq_ld, s_.head_dim, dq + l * a_.dq_stride[2]);
    }
  }

  void store_keys(const BwdSums<C>& total, int64_t pair, Range keys) const {
    const int64_t b = pair / s_.kv_heads, g = pair % s_.kv_heads;
    T* dk = static_cast<T*>(a_.dk) + b * a_.dk_stride[0] + g * a_.dk_stride[1];
    T* dv = static_cast<T*>(a_.dv) + b * a_.dv_stride[0] + g * a_.dv_stride[1];
    for (int64_t j = keys.begin; j < keys.end; ++j) {
      if (total.dk) store_row(total.dk + j * total.dk_ld, s_.head_dim, dk + j * a_.dk_stride[2]);
      if (total.dv) store_row(total.dv + j * total.dv_ld, s_.value_dim, dv + j * a_.dv_stride[2]);
    }
  }

  // dbias where it is summed over batches, heads, queries or keys: one task for each piece of it,
  // which computes once more the blocks of scores that add to that piece.
  void bias_gradients() const {
    const int64_t* stride = a_.dbias_stride;
    const int64_t extent[4] = {s_.batch, s_.heads, plan_.q_blocks, plan_.chunks};
    int64_t pieces[4], tasks = 1;
    for (int d = 0; d < 4; ++d) {
      pieces[d] = stride[d] != 0 ? extent[d] : min_of<int64_t>(1, extent[d]);
      tasks *= pieces[d];
    }
    parallel_for(tasks, [&](int64_t t, int thread) {
      Range at[4];
      for (int d = 3; d >= 0; --d) {
        const int64_t piece = t % pieces[d];
        at[d] = stride[d] != 0 ? Range{piece, piece + 1} : Range{0, extent[d]};
        t /= pieces[d];
      }
      bias_piece(at, thread);
    });
  }

  // Batches, heads, query blocks and chunks of keys that add to one piece of dbias.
  void bias_piece(const Range at[4], int thread) const {
    BwdBlock<T> blocks = block(thread);
    for (int64_t b = at[0].begin; b < at[0].end; ++b) {
      const Range unmasked = unmasked_keys(b);
      for (int64_t h = at[1].begin; h < at[1].end; ++h) {
        for (int64_t chunk = at[3].begin; chunk < at[3].end; ++chunk) {
          blocks.load_keys(b, h / (s_.heads / s_.kv_heads), keys_of(chunk));
          for (int64_t x = at[2].begin; x < at[2].end; ++x) {
            const int64_t i0 = x * kBwdQueries;
            const Unit unit{h, i0, min_of(kBwdQueries, s_.q_len - i0)};
            const Range keys = intersect(intersect(unmasked, keys_of(chunk)), band_of(unit));
            if (keys.size() == 0) continue;
            blocks.load_queries(b, h, i0, unit.size);
            for_key_blocks(keys, [&](int64_t j0, int64_t n) {
              blocks.gradients(j0, n, static_cast<C*>(a_.dbias));
            });
          }
        }
      }
    }
  }

  const AttentionBwdArgs& a_;
  const AttentionShape& s_;
  const BwdPlan plan_;
  C* delta_;
  char *slots_, *totals_, *tiles_;
  bool bias_in_tiles_ = false;
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
