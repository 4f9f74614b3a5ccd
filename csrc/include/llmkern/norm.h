// LayerNorm and RMSNorm over the last dimension, with an optional dropout + residual add in front:
//
//   z = drop(x) + residual                       (z = x without residual and dropout)
//   layer norm: y = (z - mean(z)) * rstd * w + b,  rstd = 1 / sqrt(var(z) + eps), biased variance
//   rms norm:   y = z * rstd * w,                  rstd = 1 / sqrt(mean(z^2) + eps)
//
// w = weight + 1 with unit_offset. z is rounded to its dtype before it is normalised, since the
// next layer reads that; y is rounded once, from float.
//
// Ba et al., "Layer Normalization", 2016; Zhang and Sennrich, "Root Mean Square Layer
// Normalization", 2019.
#pragma once

#include "llmkern/dtype.h"

namespace llmkern {

struct NormShape {
  DType dtype;         // of residual, z, y and their gradients
  DType x_dtype;       // of x and dx: dtype, or 16-bit beside a float32 residual
  DType weight_dtype;  // of weight, bias: dtype, or float32
  int64_t rows, cols;
  double eps;
  bool rms, unit_offset;
  uint32_t drop_threshold;  // of 65536; 0: no dropout. Element index row * cols + col
                            // (llmkern/random.py)
  const int64_t* seed;
};

// Row strides are in elements; columns have stride 1.
struct NormFwdArgs {
  NormShape shape;
  const void* x;
  int64_t x_stride;
  const void* residual;  // null: none
  int64_t residual_stride;
  const void *weight, *bias;  // null: none
  void* z;                    // null: not wanted; else contiguous
  void* y;                    // contiguous
  void *mean, *rstd;          // [rows], float (double for kFloat64); null: not wanted, mean for rms
};

// Row ranges that the weight gradient is summed in: a function of the shape alone, so any number of
// threads sums alike; few rows are not worth a partial sum.
constexpr int64_t norm_bwd_chunks(int64_t rows) {
  return rows >= 32 * 16 ? 32 : rows >= 16 ? rows / 16 : rows > 0;
}

struct NormBwdArgs {
  NormShape shape;
  const void* z;  // what was normalised
  int64_t z_stride;
  const void* weight;
  const void *mean, *rstd;  // null: computed again, bit for bit; mean null for rms
  const void* dy;
  int64_t dy_stride;
  const void* dz;         // null, or the gradient that reached z itself (prenorm); contiguous
  void* dx;               // null: not wanted; else contiguous, x_dtype, with the dropout mask
  void* dresidual;        // null: not wanted, or the same as dx; else contiguous
  void *dweight, *dbias;  // null: not wanted; weight_dtype
  void* scratch;          // 2 * cols * norm_bwd_chunks(rows) compute-type values
};

}  // namespace llmkern
