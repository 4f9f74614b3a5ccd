// Attention backward in one pass; formulas: attention_bwd.cuh. A block owns kKeys keys and walks
// over the queries that see them, of all query heads that share them: dK and dV stay in registers,
// and dS K is added to float sums of dQ in memory, where the blocks of keys take turns.
//
// A lock counts, for each tile of queries, the blocks of keys that have been added. They are added
// in the order of the keys, so the result is the same each time. The first one stores, the last one
// writes dQ. A block waits for blocks of fewer keys of its own unit (batch, kv head) alone, and it
// takes its place by a ticket when it starts: those that it waits for are running or done, whatever
// order the hardware starts blocks in. Tiles are walked from the last to the first, so that under a
// causal mask blocks of keys can start together and end one after the other.
#include "attention_bwd.cuh"
#include "attention_joint_sums.cuh"
#include "attention_launch.cuh"

namespace llmkern {
namespace {

// Loads Q, dO and the terms of the queries for tile after tile, to two stages in turn; of a head
// from the last tile to the first, then of the next head that shares the keys.
template <class T, int kD>
struct JointLoader {
  using J = Joint<kD>;
  RowLoader<T, kD, J::kQueries> q, dout;
  Range tiles;
  QueryTile at;  // the next one
  int end_head;
  int64_t q_back, dout_back;  // bytes of two tiles: the loaders have gone on by one

  __device__ JointLoader(const AttentionParams& p, const Keys<kD>& keys, const Range& tiles,
                         uint32_t shared)
      : q(shared + J::kQ, slab<T>(p.q, keys.batch, keys.kv_head * p.group), p.q.row,
          (tiles.end - 1) * J::kQueries, p.head_dim),
        dout(shared + J::kDout, slab<T>(p.dout, keys.batch, keys.kv_head * p.group), p.dout.row,
             (tiles.end - 1) * J::kQueries, p.value_dim),
        tiles(tiles) {
    at.tile = tiles.end - 1;
    at.head = keys.kv_head * p.group;
    at.row = (static_cast<int64_t>(keys.batch) * p.heads + at.head) * p.terms.rows +
             at.tile * J::kQueries;
    end_head = at.head + (tiles.first < tiles.end ? p.group : 0);
    q_back = p.q.row * J::kQueries * 4;
    dout_back = p.dout.row * J::kQueries * 4;
  }

  // To stage 0 or 1.
  __device__ void load(const AttentionParams& p, uint32_t shared, int stage) {
    if (at.head != end_head) {
      const int i0 = at.tile * J::kQueries;
      if (i0 + J::kQueries <= p.q_len) {
        q.load_whole(stage * J::kTile);
        dout.load_whole(stage * J::kTile);
      } else {
        q.load(stage * J::kTile, i0, p.q_len);
        dout.load(stage * J::kTile, i0, p.q_len);
      }
      if (threadIdx.x < J::kTermsTile / 16) {
        ptx::cp_async_cg_16(shared + J::kTerms + stage * J::kTermsTile + threadIdx.x * 16,
                            ptx::global_address(p.terms.data + at.row) + threadIdx.x * 16, 16);
      }
      q.from -= q_back;
      dout.from -= dout_back;
      at.row -= J::kQueries;
      if (--at.tile < tiles.first) next_head(p);
    }
    ptx::cp_async_commit_group();
  }

