// Registers that may be read before they are written.
//
// Reading one is no error in itself: compilers leave lanes unset whose result is thrown away, as in
// `@p ld r; shfl r`. So such lanes are followed as poison: a result is poison where an operand was,
// and it is an error when poison decides a branch or a guard, is an address, or is stored to global
// memory. A data-flow pass at load finds the few instructions that can meet poison at all; the
// others run without any bookkeeping.
#pragma once

#include "ir.h"

namespace llmkern {
namespace emulator {

// Sets Instr::tracked and untracked, Kernel::tracked and poison_slots.
void find_unset_registers(Kernel* kernel);
// A branch or exit whose guard may be unset.
void check_guard(Warp& w, const Instr& in);

// Runs a tracked instruction and carries the poison over.
void run_tracked(Warp& w, const Instr& in, uint32_t mask);

}  // namespace emulator
}  // namespace llmkern
