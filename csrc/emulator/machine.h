// The running machine: launch, worker thread, CTA, warp. Data only; cta.cpp and warp.cpp run it.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "ir.h"
#include "lane_shadow.h"
#include "memory.h"
#include "patterns.h"
#include "shared_shadow.h"

namespace llmkern {
namespace emulator {

struct Options {
  bool bounds = true;         // out of bounds and misaligned
  bool uninitialised = true;  // shared memory, registers
  bool races = true;          // shared memory, between warps
  bool warp_races = true;     // shared memory, between lanes of a warp
  bool global_races = true;   // global memory, between CTAs
  bool async_copies = true;   // touches of what cp.async has under way
  bool collectives = true;    // shfl, mma, bar ... that not all lanes reach
  bool counters = true;
  int threads = 1;
  uint64_t seed = 0;           // 0: CTAs and warps in order, else shuffled by it
  uint64_t budget = 1u << 28;  // warp instructions of one warp
};

// What stopped a kernel. Thrown by handlers; the CTA adds where it was.
struct Fault {
  std::string check;    // "out of bounds", "shared race", ...
  std::string message;  // what happened
  int lane = -1;
  int other = -1;  // index of the other instruction of a race
};

// Of one instruction, over the whole launch.
struct Count {
  uint64_t runs = 0, full_runs = 0;  // full: all 32 lanes
  uint64_t lanes = 0;                // of the runs that were not full
  uint64_t bytes = 0;
  uint64_t sectors = 0, ideal_sectors = 0;
  uint64_t wavefronts = 0, ideal_wavefronts = 0;

  void add(const Count& c) {
    runs += c.runs;
    full_runs += c.full_runs;
    lanes += c.lanes;
    bytes += c.bytes;
    sectors += c.sectors;
    ideal_sectors += c.ideal_sectors;
    wavefronts += c.wavefronts;
    ideal_wavefronts += c.ideal_wavefronts;
  }
};

// The first race between CTAs, by position of the later one, then address.
struct GlobalRace {
  std::mutex mutex;
  int64_t later = -1;
  uint64_t address = 0;
  int32_t index = 0, other = 0;  // instruction of the later CTA, of the earlier one
  const char* what = "";
};

struct Launch {
  const Program* program = nullptr;
  const Kernel* kernel = nullptr;
  uint32_t grid[3] = {1, 1, 1}, block[3] = {1, 1, 1};
  int64_t dynamic_shared = 0;
  std::vector<char> parameters;
  Options options;
  Registry registry;
  mutable GlobalRace race;
  std::vector<uint8_t> follow;         // by instruction: its reads may meet stores of this launch
  std::unique_ptr<GlobalOrder> order;  // where CTAs may be ordered by atomics

  int threads() const { return static_cast<int>(block[0] * block[1] * block[2]); }
  int warps() const { return (threads() + kLanes - 1) / kLanes; }
  int64_t shared_bytes() const { return kernel->dynamic_base + dynamic_shared; }
};

// One cp.async of a warp: lanes whose copy is still under way.
struct AsyncCopy {
  AsyncCopy() {}  // leaves the arrays as they are

  uint32_t mask = 0;
  uint32_t group = 0;  // by commit count of the lanes
  uint8_t bytes = 0;
  bool full = false;                 // no source is shorter
  int32_t index = 0;                 // instruction
  const Pattern* pattern = nullptr;  // of `to`, if it is kept
  uint64_t to[kLanes];
  uint64_t from[kLanes];
  uint32_t size[kLanes];  // of the source, the rest is zero
};

struct Group {  // lanes of a warp at one place
  int32_t pc = 0;
  uint32_t mask = 0;
  bool parked = false;  // waits for others at a collective or an aligned barrier
};

struct Cta;
struct Worker;

struct Warp {
  enum State { kReady, kAtBarrier, kDone };

