// What the machine can do at most: multiply-adds from registers, and bytes moved between memory and
// registers. The benchmark harness holds kernels against these. Callers time the call.
#pragma once

#include "llmkern/dtype.h"

namespace llmkern {

// Independent multiply-add chains. The unit starts 2 a cycle, each takes 4 cycles: 8 would do; 12
// leave slack and still fit 16 registers with both operands.
constexpr int kProbeChains = 12;
constexpr int kProbeMaxLanes = 16;

// flops receives what all threads did together; 0 where the instruction set has no such unit.
// kFloat32, kFloat64: fused multiply-add. kBFloat16: dot product of pairs into float.
struct ProbeFmaArgs {
  DType dtype;
  int64_t iterations;
  void* values;  // kProbeChains * kProbeMaxLanes of float or double, per thread; read and written
  int64_t* flops;
};

enum class ProbeMove : int {
  kRead = 0,
  kCopy = 1,
  kCopyStream = 2
};  // stream: non-temporal stores

// Moves n floats `repeats` times, split over the threads. Both pointers are 64-byte aligned.
struct ProbeMoveArgs {
  ProbeMove move;
  const float* src;
  float* dst;  // [n] for copies; [kProbeMaxLanes] per thread for reads
  int64_t n;
  int64_t repeats;
};

}  // namespace llmkern
