// From the addresses of a warp's memory instruction to host pointers: bounds and alignment, shadow
// state, counters.
#pragma once

#include "machine.h"

namespace llmkern {
namespace emulator {

// Effective addresses of r[in.address] + imm. Lanes outside the mask hold anything.
void effective_addresses(Warp& w, const Instr& in, uint64_t* address);

// Host pointers for `bytes` at each lane's address in `space`; kGeneric is sorted out by lane.
// `counted`: whether the access shows in the counters.
void resolve_read(Warp& w, const Instr& in, uint32_t mask, Space space, const uint64_t* address,
                  int bytes, char** to);
// `data`: what will be stored, `stride` bytes a lane.
void resolve_write(Warp& w, const Instr& in, uint32_t mask, Space space, const uint64_t* address,
                   int bytes, const char* data, int stride, char** to);
// Read and write in one; no race with other atomics.
void resolve_atomic(Warp& w, const Instr& in, uint32_t mask, Space space, const uint64_t* address,
                    int bytes, char** to);

enum class Access { kRead, kWrite, kAtomic, kAsyncRead };

// Parts that other instructions use.
void check_global(Warp& w, const Instr& in, const Accesses& a, Access access);
void check_shared(Warp& w, const Accesses& a, const char* verb);
void count_global(Warp& w, const Instr& in, const Accesses& a);
void count_shared(Warp& w, const Instr& in, const Accesses& a);

}  // namespace emulator
}  // namespace llmkern
