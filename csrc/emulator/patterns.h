// What the lanes of a warp touch with one instruction. Where lanes lie relative to each other is
// mostly the same from one run of an instruction to the next, a loop's tile or another CTA apart:
// what follows from it alone is worked out once, and found again by comparing addresses.
#pragma once

#include <cstdint>
#include <memory>
#include <unordered_map>
#include <vector>

#include "ir.h"

namespace llmkern {
namespace emulator {

constexpr int kGranuleBytes = 16;  // what shadows of shared memory look at together
constexpr int kMostGranules = 2 * kLanes;

struct Pattern {
  uint32_t mask = 0;
  int first = 0;                   // lane
  int bytes = 0;                   // of a lane
  uint32_t low = 0;                // bits of the first lane's address that things depend on
  bool shared = false;             // else granules and apart are not filled in
  bool kept = false;               // for the whole launch
  uint64_t relative[kLanes] = {};  // to the first lane's address
  uint64_t lowest = 0, highest = 0;
  bool aligned = false;  // to `bytes`
  bool row = false;      // all lanes, each begins where the one before it ends
  bool apart = false;    // no two lanes touch one byte
  // Granules that are touched, ascending, relative to the first lane's.
  int granules = 0;
  bool dense = false;  // one after the other, the whole of each
  int16_t granule[kMostGranules];
  uint16_t touched[kMostGranules];  // bytes of each
  uint8_t units[kMostGranules];     // and which of its 2-byte units
  // For the counters: bytes by all lanes, sectors of global or wavefronts of shared memory.
  uint32_t total = 0, passes = 0, ideal = 0;
};

struct Accesses {
  const Pattern& pattern;
  const uint64_t* address;  // by lane
  uint64_t base;            // the first lane's
  uint32_t mask;
  int bytes;

  Accesses(const Pattern& p, const uint64_t* address)
      : pattern(p), address(address), base(address[p.first]), mask(p.mask), bytes(p.bytes) {}
  uint32_t first_granule() const { return static_cast<uint32_t>(base / kGranuleBytes); }
  // Whether an address is the lowest, and the highest, of all: addresses do not wrap around.
  uint64_t lowest() const { return base + pattern.lowest; }
  uint64_t highest() const { return base + pattern.highest; }
  bool wraps() const { return lowest() > base || highest() < base; }
};

// Those of one host thread.
class Patterns {
 public:
  // Slots remember the last pattern.
  void begin_launch(size_t slots);
  const Pattern& find(size_t slot, uint32_t mask, const uint64_t* address, int bytes, bool shared) {
    const Pattern* p = slots_[slot];
    if (p != nullptr && p->mask == mask && p->bytes == bytes && p->shared == shared &&
        fits(*p, address))
      return *p;
    return search(slot, mask, address, bytes, shared);
  }

 private:
  static bool fits(const Pattern& p, const uint64_t* address) {
    const uint64_t base = address[p.first];
    uint64_t apart = (base ^ p.low) & kLow;
    if (p.mask == kAllLanes) {
      for (int l = 0; l < kLanes; ++l) apart |= (address[l] - base) ^ p.relative[l];
    } else {
      for (uint32_t left = p.mask; left != 0; left &= left - 1) {
        const int l = __builtin_ctz(left);
        apart |= (address[l] - base) ^ p.relative[l];
      }
    }
    return apart == 0;
  }
  const Pattern& search(size_t slot, uint32_t mask, const uint64_t* address, int bytes,
                        bool shared);

  static constexpr uint64_t kLow = 31;  // a sector, all banks of the widest access
  std::vector<const Pattern*> slots_;
  std::unordered_multimap<uint64_t, std::unique_ptr<Pattern>> known_;  // by hash
  Pattern scratch_[4];  // of launches with more patterns than are kept
  int next_scratch_ = 0;
};

}  // namespace emulator
}  // namespace llmkern
