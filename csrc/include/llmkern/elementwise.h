// Kernels that read each element once and write it once: dropout, activations and their gradients.
// Arrays are [rows, cols] with unit column stride; row strides are in elements. Output may be
// input.
//
//   dropout: y = x * scale where element row * cols + col is kept (llmkern/random.py), else 0, also
//   where x is Inf or NaN. It is its own gradient.
#pragma once

#include "llmkern/activation.h"
#include "llmkern/dtype.h"

namespace llmkern {

struct DropoutArgs {
  DType dtype;
  int64_t rows, cols;
  const void* x;
  int64_t x_stride;
  void* y;
  int64_t y_stride;
  uint32_t drop_threshold;  // of 65536; 65536 drops everything
  const int64_t* seed;
};

struct ActivationFwdArgs {
  DType dtype;
  Activation activation;
  int64_t rows, cols;
  const void* x;
  int64_t x_stride;
  void* y;
  int64_t y_stride;
};

struct ActivationBwdArgs {
  DType dtype;
  Activation activation;
  int64_t rows, cols;
  const void* x;  // of relu, the output serves as well
  int64_t x_stride;
  const void* dy;
  int64_t dy_stride;
  void* dx;  // contiguous
};

}  // namespace llmkern
