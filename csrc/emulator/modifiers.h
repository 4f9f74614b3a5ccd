// Modifiers that memory instructions share: ordering, scope, space, caching, in whatever order
// compilers write them.
#pragma once

#include "decode.h"

namespace llmkern {
namespace emulator {

struct MemoryModifiers {
  Space space = Space::kGeneric;
  bool has_space = false, cache_hint = false;
  uint8_t order = 0;  // Instr::order
};

// Takes them up to the first modifier of another kind.
MemoryModifiers take_memory_modifiers(Decoder& d);

}  // namespace emulator
}  // namespace llmkern
