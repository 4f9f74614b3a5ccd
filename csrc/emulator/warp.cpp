// A warp's loop. Lanes that are at one place form a group; while there is one group, instructions
// run back to back. With several, the group with the lowest place goes first, one instruction at a
// time, and groups that meet become one: code after a branch is reached together. Every so often
// the highest runs for a while, so a lane that spins on a lock lets the lock's owner on.
#include <algorithm>

#include "machine.h"
#include "poison.h"

namespace llmkern {
namespace emulator {
namespace {

constexpr uint64_t kSlice = 200000;       // instructions before other warps get a turn
constexpr uint64_t kLowestFirst = 20000;  // divergent instructions of the lowest group ...
constexpr uint64_t kHighestFirst = 2000;  // ... then so many of the highest

std::string lanes_text(uint32_t mask) {
  std::string text;
  for (int lane = 0; lane < kLanes; ++lane) {
    if ((mask >> lane & 1) == 0) continue;
    int last = lane;
    while (last + 1 < kLanes && (mask >> (last + 1) & 1) != 0) ++last;
    text += (text.empty() ? "" : ",") + std::to_string(lane);
    if (last > lane) text += "-" + std::to_string(last);
    lane = last;
  }
  return text;
}

inline uint32_t guarded(const Warp& w, const Instr& in, uint32_t mask) {
  if (in.guard == kNoRegister) return mask;
  const uint32_t p = w.predicate(in.guard);
  return mask & (in.guard_negated ? ~p : p);
}

inline void count(Warp& w, const Instr& in, uint32_t exec) {
  Count& c = w.worker->counts[static_cast<size_t>(in.index)];
  ++c.runs;
  if (exec == kAllLanes) {
    ++c.full_runs;
  } else {
    c.lanes += static_cast<uint64_t>(bit_count(exec));
  }
}

// Lanes that must be here before the instruction can run.
uint32_t needed_lanes(Warp& w, const Instr& in, uint32_t exec) {
  if (in.kind != Kind::kCollective) return w.alive;
  if ((in.all_members & exec) == exec && in.all_members != 0) return in.all_members & w.alive;
  const uint32_t* members = w.at<uint32_t>(in.r[in.member]);
  const uint32_t all = members[__builtin_ctz(exec)];
  if (!w.options->collectives) return all & w.alive;
  for_lanes(exec, [&](int lane) {
    if (members[lane] != all) {
      throw Fault{"divergent collective", "lanes give different member masks", lane, -1};
    }
    if ((all >> lane & 1) == 0) {
      throw Fault{"divergent collective",
                  "the lane is not in its own member mask (lanes " + lanes_text(all) + ")", lane,
                  -1};
    }
  });
  return all & w.alive;
}

[[noreturn]] void fail_divergent(Warp& w, const Group& g, uint32_t exec, uint32_t missing) {
  const Instr& in = w.launch->kernel->code[static_cast<size_t>(g.pc)];
  Fault fault;
  fault.check = in.kind == Kind::kBarrier ? "divergent barrier" : "divergent collective";
  fault.message =
      "lanes " + lanes_text(exec) + " are here, lanes " + lanes_text(missing) + " are not";
  fault.lane = exec == 0 ? -1 : __builtin_ctz(exec);
  for (const Group& other : w.groups) {
    if ((other.mask & missing) != 0 && other.pc != g.pc) fault.other = other.pc;
  }
  w.pc = g.pc;
  throw fault;
}

void set_group(Warp& w, size_t i, int32_t pc) {
  w.groups[i].pc = pc;
  w.groups[i].parked = false;
}

void split(Warp& w, size_t i, uint32_t taken, int32_t target) {
  w.groups[i].mask &= ~taken;
  w.groups.push_back({target, taken, false});
}

void branch(Warp& w, const Instr& in, size_t i, uint32_t exec) {
  const uint32_t mask = w.groups[i].mask;
  if (in.uniform && exec != 0 && exec != mask) {
    throw Fault{"divergent branch", "bra.uni is taken by lanes " + lanes_text(exec) + " only",
                __builtin_ctz(exec), -1};
  }
  set_group(w, i, exec == mask ? in.target : in.index + 1);
  if (exec != 0 && exec != mask) split(w, i, exec, in.target);
}

void branch_by_table(Warp& w, const Instr& in, size_t i, uint32_t exec) {
  const auto& table = w.launch->kernel->branch_tables[static_cast<size_t>(in.target)];
  const uint32_t* index = w.at<uint32_t>(in.r[0]);
  set_group(w, i, in.index + 1);
  while (exec != 0) {
    const int lane = __builtin_ctz(exec);
    if (index[lane] >= table.size()) {
      throw Fault{"bad branch",
                  "brx.idx with index " + std::to_string(index[lane]) + " of " +
                      std::to_string(table.size()) + " targets",
                  lane, -1};
    }
    uint32_t same = 0;
    for_lanes(exec, [&](int l) { same |= uint32_t{index[l] == index[lane]} << l; });
    exec &= ~same;
    split(w, i, same, table[index[lane]]);
  }
}

void exit_lanes(Warp& w, const Instr& in, size_t i, uint32_t exec) {
  w.alive &= ~exec;
  w.groups[i].mask &= ~exec;
  set_group(w, i, in.index + 1);
  if (w.alive == 0) w.state = Warp::kDone;
}

// Runs what is not a plain lane instruction for group i. False: the group was parked.
bool control(Warp& w, const Instr& in, size_t i, uint32_t exec) {
  if (in.tracked >= 0 && in.untracked == nullptr) check_guard(w, in);
  switch (in.kind) {
    case Kind::kBranch:
      branch(w, in, i, exec);
      return true;
    case Kind::kBranchTable:
      branch_by_table(w, in, i, exec);
      return true;
    case Kind::kExit:
      exit_lanes(w, in, i, exec);
      return true;
    default:
      break;
  }
  if (exec == 0) {
    set_group(w, i, in.index + 1);
    return true;
  }
  const uint32_t needed =
      exec == kAllLanes && in.kind != Kind::kCollective ? exec : needed_lanes(w, in, exec);
  if ((exec & needed) != needed && !w.forced) {
    if (w.groups.size() > 1) {
      w.groups[i].parked = true;
      return false;
    }
    if (w.options->collectives) fail_divergent(w, w.groups[i], exec, needed & ~exec);
  }
  w.forced = false;
  meet(w, exec);
  if (in.kind == Kind::kBarrier) {
    set_group(w, i, in.index + 1);
    arrive_at_barrier(w, in, exec);
    return true;
  }
  in.run(w, in, exec);
  meet(w, exec);
  set_group(w, i, in.index + 1);
  return true;
}

void drop_empty_and_merge(Warp& w) {
  auto& g = w.groups;
  for (size_t i = 0; i < g.size();) {
    size_t same = i;
    for (size_t j = 0; j < i && same == i; ++j) {
      if (g[j].pc == g[i].pc) same = j;
    }
    if (g[i].mask != 0 && same == i) {
      ++i;
      continue;
    }
    if (same != i && g[i].mask != 0) {
      g[same].mask |= g[i].mask;
      g[same].parked = false;
    }
    g.erase(g.begin() + static_cast<int64_t>(i));
  }
}

size_t pick(Warp& w) {
  const bool highest = w.divergent_steps % (kLowestFirst + kHighestFirst) >= kLowestFirst;
  size_t best = w.groups.size();
  for (size_t i = 0; i < w.groups.size(); ++i) {
    if (w.groups[i].parked) continue;
    const bool first = best == w.groups.size();
    if (first || (w.groups[i].pc > w.groups[best].pc) == highest) best = i;
  }
  if (best < w.groups.size()) return best;
  // Everyone waits for lanes that wait elsewhere.
  const Group& g = w.groups[0];
  if (!w.options->collectives) {
    w.forced = true;
    return 0;
  }
  w.mask = g.mask;
  w.pc = g.pc;
  const Instr& in = w.launch->kernel->code[static_cast<size_t>(g.pc)];
  const uint32_t exec = guarded(w, in, g.mask);
  fail_divergent(w, g, exec, needed_lanes(w, in, exec) & ~exec);
}

void spend(Warp& w) {
  if (++w.steps > w.options->budget) {
    throw Fault{"instruction budget",
                "the warp has run " + std::to_string(w.options->budget) + " instructions", -1, -1};
  }
}

void step_divergent(Warp& w) {
  const size_t i = pick(w);
  const Group g = w.groups[i];
  const Instr& in = w.launch->kernel->code[static_cast<size_t>(g.pc)];
  spend(w);
  ++w.divergent_steps;
  w.pc = g.pc;
  w.mask = g.mask;
  const uint32_t exec = guarded(w, in, g.mask);
  if (in.kind == Kind::kLane) {
    if (exec != 0) in.run(w, in, exec);
    set_group(w, i, g.pc + 1);
    count(w, in, exec);
  } else if (control(w, in, i, exec)) {
    count(w, in, exec);
  }
  drop_empty_and_merge(w);
  // Lanes that were missing may have exited.
  if (in.kind == Kind::kExit) {
    for (Group& other : w.groups) other.parked = false;
  }
}

// One group: until it splits, waits or ends, or the slice is over.
void run_converged(Warp& w, uint64_t slice_end) {
  const Instr* code = w.launch->kernel->code.data();
  int32_t pc = w.groups[0].pc;
  const uint32_t mask = w.groups[0].mask;
  w.mask = mask;
  for (;;) {
    const Instr& in = code[pc];
    w.pc = pc;
    if (++w.steps >= slice_end) {
      --w.steps;
      spend(w);
      if (w.steps >= slice_end) slice_end = 0;
    }
    const uint32_t exec = guarded(w, in, mask);
    count(w, in, exec);
    if (in.kind == Kind::kLane) {
      if (exec != 0) in.run(w, in, exec);
      ++pc;
      if (slice_end != 0) continue;
      w.groups[0].pc = pc;
      return;
    }
    w.groups[0].pc = pc;
    control(w, in, 0, exec);
    pc = w.groups[0].pc;
    if (w.state != Warp::kReady || w.groups.size() > 1 || w.groups[0].mask != mask ||
        slice_end == 0) {
      drop_empty_and_merge(w);
      return;
    }
  }
}

}  // namespace

void run_warp(Warp& w) {
  const uint64_t slice_end = w.steps + kSlice;
  while (w.state == Warp::kReady && w.steps < slice_end) {
    if (w.groups.size() == 1) {
      run_converged(w, slice_end);
    } else {
      step_divergent(w);
    }
  }
}

}  // namespace emulator
}  // namespace llmkern
