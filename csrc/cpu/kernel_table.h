// One function pointer per kernel, one table per instruction set. The table in use is chosen once.
#pragma once

#include "kernel_list.h"

namespace llmkern {

struct KernelTable {
  const char* isa;
#define LLMKERN_POINTER(name, Args) void (*name)(const Args&);
  LLMKERN_CPU_KERNELS(LLMKERN_POINTER)
#undef LLMKERN_POINTER
};

// The tables that this build has and this CPU can run, best first.
int usable_tables(const KernelTable** tables, int capacity);

}  // namespace llmkern
