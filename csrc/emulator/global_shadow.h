// Plain stores of different CTAs to one element: a race unless they store the same value, or the
// kernel orders them by atomics. Found after the launch or at the later CTA, whatever the order in
// which host threads ran them: the record of an element is always the earliest CTA's.
#pragma once

#include "machine.h"

namespace llmkern {
namespace emulator {

void record_global_stores(Warp& w, const Instr& in, uint32_t mask, const uint64_t* address,
                          int bytes, const char* data, int stride);

}  // namespace emulator
}  // namespace llmkern
