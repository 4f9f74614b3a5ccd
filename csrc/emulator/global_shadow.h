// Races in global memory between CTAs: an element that one CTA stores and another one stores with
// another value, reads, or touches by an atomic, with nothing that orders the two.
//
// In kernels without atomics nothing orders CTAs. What is kept of an element then is the earliest
// CTA that stored it and the two earliest that read it, so that the race that is reported is the
// same in whatever order host threads ran the CTAs. Kernels with atomics: global_order.h.
#pragma once

#include "machine.h"

namespace llmkern {
namespace emulator {

// Prepares a launch: which reads are followed, whether CTAs may be ordered by atomics.
void prepare_global_races(Launch* launch);

void record_global_reads(Warp& w, const Instr& in, const Accesses& a);
void record_global_stores(Warp& w, const Instr& in, const Accesses& a, const char* data,
                          int stride);
// atom, red, and loads and stores that are volatile, relaxed, acquire or release.
void record_global_atomics(Warp& w, const Instr& in, const Accesses& a, GlobalAccessKind kind);

}  // namespace emulator
}  // namespace llmkern
