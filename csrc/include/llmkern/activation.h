// Element-wise activations, forward and backward: y = f(x) and dx = dy * f'(x).
//
//   relu       max(x, 0)
//   gelu       x * Phi(x), Phi the standard normal distribution
//   gelu_tanh  x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3)))
//   silu       x / (1 + e^-x)
//
// Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016.
#pragma once

#include "llmkern/dtype.h"

namespace llmkern {

enum class Activation : int { kNone = 0, kRelu = 1, kGelu = 2, kGeluTanh = 3, kSilu = 4 };

}  // namespace llmkern