  char* regs = nullptr;
  char* shared = nullptr;
  char* local = nullptr;
  uint32_t* poison = nullptr;
  Cta* cta = nullptr;
  Worker* worker = nullptr;
  const Launch* launch = nullptr;
  const Options* options = nullptr;
  int id = 0;
  State state = kReady;
  uint32_t alive = 0;
  std::vector<Group> groups;
  int32_t pc = 0;     // of the instruction under way
  uint32_t mask = 0;  // lanes of its group, before the guard
  uint64_t steps = 0, divergent_steps = 0;
  bool forced = false;  // a collective runs without the lanes that are missing
  // Barrier it waits at.
  int barrier = 0;
  int32_t barrier_pc = 0;
  // cp.async.
  std::vector<std::unique_ptr<AsyncCopy>> copies;  // the first `under_way`, in order; spare ones
  size_t under_way = 0;
  uint32_t committed[kLanes] = {};
  // Order between warps: own epoch, and the epoch of each other one that is known to be before.
  uint32_t epoch = 0;
  uint32_t seen[kMaxWarps] = {};
  uint32_t all_seen = 0;  // what it has seen of every warp
  uint32_t carry = 0;     // CC.CF of add.cc and its kin, a lane mask

  template <class T>
  T* at(uint32_t offset) {
    return reinterpret_cast<T*>(regs + offset);
  }
  uint32_t predicate(uint32_t offset) const { return *reinterpret_cast<uint32_t*>(regs + offset); }
};

struct Barrier {
  int arrived = 0;                // threads, whole warps
  int expected = 0;               // 0: every warp that has not exited
  uint32_t waiting = 0;           // warps that wait
  uint32_t joined = 0;            // warps that arrived, waiting or not
  uint32_t seen[kMaxWarps] = {};  // what they had seen when they arrived
  uint32_t votes_and = kAllLanes, votes_or = 0, votes_count = 0;
};

struct Cta {
  uint32_t id[3] = {0, 0, 0};
  int64_t position = 0;  // in the order of this launch
  std::vector<Warp> warps;
  int current = 0;  // the warp that runs
  Barrier barriers[16];
};

// What one host thread needs to run CTAs, kept from one CTA to the next.
struct Worker {
  const Launch* launch = nullptr;
  std::vector<char> registers, shared, local;
  std::vector<uint32_t> poison;
  SharedShadow shadow;
  std::unique_ptr<Patterns> patterns;
  std::unique_ptr<LaneShadow> lanes;  // where lanes of a warp are checked against each other
  std::vector<Count> counts;
  std::string printed;                   // by the CTA that runs
  std::vector<const Allocation*> hints;  // by instruction: where it last was
  Cta cta;
};

// warp.cpp: runs until the warp waits or ends.
void run_warp(Warp& w);
// cta.cpp: runs one CTA to its end; throws Fault, after which `worker.cta` says where.
void run_cta(Worker& worker, int64_t linear, int64_t position);
void arrive_at_barrier(Warp& w, const Instr& in, uint32_t mask);

// What the lanes of `mask`, which is not empty, touch in shared or else global memory. `which`: 1
// for the second place that an instruction touches.
inline Accesses accesses_of(Warp& w, const Instr& in, uint32_t mask, const uint64_t* address,
                            int bytes, bool shared, int which = 0) {
  const size_t slot = static_cast<size_t>(in.slot + which) * w.cta->warps.size();
  return {w.worker->patterns->find(slot + static_cast<size_t>(w.id), mask, address, bytes, shared),
          address};
}

// Lanes of a mask, lowest first: for_lanes(mask, [&](int lane) {...}).
template <class F>
inline void for_lanes(uint32_t mask, const F& f) {
  while (mask != 0) {
    f(__builtin_ctz(mask));
    mask &= mask - 1;
  }
}

// The lanes of `mask` wait for each other.
inline void meet(Warp& w, uint32_t mask) {
  if (w.worker->lanes != nullptr) w.worker->lanes->meet(w, mask);
}

inline int bit_count(uint32_t v) {
  v -= (v >> 1) & 0x55555555u;
  v = (v & 0x33333333u) + ((v >> 2) & 0x33333333u);
  return static_cast<int>((((v + (v >> 4)) & 0x0f0f0f0fu) * 0x01010101u) >> 24);
}

}  // namespace emulator
}  // namespace llmkern
