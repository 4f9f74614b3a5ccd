// What the lanes of a warp touch with one instruction.
#pragma once

#include "ir.h"

namespace llmkern {
namespace emulator {

struct Accesses {
  Accesses(uint32_t mask, const uint64_t* address, int bytes)
      : mask(mask), bytes(bytes), address(address) {
    if (mask != kAllLanes) return;
    uint64_t apart = 0;
    for (int l = 0; l < kLanes; ++l)
      apart |= address[l] ^ (address[0] + static_cast<uint64_t>(l * bytes));
    row = apart == 0 && address[kLanes - 1] >= address[0];
  }
  Accesses(uint32_t mask, const uint64_t* address, int bytes, bool row)
      : mask(mask), bytes(bytes), row(row), address(address) {}

  uint32_t mask;
  int bytes;               // of a lane
  bool row = false;        // all lanes, each begins where the one before it ends
  const uint64_t* address;  // by lane
};

}  // namespace emulator
}  // namespace llmkern
