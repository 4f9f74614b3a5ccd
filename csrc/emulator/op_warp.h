#pragma once

#include "machine.h"

namespace llmkern {
namespace emulator {

// The lane that each lane of a shfl reads.
void shuffle_sources(Warp& w, const Instr& in, uint32_t mask, uint8_t* from);

}  // namespace emulator
}  // namespace llmkern
