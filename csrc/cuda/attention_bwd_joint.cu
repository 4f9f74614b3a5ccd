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

// Loads Q, dO and the terms of the queries for tile after tile; of a head from the last tile to the
// first, then of the next head that shares the keys.
template <class T, class J>
struct JointLoader {
  RowLoader<T, J::kD, J::kQueries, true, J::kThreads> q, dout;
  uint64_t terms;  // this thread's 16 bytes of the next tile
  uint32_t terms_to;

  // at: the first tile.
  __device__ JointLoader(const AttentionParams& p, int batch, const QueryTile& at, uint32_t shared)
      : q(shared + J::kQ, slab<T>(p.q, batch, at.head), p.q.row, at.tile * J::kQueries, p.head_dim),
        dout(shared + J::kDout, slab<T>(p.dout, batch, at.head), p.dout.row, at.tile * J::kQueries,
             p.value_dim),
        terms(ptx::global_address(p.terms.data + at.row) + threadIdx.x * 16),
        terms_to(shared + J::kTerms + threadIdx.x * 16) {}

  // To stage 0 or 1.
  __device__ void load(const AttentionParams& p, int tile, int stage) {
    const int i0 = tile * J::kQueries;
    if (i0 + J::kQueries <= p.q_len) {
      q.load_whole(stage * J::kTile);
      dout.load_whole(stage * J::kTile);
    } else {
      q.load(stage * J::kTile, i0, p.q_len);
      dout.load(stage * J::kTile, i0, p.q_len);
    }
    if (threadIdx.x < J::kTermsTile / 16) {
      ptx::cp_async_cg_16(terms_to + stage * J::kTermsTile, terms, 16);
    }
    terms -= J::kTermsTile;
  }

  // After the first tile of a head; rows: of all tiles.
  __device__ void next_head(const AttentionParams& p, int64_t rows) {
    q.from += (p.q.head + rows * p.q.row) * 2;
    dout.from += (p.dout.head + rows * p.dout.row) * 2;
    terms += (p.terms.rows + rows) * 8;
    ptx::keep(terms);  // a branch that is seldom taken, not arithmetic at each tile
  }
};

__device__ inline uint32_t take_ticket(const AttentionParams& p, uint8_t* shared) {
  auto ticket = reinterpret_cast<uint32_t*>(shared);
  if (threadIdx.x == 0) *ticket = atomicAdd(p.sums.ticket, 1);
  __syncthreads();
  return *ticket;
}

