#include "poison.h"

#include <unordered_map>

#include "machine.h"
#include "op_warp.h"

namespace llmkern {
namespace emulator {
namespace {

using Bits = std::vector<uint64_t>;

bool has(const Bits& b, int i) { return (b[static_cast<size_t>(i) / 64] >> (i % 64) & 1) != 0; }
void add(Bits* b, int i) { (*b)[static_cast<size_t>(i) / 64] |= uint64_t{1} << (i % 64); }

// Forward data flow: which registers are surely set where each instruction begins.
class Analysis {
 public:
  explicit Analysis(Kernel* kernel) : k_(*kernel), words_((kernel->registers.size() + 63) / 64) {
    for (size_t i = 0; i < k_.registers.size(); ++i)
      ids_[k_.registers[i].offset] = static_cast<int>(i);
  }

  void run() {
    find_leaders();
    solve();
    collect_unset();
    spread();
    mark();
  }

 private:
  int id(uint32_t offset) const {
    const auto found = ids_.find(offset);
    return found == ids_.end() ? -1 : found->second;
  }

  size_t size() const { return k_.code.size(); }

  template <class F>
  void successors(size_t i, const F& f) const {
    const Instr& in = k_.code[i];
    const bool guarded = in.guard != kNoRegister;
    if (in.kind == Kind::kBranch) f(static_cast<size_t>(in.target));
    if (in.kind == Kind::kBranchTable) {
      for (int32_t t : k_.branch_tables[static_cast<size_t>(in.target)]) f(static_cast<size_t>(t));
    }
    const bool leaves =
        in.kind == Kind::kBranch || in.kind == Kind::kBranchTable || in.kind == Kind::kExit;
    if ((!leaves || guarded) && i + 1 < size()) f(i + 1);
  }

  void find_leaders() {
    leader_.assign(size(), false);
    leader_[0] = true;
    for (size_t i = 0; i < size(); ++i) {
      const Kind kind = k_.code[i].kind;
      if (kind != Kind::kBranch && kind != Kind::kBranchTable && kind != Kind::kExit) continue;
      successors(i, [&](size_t to) { leader_[to] = true; });
      if (i + 1 < size()) leader_[i + 1] = true;
    }
  }

  void transfer(const Instr& in, Bits* set) const {
    if (in.guard != kNoRegister) return;
    for (int o = 0; o < in.destinations; ++o) {
      const int r = id(in.r[o]);
      if (r >= 0) add(set, r);
    }
  }

  // Blocks start with everything set but for the entry; sets only shrink.
  void solve() {
    at_leader_.assign(size(), Bits());
    for (size_t i = 0; i < size(); ++i) {
      if (leader_[i]) at_leader_[i].assign(words_, i == 0 ? 0 : ~uint64_t{0});
    }
    std::vector<size_t> work = {0};
    std::vector<bool> visited(size(), false);
    while (!work.empty()) {
      size_t i = work.back();
      work.pop_back();
      visited[i] = true;
      Bits set = at_leader_[i];
      for (;; ++i) {
        transfer(k_.code[i], &set);
        if (i + 1 < size() && !leader_[i + 1]) continue;
        break;
      }
      successors(i, [&](size_t to) {
        bool changed = !visited[to];
        for (size_t b = 0; b < words_; ++b) {
          const uint64_t met = at_leader_[to][b] & set[b];
          changed = changed || met != at_leader_[to][b];
          at_leader_[to][b] = met;
        }
        if (changed) work.push_back(to);
      });
    }
    reached_ = visited;
  }

  void collect_unset() {
    poison_.assign(words_, 0);
    Bits set;
    bool live = false;
    for (size_t i = 0; i < size(); ++i) {
      if (leader_[i]) {
        set = at_leader_[i];
        live = reached_[i];
      }
      const Instr& in = k_.code[i];
      const auto read = [&](uint32_t offset) {
        const int r = offset == kNoRegister ? -1 : id(offset);
        if (r >= 0 && live && !has(set, r)) add(&poison_, r);
      };
      read(in.guard);
      for (int o = in.destinations; o < in.operands; ++o) read(in.r[o]);
      transfer(in, &set);
    }
  }

  bool reads_poison(const Instr& in) const {
    for (int o = in.destinations; o < in.operands; ++o) {
      const int r = id(in.r[o]);
      if (r >= 0 && has(poison_, r)) return true;
    }
    return false;
  }

  static bool loads(const Instr& in) {
    return in.klass == Class::kGlobalLoad || in.klass == Class::kSharedLoad ||
           in.klass == Class::kLocal || in.klass == Class::kParam || in.klass == Class::kAtomic ||
           in.klass == Class::kMatrixLoad;
  }

  // Results of poisoned operands; what comes from memory is clean.
  void spread() {
    for (bool changed = true; changed;) {
      changed = false;
      for (const Instr& in : k_.code) {
        if (loads(in) || !reads_poison(in)) continue;
        for (int o = 0; o < in.destinations; ++o) {
          const int r = id(in.r[o]);
          if (r < 0 || has(poison_, r)) continue;
          add(&poison_, r);
          changed = true;
        }
      }
    }
  }

