// Storage types that cross the language boundary. 16-bit floats are bit containers here; the
// conversions live in csrc/cpu/simd, compiled once per instruction set.
#pragma once

#include <cstdint>

namespace llmkern {

enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3 };

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

}  // namespace llmkern
