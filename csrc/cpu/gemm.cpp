// Entry points of the matrix products; how a product is cut: gemm_plan.h.
#include "llmkern/gemm.h"

#include "gemm_loops.h"
#include "gemm_vector.h"
#include "kernel_list.h"

namespace llmkern {
namespace LLMKERN_ISA {
namespace {

template <class T>
void run(const GemmArgs& g) {
  if (gemm_path(g.shape) != GemmPath::kVector) return gemm_blocked<T>(g);
  static_assert(kVectorRows == 4, "one case a row count");
  switch (g.shape.m) {
    case 1:
      return gemm_vector<1, T>(g);
    case 2:
      return gemm_vector<2, T>(g);
    case 3:
      return gemm_vector<3, T>(g);
    default:
      return gemm_vector<4, T>(g);
  }
}

template <class C>
int64_t scratch_bytes(const GemmShape& s) {
  const int threads = gemm_threads(s);
  const int64_t values = gemm_path(s) == GemmPath::kVector ? vector_plan(s, threads).total
                                                           : gemm_plan<C>(s, threads).total;
  return values * static_cast<int64_t>(sizeof(C));
}

bool nothing_to_do(const GemmShape& s) { return s.m == 0 || s.n == 0; }

}  // namespace

void gemm_scratch(const GemmScratchArgs& a) {
  if (nothing_to_do(a.shape))
    *a.bytes = 0;
  else
    *a.bytes = a.shape.dtype == DType::kFloat64 ? scratch_bytes<double>(a.shape)
                                                : scratch_bytes<float>(a.shape);
}

void gemm(const GemmArgs& g) {
  if (nothing_to_do(g.shape)) return;
  switch (g.shape.dtype) {
    case DType::kFloat32:
      return run<float>(g);
    case DType::kBFloat16:
      return run<BFloat16>(g);
    case DType::kFloat16:
      return run<Float16>(g);
    case DType::kFloat64:
      return run<double>(g);
  }
}

}  // namespace LLMKERN_ISA
}  // namespace llmkern
