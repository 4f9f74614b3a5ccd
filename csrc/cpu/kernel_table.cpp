// Built with baseline flags: it runs before the CPU's features are known.
#include "kernel_table.h"

namespace llmkern {

#define LLMKERN_DECLARE(name, Args) void name(const Args&);
#define LLMKERN_ENTRY(name, Args) &LLMKERN_SPACE::name,

namespace scalar {
LLMKERN_CPU_KERNELS(LLMKERN_DECLARE)
}
#define LLMKERN_SPACE scalar
static const KernelTable kScalar = {"scalar", LLMKERN_CPU_KERNELS(LLMKERN_ENTRY)};
#undef LLMKERN_SPACE

#if defined(LLMKERN_HAVE_X86)
namespace avx2 {
LLMKERN_CPU_KERNELS(LLMKERN_DECLARE)
}
#define LLMKERN_SPACE avx2
static const KernelTable kAvx2 = {"avx2", LLMKERN_CPU_KERNELS(LLMKERN_ENTRY)};
#undef LLMKERN_SPACE

namespace avx512 {
LLMKERN_CPU_KERNELS(LLMKERN_DECLARE)
}
#define LLMKERN_SPACE avx512
static const KernelTable kAvx512 = {"avx512", LLMKERN_CPU_KERNELS(LLMKERN_ENTRY)};
#undef LLMKERN_SPACE

namespace avx512_bf16 {
LLMKERN_CPU_BF16_KERNELS(LLMKERN_DECLARE)
}
static KernelTable with_bf16(KernelTable table) {
#define LLMKERN_REPLACE(name, Args) table.name = &avx512_bf16::name;
  LLMKERN_CPU_BF16_KERNELS(LLMKERN_REPLACE)
#undef LLMKERN_REPLACE
  table.isa = "avx512_bf16";
  return table;
}
static const KernelTable kAvx512Bf16 = with_bf16(kAvx512);
#endif

int usable_tables(const KernelTable** tables, int capacity) {
  int n = 0;
  const auto add = [&](const KernelTable& t) {
    if (n < capacity) tables[n++] = &t;
  };
#if defined(LLMKERN_HAVE_X86)
  __builtin_cpu_init();
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni"))
    add(kAvx512Bf16);
  if (avx512) add(kAvx512);
  // Every CPU with AVX2 and FMA has F16C; GCC before 13 has no name to ask for it by.
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) add(kAvx2);
#endif
  add(kScalar);
  return n;
}

}  // namespace llmkern
