// Every CPU kernel entry: X(name, Args) declares `void name(const Args&)` in each ISA's namespace.
#pragma once

#include "llmkern/attention.h"
#include "llmkern/elementwise.h"
#include "llmkern/gemm.h"
#include "llmkern/norm.h"
#include "llmkern/probe.h"

#define LLMKERN_CPU_KERNELS(X)           \
  X(activation_bwd, ActivationBwdArgs)   \
  X(activation_fwd, ActivationFwdArgs)   \
  X(attention_bwd, AttentionBwdArgs)     \
  X(attention_fwd, AttentionFwdArgs)     \
  X(dropout, DropoutArgs)                \
  X(gemm, GemmArgs)                      \
  X(gemm_scratch, GemmScratchArgs)       \
  X(linear_bwd, LinearBwdArgs)           \
  X(linear_epilogue, LinearEpilogueArgs) \
  X(norm_fwd, NormFwdArgs)               \
  X(norm_bwd, NormBwdArgs)               \
  X(probe_fma, ProbeFmaArgs)             \
  X(probe_move, ProbeMoveArgs)

// Those that use bf16 instructions; avx512_bf16 takes all the others from avx512.
#define LLMKERN_CPU_BF16_KERNELS(X) X(probe_fma, ProbeFmaArgs)