  __device__ void next_head(const AttentionParams& p) {
    const int64_t rows = (tiles.end - tiles.first) * J::kQueries;
    q.from += (p.q.head + rows * p.q.row) * 2;
    dout.from += (p.dout.head + rows * p.dout.row) * 2;
    at.row += p.terms.rows + rows;
    at.tile = tiles.end - 1;
    ++at.head;
  }
};

__device__ inline uint32_t take_ticket(const AttentionParams& p, uint8_t* shared) {
  auto ticket = reinterpret_cast<uint32_t*>(shared);
  if (threadIdx.x == 0) *ticket = atomicAdd(p.sums.ticket, 1);
  __syncthreads();
  return *ticket;
}

template <class T, int kD>
__global__ void __launch_bounds__(kAttentionThreads)
    attention_bwd_joint_kernel(const AttentionParams p) {
  using J = Joint<kD>;
  constexpr int kQueries = J::kQueries;
  const uint32_t shared = shared_address(shared_bytes);
  const Keys<kD> keys(p, take_ticket(p, shared_bytes + J::kTicket));
  const int batch = keys.batch, j0 = keys.j0;
  const Range tiles = query_tiles<kQueries>(p, j0, min(j0 + J::kKeys, p.kv_len) - 1);
  const Range whole_tiles = keys.whole_tiles(p);
  load_rows<T, kD, J::kKeys>(shared + J::kK, slab<T>(p.k, batch, keys.kv_head), p.k.row, j0,
                             p.kv_len, p.head_dim, keys.mask(p));
  load_rows<T, kD, J::kKeys>(shared + J::kV, slab<T>(p.v, batch, keys.kv_head), p.v.row, j0,
                             p.kv_len, p.value_dim, keys.mask(p));
  JointLoader<T, kD> loader(p, keys, tiles, shared);
  QueryTile now = loader.at;
  loader.load(p, shared, 0);
  const Lanes<kD> lanes;
  KeySums<T, kD> sums(p, shared, keys.own, lanes);
  const QuerySums<T, kD> query_sums(shared, lanes);
  bool k_finite = true;
  if (whole_tiles.first > tiles.first || whole_tiles.end < tiles.end) {
    ptx::cp_async_wait_group<0>();
    k_finite = barrier_all_finite(own_exponents<T, kD, J::kKeys>(shared_bytes + J::kK));
  }
  uint32_t* added = nullptr;  // the lock of the tile before
#pragma unroll 1
  for (int turn = 0; now.head != loader.end_head; turn ^= 1) {
    const int i0 = now.tile * kQueries, i1 = min(i0 + kQueries, p.q_len) - 1;
    const bool whole = whole_tiles.has(now.tile);
    ptx::cp_async_wait_group<0>();
    // This stage is here; every warp is done with the other one, with dS and with the sums of dQ.
    bool plain = true;
    if (whole) {
      __syncthreads();
    } else {
      const uint8_t* stage = shared_bytes + turn * J::kTile;
      plain = barrier_all_finite(own_exponents<T, kD, kQueries>(stage + J::kQ) |
                                 own_exponents<T, kD, kQueries>(stage + J::kDout));
    }
    if (threadIdx.x == 0 && added != nullptr) ptx::red_release_gpu_add_u32(added, 1);
    const QueryTile next = loader.at;
    loader.load(p, shared, turn ^ 1);
#pragma unroll 1
    for (int at = 0; at < kQueries; at += kGroup) {
      if (whole || keys.warps(p, i0 + at).has(threadIdx.x / kWarp)) {
        sums.add(p, keys, now.head, i0 + at, turn * kQueries + at, whole, plain);
      }
      const bool wraps = turn == 1 && at == kQueries - kGroup;
      sums.advance(wraps ? kGroup - 2 * kQueries : kGroup);
    }
    const uint32_t first = static_cast<uint32_t>(max(i0 + p.shift - p.left, 0)) / J::kKeys;
    const uint32_t last =
        static_cast<uint32_t>(min(i1 + p.shift + p.right, p.kv_len - 1)) / J::kKeys;
    const uint32_t before = keys.block - first;
    const bool is_last = keys.block == last;
    uint32_t* lock = p.sums.locks + now.row / kLockRows;
    if (threadIdx.x == 0 && before > 0) {
      while (ptx::ld_acquire_gpu_u32(lock) != before) continue;
    }
    __syncthreads();
    before == 0 ? query_sums.template add<true>(p, keys, now, whole, k_finite, is_last)
                : query_sums.template add<false>(p, keys, now, whole, k_finite, is_last);
    added = is_last ? nullptr : lock;
    now = next;
  }
  ptx::cp_async_wait_group<0>();
  __syncthreads();
  if (threadIdx.x == 0 && added != nullptr) ptx::red_release_gpu_add_u32(added, 1);
  sums.store(p, keys);
}

}  // namespace

void attention_bwd_joint(const AttentionShape& s, const AttentionParams& p, const Place& place) {
  dispatch_attention(s, [&](auto t, auto d) {
    using J = Joint<d.value>;
    const int64_t blocks = s.batch * s.kv_heads * ceil_div(s.kv_len, J::kKeys);
    launch("attention_bwd_joint", attention_bwd_joint_kernel<decltype(t), d.value>,
           dim3(static_cast<unsigned>(blocks)), kAttentionThreads, J::kBytes, place, p);
  });
}

}  // namespace llmkern
