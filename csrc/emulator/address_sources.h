// Which pointers of a launch an instruction's address may come from, so that reads of memory that
// the kernel never stores to need not be followed. Found at load by joining, through all
// instructions, the 64-bit parameters that each register was computed from.
#pragma once

#include "machine.h"

namespace llmkern {
namespace emulator {

// Sets Kernel::pointers and Instr::sources.
void find_address_sources(Kernel* kernel);
// By instruction: whether it reads global memory that the launch may store to.
std::vector<uint8_t> reads_of_stored_memory(const Launch& launch);

}  // namespace emulator
}  // namespace llmkern
