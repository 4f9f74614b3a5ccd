// Order between CTAs of a kernel that has atomics on global memory (or volatile, relaxed, acquire,
// release accesses). Such CTAs run one after the other, and are ordered by nothing but what they
// hand on through these accesses: a release, or a fence and then an access, leaves at its address
// what its warp knows to have happened; who then reads the address by an acquire, or by a relaxed
// access and then a fence, learns it. Volatile loads and atomics whose order is not written count
// as acquires: code from before ld.acquire has no fence there. What is of .cta scope hands on and
// learns nothing. Plain accesses of two CTAs, or a plain one and an atomic one, are a race if one
// writes and the later CTA does not know of the earlier access. Stores of the same value are
// benign.
//
// An access is known by CTA, warp and that warp's epoch: a warp's epoch changes where it hands on.
#pragma once

#include <array>
#include <deque>
#include <memory>
#include <vector>

#include "ir.h"

namespace llmkern {
namespace emulator {

constexpr int64_t kMostOrderedCtas = 4096;  // what CTAs know of each other takes their square

struct GlobalAccess {
  uint32_t cta;  // position + 1; 0: none
  uint32_t epoch;
  int32_t index;
  int32_t warp;
};

// Of one element; all zero: untouched.
struct OrderRecord {
  GlobalAccess store, read, atomic;
  uint32_t value;    // stored, folded to 32 bits
  uint32_t release;  // index + 1 of what an access here learns
};

enum class GlobalAccessKind { kRead, kStore, kAtomicRead, kAtomicStore, kAtomic };

class GlobalOrder {
 public:
  GlobalOrder(int64_t ctas, int warps)
      : ctas_(static_cast<size_t>(ctas)), warps_(static_cast<size_t>(warps)) {}

  void begin_cta();
  // Barriers hand on what warps know, and what they have fenced.
  void arrive(const Warp& w, int barrier);
  void leave(const Warp& w, int barrier);
  void end_barrier(int barrier) { barrier_[static_cast<size_t>(barrier)] = State(); }
  void fence(const Warp& w);

  // Notes an access to an element; returns the earlier one that it races with, or null. `value`: of
  // kStore.
  const GlobalAccess* touch(const Warp& w, const Instr& in, GlobalAccessKind kind, uint32_t value,
                            OrderRecord* record);
  void learn(const Warp& w, const Instr& in, uint32_t release);
  // What an atomic access hands on: an index + 1, or 0 for nothing. `before`: what the address
  // held, which a read and write in one hands on with its own, acquired or not; else 0.
  uint32_t hand_on(const Warp& w, const Instr& in, uint32_t before);

 private:
  using Epochs = std::vector<uint32_t>;      // by warp
  using Known = std::vector<const Epochs*>;  // by CTA; null: nothing
  using KnownPointer = std::shared_ptr<const Known>;
  struct State {  // of a warp, or gathered at a barrier
    KnownPointer known;
    KnownPointer awaited;  // read by relaxed accesses: known from the next fence on
    std::array<uint32_t, kMaxWarps> seen{}, fenced{};  // epochs of this CTA's warps
    uint32_t handed_on[2] = {};                        // the last release, by kind: see hand_on
    bool changed[2] = {true, true};                    // since then
  };
  struct Release {
    size_t cta;
    const Epochs* epochs;  // null: none of its own
    KnownPointer known;
    bool all;  // all that its CTA's epochs knew is in `known`
  };

  bool knows(const Warp& w, const GlobalAccess& access) const;
  KnownPointer joined(const KnownPointer& a, const KnownPointer& b);
  const Epochs* joined(const Epochs* a, const Epochs* b);
  KnownPointer joined(const Warp& w, const KnownPointer& a, uint32_t release);
  void new_epoch(const Warp& w);
  static void changed(State* state) { state->changed[0] = state->changed[1] = true; }
  State& state(const Warp& w);

  size_t ctas_, warps_;
  uint32_t epoch_ = 0;
  bool gave_up_ = false;
  std::array<State, kMaxWarps> warp_;
  std::array<State, 16> barrier_;
  std::deque<Epochs> epochs_;
  std::vector<Release> releases_;
};

}  // namespace emulator
}  // namespace llmkern
