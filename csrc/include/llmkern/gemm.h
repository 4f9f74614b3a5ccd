// Matrix products under linear layers, with everything a layer does to the product done before its
// one store. A [M, K] and B [N, K] may have any strides, so one kernel serves the forward pass
// (x, W), the input gradient (dy, W^T) and the weight gradient (dy^T, x^T) without a transposing
// copy:
//
//   z = A B^T + bias;  y = drop(act(z)) + residual                      (one B)
//   z = A B0^T + bias0, u = A B1^T + bias1;  y = drop(act(z) * u) + residual   (gated: two B)
//
// Products of float, BFloat16 and Float16 are summed in float, those of double in double; y is
// rounded once.
#pragma once

#include "llmkern/activation.h"
#include "llmkern/dtype.h"

namespace llmkern {

// What happens to the product. All pointers but preact are read only; all have the dtype of y.
struct LinearEpilogue {
  Activation activation;
  const void* bias[2];   // null, or [N] contiguous; [1] only when gated
  void* preact[2];       // null: not wanted; else z (and u) go here, [M, N] contiguous
  const void* residual;  // null, or [M, N] with unit column stride; may be y itself
  int64_t residual_stride;
  uint32_t drop_threshold;  // of 65536; 0: no dropout. Element row * N + col (llmkern/random.py)
  const int64_t* seed;
  void* y;  // [M, N] with unit column stride
  int64_t y_stride;
};

// Strides are in elements; [0] rows (m or n), [1] along k.
struct GemmShape {
  DType dtype;
  int64_t m, n, k;
  int64_t a_stride[2];
  int64_t b_stride[2][2];
  bool gated;
};

struct GemmArgs {
  GemmShape shape;
  const void* a;
  const void* b[2];  // [1] only when gated
  LinearEpilogue epilogue;
  void* scratch;  // gemm_scratch bytes, 64-byte aligned, for the thread count of the call
};

struct GemmScratchArgs {
  GemmShape shape;
  int64_t* bytes;
};

// The epilogue alone, over a product that another library computed (bias is added here too).
struct LinearEpilogueArgs {
  DType dtype;
  int64_t rows, cols;
  const void* product[2];  // [rows, cols] contiguous; [1] null unless gated. May be y or preact.
  LinearEpilogue epilogue;
};

constexpr int kLinearBwdChunks = 32;  // row ranges of the bias gradient, for any thread count

// One pass over dy in front of the two backward products:
//   g = drop(dy) * act'(z), or g = drop(dy) * u * act'(z), gu = drop(dy) * act(z) when gated;
//   dbias = sum of the rows of g (and gu).
struct LinearBwdArgs {
  DType dtype;
  int64_t rows, cols;
  Activation activation;
  const void* dy;  // unit column stride
  int64_t dy_stride;
  const void* preact[2];  // z (for relu the output serves as well) and u, [rows, cols] contiguous
  uint32_t drop_threshold;
  const int64_t* seed;
  void* g[2];      // null: not wanted (then g = dy); else [rows, cols] contiguous
  void* dbias[2];  // null: not wanted; [cols]
  void* scratch;   // kLinearBwdChunks * 2 * 2 * cols compute-type values when a dbias is wanted
};

}  // namespace llmkern
