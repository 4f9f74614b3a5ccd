// The kernels behind the measured peaks; the contract is in llmkern/probe.h.
#include "llmkern/probe.h"

#include "parallel.h"
#include "simd/dot_bf16.h"
#include "simd/vec.h"

namespace llmkern {
namespace LLMKERN_ISA {

static_assert(VecF::kLanes <= kProbeMaxLanes, "values must hold one vector per chain");

// Chains start from different values, or the compiler would compute one and copy it. x*a + b with
// a < 1 converges, so no chain reaches infinity or a slow denormal.
template <class T>
static void fma_chains(int64_t iterations, T* values) {
  using V = Vec<T>;
  V acc[kProbeChains];
  for (int c = 0; c < kProbeChains; ++c) acc[c] = V::load(values + c * kProbeMaxLanes);
  const V a = V::set1(T(0.5)), b = V::set1(values[0]);
  for (int64_t i = 0; i < iterations; ++i) {
#pragma GCC unroll 12
    for (int c = 0; c < kProbeChains; ++c) acc[c] = V::fma(acc[c], a, b);
  }
  for (int c = 0; c < kProbeChains; ++c) acc[c].store(values + c * kProbeMaxLanes);
}

static void dot_chains(int64_t iterations, float* values) {
  VecF acc[kProbeChains];
  for (int c = 0; c < kProbeChains; ++c) acc[c] = VecF::load(values + c * kProbeMaxLanes);
  const VecU pair = VecU::set1(0x3c003c00u);  // two bf16 of 2^-7
  for (int64_t i = 0; i < iterations; ++i) {
#pragma GCC unroll 12
    for (int c = 0; c < kProbeChains; ++c) acc[c] = dot_bf16(acc[c], pair, pair);
  }
  for (int c = 0; c < kProbeChains; ++c) acc[c].store(values + c * kProbeMaxLanes);
}

void probe_fma(const ProbeFmaArgs& a) {
  constexpr int64_t kStride = kProbeChains * kProbeMaxLanes;
  const int64_t threads = max_threads();
  int64_t flops_per_chain = 0;
  switch (a.dtype) {
    case DType::kFloat32:
      parallel_for(threads, [&](int64_t task, int) {
        fma_chains(a.iterations, static_cast<float*>(a.values) + task * kStride);
      });
      flops_per_chain = 2 * VecF::kLanes;
      break;
    case DType::kFloat64:
      parallel_for(threads, [&](int64_t task, int) {
        fma_chains(a.iterations, static_cast<double*>(a.values) + task * kStride);
      });
      flops_per_chain = 2 * VecD::kLanes;
      break;
    case DType::kBFloat16:
      if (!kHasDotBf16) break;
      parallel_for(threads, [&](int64_t task, int) {
        dot_chains(a.iterations, static_cast<float*>(a.values) + task * kStride);
      });
      flops_per_chain = 4 * VecF::kLanes;
      break;
    case DType::kFloat16:
      break;
  }
  *a.flops = threads * a.iterations * kProbeChains * flops_per_chain;
}

// 4 vectors a step keep enough loads in flight; the rest of a range shorter than that is dropped.
template <ProbeMove kMove>
static void move_range(const float* src, float* dst, int64_t n, int64_t repeats) {
  constexpr int kLanes = VecF::kLanes;
  VecF sum[4] = {VecF::zero(), VecF::zero(), VecF::zero(), VecF::zero()};
  for (int64_t r = 0; r < repeats; ++r) {
    for (int64_t i = 0; i + 4 * kLanes <= n; i += 4 * kLanes) {
      for (int u = 0; u < 4; ++u) {
        const VecF v = VecF::load(src + i + u * kLanes);
        if (kMove == ProbeMove::kRead) {
          sum[u] = VecF::max(sum[u], v);
        } else if (kMove == ProbeMove::kCopy) {
          v.store(dst + i + u * kLanes);
        } else {
          v.stream(dst + i + u * kLanes);
        }
      }
    }
  }
  if (kMove == ProbeMove::kRead) {
    VecF::max(VecF::max(sum[0], sum[1]), VecF::max(sum[2], sum[3])).store(dst);
  }
}

void probe_move(const ProbeMoveArgs& a) {
  const int64_t threads = max_threads();
  // Ranges in whole cache lines keep every thread's stores aligned.
  const int64_t lines = a.n / kProbeMaxLanes;
  parallel_for(threads, [&](int64_t t, int) {
    const int64_t begin = lines * t / threads * kProbeMaxLanes;
    const int64_t end = lines * (t + 1) / threads * kProbeMaxLanes;
    switch (a.move) {
      case ProbeMove::kRead:
        move_range<ProbeMove::kRead>(a.src + begin, a.dst + t * kProbeMaxLanes, end - begin,
                                     a.repeats);
        break;
      case ProbeMove::kCopy:
        move_range<ProbeMove::kCopy>(a.src + begin, a.dst + begin, end - begin, a.repeats);
        break;
      case ProbeMove::kCopyStream:
        move_range<ProbeMove::kCopyStream>(a.src + begin, a.dst + begin, end - begin, a.repeats);
        break;
    }
  });
}

}  // namespace LLMKERN_ISA
}  // namespace llmkern
