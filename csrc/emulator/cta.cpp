// A CTA: its warps in turn until each waits or ends, barriers between them.
#include <algorithm>
#include <cstring>

#include "machine.h"
#include "random_order.h"

namespace llmkern {
namespace emulator {
namespace {

// Registers of a warp start 64-byte aligned.
size_t register_stride(const Kernel& k) { return (k.register_image.size() + 63) / 64 * 64; }

void fill(Warp& w, const Kernel& k, Special which, uint32_t value) {
  if (k.special[which] == kNoRegister) return;
  uint32_t* lanes = w.at<uint32_t>(k.special[which]);
  std::fill(lanes, lanes + kLanes, value);
}

// What stays the same for all CTAs of a launch.
void set_special_registers(Warp& w, const Launch& launch) {
  const Kernel& k = *launch.kernel;
  for (int i = 0; i < 3; ++i) {
    fill(w, k, static_cast<Special>(kNtidX + i), launch.block[i]);
    fill(w, k, static_cast<Special>(kNctaX + i), launch.grid[i]);
  }
  fill(w, k, kWarpId, static_cast<uint32_t>(w.id));
  fill(w, k, kNwarpId, static_cast<uint32_t>(launch.warps()));
  fill(w, k, kSmId, 0);
  fill(w, k, kNsmId, 1);
  fill(w, k, kGridId, 0);
  fill(w, k, kDynamicShared, static_cast<uint32_t>(launch.dynamic_shared));
  fill(w, k, kTotalShared, static_cast<uint32_t>(launch.shared_bytes()));
  for (int lane = 0; lane < kLanes; ++lane) {
    const uint32_t thread = static_cast<uint32_t>(w.id * kLanes + lane);
    const uint32_t bit = 1u << lane;
    const std::pair<Special, uint32_t> values[] = {
        {kTidX, thread % launch.block[0]},
        {kTidY, thread / launch.block[0] % launch.block[1]},
        {kTidZ, thread / launch.block[0] / launch.block[1]},
        {kLaneId, static_cast<uint32_t>(lane)},
        {kEqMask, bit},
        {kLtMask, bit - 1},
        {kLeMask, bit | (bit - 1)},
        {kGtMask, ~(bit | (bit - 1))},
        {kGeMask, ~(bit - 1)},
    };
    for (const auto& v : values) {
      if (k.special[v.first] != kNoRegister) w.at<uint32_t>(k.special[v.first])[lane] = v.second;
    }
  }
}

// Once for all CTAs of a launch on this worker.
void make_warp(Worker& worker, Warp& w, int id) {
  const Launch& launch = *worker.launch;
  const Kernel& k = *launch.kernel;
  const auto i = static_cast<size_t>(id);
  w.id = id;
  w.regs = worker.registers.data() + register_stride(k) * i;
  w.regs += (64 - reinterpret_cast<uintptr_t>(worker.registers.data()) % 64) % 64;
  w.shared = worker.shared.data();
  w.local = worker.local.data() + static_cast<size_t>(k.local_bytes) * kLanes * i;
  w.poison = worker.poison.data() + static_cast<size_t>(k.poison_slots) * i;
  w.cta = &worker.cta;
  w.worker = &worker;
  w.launch = &launch;
  w.options = &launch.options;
  set_special_registers(w, launch);
}

void start_warp(Worker& worker, Warp& w) {
  const Launch& launch = *worker.launch;
  const Kernel& k = *launch.kernel;
  std::fill(w.poison, w.poison + k.poison_slots, kAllLanes);
  w.state = Warp::kReady;
  const int threads = launch.threads() - w.id * kLanes;
  w.alive = threads >= kLanes ? kAllLanes : (1u << threads) - 1;
  w.groups.assign(1, {0, w.alive, false});
  w.steps = w.divergent_steps = 0;
  w.under_way = 0;
  std::fill(w.committed, w.committed + kLanes, 0u);
  w.epoch = worker.shadow.epoch();
  std::fill(w.seen, w.seen + kMaxWarps, w.epoch - 1);
  w.seen[w.id] = w.epoch;
  w.all_seen = w.epoch - 1;
  for (int i = 0; i < 3; ++i) fill(w, k, static_cast<Special>(kCtaX + i), worker.cta.id[i]);
}

uint32_t living_warps(const Cta& cta) {
  uint32_t mask = 0;
  for (const Warp& w : cta.warps) mask |= uint32_t{w.state != Warp::kDone} << w.id;
  return mask;
}

void write_votes(Warp& w, const Barrier& b) {
  const Instr& in = w.launch->kernel->code[static_cast<size_t>(w.barrier_pc)];
  if (in.destinations == 0) return;
  const uint32_t lanes = w.groups[0].mask;
  if (in.mode == 0) {
    for_lanes(lanes, [&](int lane) { w.at<uint32_t>(in.r[0])[lane] = b.votes_count; });
  } else {
    uint32_t* p = w.at<uint32_t>(in.r[0]);
    const bool vote = in.mode == 1 ? b.votes_and != 0 : b.votes_or != 0;
    *p = vote ? *p | lanes : *p & ~lanes;
  }
}

// Everyone has come: what the warps had done is now before what the waiting ones will do.
void release(Worker& worker, Barrier& b) {
  Cta& cta = worker.cta;
  const uint32_t epoch = worker.shadow.next_epoch();
  GlobalOrder* order = worker.launch->order.get();
  const auto index = static_cast<int>(&b - cta.barriers);
  for_lanes(b.waiting, [&](int i) {
    Warp& w = cta.warps[static_cast<size_t>(i)];
    for (int j = 0; j < kMaxWarps; ++j) w.seen[j] = std::max(w.seen[j], b.seen[j]);
    if (order != nullptr) order->leave(w, index);
    write_votes(w, b);
    w.state = Warp::kReady;
    w.epoch = epoch;
    w.seen[i] = epoch;
    w.all_seen = *std::min_element(w.seen, w.seen + cta.warps.size());
  });
  b = Barrier();
  if (order != nullptr) order->end_barrier(index);
}

bool complete(const Cta& cta, const Barrier& b) {
  if (b.joined == 0) return false;
  if (b.expected != 0) return b.arrived >= b.expected;
  return (living_warps(cta) & ~b.joined) == 0;
}

void release_complete_barriers(Worker& worker) {
  for (Barrier& b : worker.cta.barriers) {
    if (complete(worker.cta, b)) release(worker, b);
  }
}

[[noreturn]] void fail_deadlock(Worker& worker) {
  std::string text = "every warp waits:";
  Warp* first = nullptr;
  for (Warp& w : worker.cta.warps) {
    if (w.state != Warp::kAtBarrier) continue;
    const Barrier& b = worker.cta.barriers[w.barrier];
    text += " warp " + std::to_string(w.id) + " at barrier " + std::to_string(w.barrier) +
            " (PTX line " +
            std::to_string(w.launch->kernel->code[static_cast<size_t>(w.barrier_pc)].place.line) +
            ", " + std::to_string(b.arrived) + " threads have come" +
            (b.expected != 0 ? " of " + std::to_string(b.expected) : "") + ");";
    if (first == nullptr) first = &w;
  }
  text.back() = '.';
  first->pc = first->barrier_pc;
  worker.cta.current = first->id;
  throw Fault{"barrier deadlock", text, -1, -1};
}

}  // namespace

void arrive_at_barrier(Warp& w, const Instr& in, uint32_t mask) {
  // r: [result,] barrier, count, [predicate]; mode as in write_votes; imm 1: arrive only.
  const int lane = __builtin_ctz(mask);
  const uint32_t id = w.at<uint32_t>(in.r[in.destinations])[lane];
  const uint32_t expected = w.at<uint32_t>(in.r[in.destinations + 1])[lane];
  if (id >= 16) throw Fault{"bad barrier", "barrier " + std::to_string(id) + " of 16", lane, -1};
  if (expected % kLanes != 0) {
    throw Fault{"bad barrier",
                "a count of " + std::to_string(expected) + " threads is no multiple of 32", lane,
                -1};
  }
  Barrier& b = w.cta->barriers[id];
  if (b.joined != 0 && b.expected != static_cast<int>(expected)) {
    throw Fault{"bad barrier",
                "barrier " + std::to_string(id) + " is used with counts " +
                    std::to_string(b.expected) + " and " + std::to_string(expected),
                lane, -1};
  }
  if ((b.joined >> w.id & 1) != 0) {
    throw Fault{"bad barrier", "the warp comes twice to barrier " + std::to_string(id), lane, -1};
  }
  b.expected = static_cast<int>(expected);
  b.arrived += kLanes;
  b.joined |= 1u << w.id;
  for (int j = 0; j < kMaxWarps; ++j) b.seen[j] = std::max(b.seen[j], w.seen[j]);
  if (in.destinations != 0) {
    const uint32_t p = w.predicate(in.r[in.destinations + 2]);
    const uint32_t votes = p & mask;
    b.votes_and = votes == mask ? b.votes_and : 0;
    b.votes_or |= votes;
    b.votes_count += static_cast<uint32_t>(bit_count(votes));
  }
  if (w.launch->order != nullptr) w.launch->order->arrive(w, static_cast<int>(id));
  if (in.imm == 0) {
    b.waiting |= 1u << w.id;
    w.barrier = static_cast<int>(id);
    w.barrier_pc = in.index;
    w.state = Warp::kAtBarrier;
  } else {
    // What it does from here on is not covered by this barrier.
    w.epoch = w.worker->shadow.next_epoch();
    w.seen[w.id] = w.epoch;
  }
}

void run_cta(Worker& worker, int64_t linear, int64_t position) {
  const Launch& launch = *worker.launch;
  Cta& cta = worker.cta;
  cta.position = position;
  cta.id[0] = static_cast<uint32_t>(linear % launch.grid[0]);
  cta.id[1] = static_cast<uint32_t>(linear / launch.grid[0] % launch.grid[1]);
  cta.id[2] = static_cast<uint32_t>(linear / launch.grid[0] / launch.grid[1]);
  worker.shadow.begin_cta(launch.shared_bytes());
  const int warps = launch.warps();
  if (launch.order != nullptr) launch.order->begin_cta();
  if (worker.lanes != nullptr) worker.lanes->begin_cta(launch.shared_bytes(), warps);
  if (cta.warps.empty()) {
    cta.warps.resize(static_cast<size_t>(warps));
    for (int i = 0; i < warps; ++i) make_warp(worker, cta.warps[static_cast<size_t>(i)], i);
  }
  for (Warp& w : cta.warps) start_warp(worker, w);
  for (Barrier& b : cta.barriers) b = Barrier();
  std::vector<int> order(static_cast<size_t>(warps));
  for (int i = 0; i < warps; ++i) order[static_cast<size_t>(i)] = i;
  Shuffler shuffle(
      launch.options.seed == 0 ? 0 : launch.options.seed * 1000003 + static_cast<uint64_t>(linear));
  for (;;) {
    shuffle(&order);
    for (int i : order) {
      Warp& w = cta.warps[static_cast<size_t>(i)];
      if (w.state != Warp::kReady) continue;
      cta.current = i;
      run_warp(w);
    }
    if (living_warps(cta) == 0) return;
    release_complete_barriers(worker);
    const bool ready = std::any_of(cta.warps.begin(), cta.warps.end(),
                                   [](const Warp& w) { return w.state == Warp::kReady; });
    if (!ready) fail_deadlock(worker);
  }
}

}  // namespace emulator
}  // namespace llmkern