  void mark() {
    std::vector<int> slot(k_.registers.size(), -1);
    for (size_t r = 0; r < slot.size(); ++r) {
      if (has(poison_, static_cast<int>(r))) slot[r] = k_.poison_slots++;
    }
    if (k_.poison_slots == 0) return;
    const auto slot_of = [&](uint32_t offset) {
      const int r = offset == kNoRegister ? -1 : id(offset);
      return r < 0 ? -1 : slot[static_cast<size_t>(r)];
    };
    for (Instr& in : k_.code) {
      Tracked t;
      t.guard = slot_of(in.guard);
      bool any = t.guard >= 0;
      for (int o = 0; o < in.operands; ++o) {
        t.operand[o] = slot_of(in.r[o]);
        any = any || t.operand[o] >= 0;
      }
      if (!any) continue;
      in.tracked = static_cast<int32_t>(k_.tracked.size());
      k_.tracked.push_back(t);
      if (in.run == nullptr) continue;
      in.untracked = in.run;
      in.run = &run_tracked;
    }
  }

  Kernel& k_;
  size_t words_;
  std::unordered_map<uint32_t, int> ids_;
  std::vector<bool> leader_, reached_;
  std::vector<Bits> at_leader_;
  Bits poison_;
};

std::string register_at(const Kernel& k, uint32_t offset) {
  for (const RegisterName& r : k.registers) {
    if (r.offset == offset) return r.name;
  }
  return "a register";
}

[[noreturn]] void fail(Warp& w, uint32_t offset, uint32_t lanes, const char* what) {
  throw Fault{"unset register",
              register_at(*w.launch->kernel, offset) + " was never set and " + what,
              __builtin_ctz(lanes), -1};
}

// Lanes of the result that are unset.
uint32_t result_poison(Warp& w, const Instr& in, const Tracked& t, uint32_t mask) {
  const auto poison = [&](int o) { return t.operand[o] < 0 ? 0u : w.poison[t.operand[o]]; };
  const int s = in.destinations;
  if (in.track == Track::kSelect) {
    const uint32_t p = w.predicate(in.r[s + 2]);
    return (p & poison(s)) | (~p & poison(s + 1)) | poison(s + 2);
  }
  if (in.track == Track::kAnd || in.track == Track::kOr) {
    const uint32_t flip = in.track == Track::kAnd ? 0 : kAllLanes;
    const uint32_t a = w.predicate(in.r[s]) ^ flip, b = w.predicate(in.r[s + 1]) ^ flip;
    const uint32_t decided = (~a & ~poison(s)) | (~b & ~poison(s + 1));
    return (poison(s) | poison(s + 1)) & ~decided;
  }
  if (in.track == Track::kShuffle) {
    uint8_t from[kLanes];
    shuffle_sources(w, in, mask, from);
    uint32_t moved = 0;
    for_lanes(mask, [&](int l) { moved |= (poison(s) >> from[l] & 1) << l; });
    return moved | poison(s + 1) | poison(s + 2);
  }
  if (in.track == Track::kPart) {
    uint32_t all = kAllLanes;
    for (int o = s; o < in.operands; ++o) all &= poison(o);
    return all;
  }
  uint32_t any = 0;
  for (int o = s; o < in.operands; ++o) any |= poison(o);
  const bool whole_warp = in.kind != Kind::kLane;
  return whole_warp && (any & mask) != 0 ? kAllLanes : any;
}

bool has_address(const Instr& in) {
  return in.klass == Class::kGlobalLoad || in.klass == Class::kGlobalStore ||
         in.klass == Class::kSharedLoad || in.klass == Class::kSharedStore ||
         in.klass == Class::kLocal || in.klass == Class::kAtomic ||
         in.klass == Class::kMatrixLoad || in.klass == Class::kAsyncCopy;
}

}  // namespace

void find_unset_registers(Kernel* kernel) { Analysis(kernel).run(); }

void check_guard(Warp& w, const Instr& in) {
  const Tracked& t = w.launch->kernel->tracked[static_cast<size_t>(in.tracked)];
  if (t.guard < 0 || !w.options->uninitialised) return;
  const uint32_t unset = w.poison[t.guard] & w.mask;
  if (unset != 0) fail(w, in.guard, unset, "decides what runs");
}

void run_tracked(Warp& w, const Instr& in, uint32_t mask) {
  if (!w.options->uninitialised) return in.untracked(w, in, mask);
  const Tracked& t = w.launch->kernel->tracked[static_cast<size_t>(in.tracked)];
  check_guard(w, in);
  for (int o = in.destinations; o < in.operands; ++o) {
    const uint32_t unset = t.operand[o] < 0 ? 0 : w.poison[t.operand[o]] & mask;
    if (unset == 0) continue;
    if (has_address(in) && o == in.address) fail(w, in.r[o], unset, "is an address");
    if (in.klass == Class::kGlobalStore || in.klass == Class::kAtomic)
      fail(w, in.r[o], unset, "is stored to global memory");
  }
  const uint32_t poison = result_poison(w, in, t, mask);
  in.untracked(w, in, mask);
  const bool from_memory = has_address(in) && in.destinations > 0;
  for (int o = 0; o < in.destinations; ++o) {
    if (t.operand[o] < 0) continue;
    uint32_t& slot = w.poison[t.operand[o]];
    slot = (slot & ~mask) | (from_memory ? 0 : poison & mask);
  }
}

}  // namespace emulator
}  // namespace llmkern