template <class T, int kD, int kWarps>
__global__ void __launch_bounds__(kWarps* kWarp)
    attention_bwd_joint_kernel(const AttentionParams p) {
  using J = Joint<kD, kWarps>;
  constexpr int kQueries = J::kQueries;
  const uint32_t shared = shared_address(shared_bytes);
  const Keys<J> keys(p, take_ticket(p, shared_bytes + J::kTicket));
  const int batch = keys.batch, j0 = keys.j0, first_head = keys.kv_head * p.group;
  load_rows<T, kD, J::kKeys, J::kThreads>(shared + J::kK, slab<T>(p.k, batch, keys.kv_head),
                                          p.k.row, j0, p.kv_len, p.head_dim, keys.mask(p));
  load_rows<T, kD, J::kKeys, J::kThreads>(shared + J::kV, slab<T>(p.v, batch, keys.kv_head),
                                          p.v.row, j0, p.kv_len, p.value_dim, keys.mask(p));
  const Range tiles = query_tiles<kQueries>(p, j0, min(j0 + J::kKeys, p.kv_len) - 1);
  const Range whole_tiles = keys.whole_tiles(p);
  const int end_head = first_head + (tiles.first < tiles.end ? p.group : 0);
  const int64_t rows = int64_t{tiles.end - tiles.first} * kQueries;
  QueryTile at{tiles.end - 1, first_head, 0};
  at.row = (static_cast<int64_t>(batch) * p.heads + at.head) * p.terms.rows + at.tile * kQueries;
  JointLoader<T, J> loader(p, batch, at, shared);
  if (at.head != end_head) loader.load(p, at.tile, 0);
  const Lanes<kD> lanes;
  KeySums<T, J> sums(p, shared, keys.own, lanes);
  const QuerySums<T, J> query_sums(shared, lanes);
  ptx::cp_async_commit_group();
  bool k_finite = true;
  if (whole_tiles.first > tiles.first || whole_tiles.end < tiles.end) {
    ptx::cp_async_wait_group<0>();
    k_finite = barrier_all_finite(own_exponents<T, kD, J::kKeys, J::kThreads>(shared_bytes));
  }
  uint32_t* added = nullptr;  // the lock of the tile before
#pragma unroll 1
  for (int turn = 0; at.head != end_head; turn ^= 1) {
    const int i0 = at.tile * kQueries, i1 = min(i0 + kQueries, p.q_len) - 1;
    const bool whole = whole_tiles.has(at.tile);
    ptx::cp_async_wait_group<0>();
    // This stage is here; every warp is done with the other one, with dS and with the sums of dQ.
    bool plain = true;
    if (whole) {
      __syncthreads();
    } else {
      const uint8_t* stage = shared_bytes + turn * J::kTile;
      plain = barrier_all_finite(own_exponents<T, kD, kQueries, J::kThreads>(stage + J::kQ) |
                                 own_exponents<T, kD, kQueries, J::kThreads>(stage + J::kDout));
    }
    if (threadIdx.x == 0 && added != nullptr) ptx::red_release_gpu_add_u32(added, 1);
    const bool head_ends = at.tile == tiles.first;
    if (head_ends) loader.next_head(p, rows);
    if (!head_ends || at.head + 1 != end_head) {
      loader.load(p, head_ends ? tiles.end - 1 : at.tile - 1, turn ^ 1);
    }
    ptx::cp_async_commit_group();
#pragma unroll 1
    for (int first = 0; first < kQueries; first += kGroup) {
      if (whole || keys.warps(p, i0 + first).has(threadIdx.x / kWarp)) {
        sums.add(p, keys, at.head, i0, first, turn * kQueries, whole, plain);
      }
    }
    const uint32_t first_block = static_cast<uint32_t>(max(i0 + p.shift - p.left, 0)) / J::kKeys;
    const uint32_t before = keys.block - first_block;
    uint32_t* lock = p.sums.locks + static_cast<uint64_t>(at.row) / kLockRows;
    if (threadIdx.x == 0 && before > 0) {
      while (ptx::ld_acquire_gpu_u32(lock) != before) continue;
    }
    __syncthreads();
    const bool last = keys.are_last(p, i1);
    before == 0 ? query_sums.template add<true>(p, keys, at, whole, k_finite, last)
                : query_sums.template add<false>(p, keys, at, whole, k_finite, last);
    added = last ? nullptr : lock;
    --at.tile;
    at.row -= kQueries;
    if (head_ends) {
      at.tile = tiles.end - 1;
      at.row += p.terms.rows + rows;
      ++at.head;
      ptx::keep(at.head);
    }
  }
  ptx::cp_async_wait_group<0>();
  __syncthreads();
  if (threadIdx.x == 0 && added != nullptr) ptx::red_release_gpu_add_u32(added, 1);
  sums.store(p, keys);
}

constexpr size_t kLeastShared = 99 * 1024;                     // of a block on any card
constexpr size_t kLargeShared = 164 * 1024, kReserved = 1024;  // of sm_80; of it, for each block
static_assert(Joint<64, 4>::kBytes <= kLeastShared && Joint<128, 4>::kBytes <= kLeastShared,
              "they fit into any card");
static_assert(2 * (Joint<64, 4>::kBytes + kReserved) <= kLargeShared, "two fit side by side");

template <class T, int kD, int kWarps>
void run(const AttentionShape& s, const AttentionParams& p, const Place& place) {
  using J = Joint<kD, kWarps>;
  const int64_t blocks = s.batch * s.kv_heads * ceil_div(s.kv_len, J::kKeys);
  launch("attention_bwd_joint", attention_bwd_joint_kernel<T, kD, kWarps>,
         dim3(static_cast<unsigned>(blocks)), J::kThreads, J::kBytes, place, p);
}

}  // namespace

// 128 keys a block, which halves what is read of Q and dO and added to dQ, or 64 where the card has
// too little shared memory for them (sm_86, sm_89, sm_120).
void attention_bwd_joint(const AttentionShape& s, const AttentionParams& p, const Place& place) {
  dispatch_attention_type(s, [&](auto t) {
    using T = decltype(t);
    if (tile_dim(s) == 64) return run<T, 64, 4>(s, p, place);
    most_shared_bytes("attention_bwd_joint", place) >= Joint<128, 8>::kBytes
        ? run<T, 128, 8>(s, p, place)
        : run<T, 128, 4>(s, p, place);
  });
}

}  // namespace llmkern
