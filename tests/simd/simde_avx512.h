// Makes vec.h choose its AVX-512 form on a CPU without AVX-512: SIMDe's functions stand in for the
// intrinsics. The feature macros come after SIMDe, which would otherwise use the real ones.
#pragma once

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>

#define __AVX512F__ 1
#define __AVX512BW__ 1
#define __AVX512VL__ 1
#define __AVX512DQ__ 1
