// The launchers, as the bindings see them. They allocate nothing and do not wait for the device;
// they throw LaunchError.
#pragma once

#include "llmkern/attention.h"
#include "llmkern/gemm.h"
#include "llmkern/norm.h"
#include "place.h"

namespace llmkern {

// Throws where a device cannot run them at all: its driver is too old for the runtime, or it was
// not compiled for and there is no PTX that its driver takes.
void require_kernels(const Place& place);

void norm_fwd(const NormFwdArgs& a, const Place& place);

// Floats of scratch that norm_bwd takes when dweight or dbias is wanted.
int64_t norm_bwd_scratch(int64_t rows, int64_t cols);
void norm_bwd(const NormBwdArgs& a, const Place& place);

// 16-bit operands: one stride of each is 1, the other a multiple of 16 bytes and less than 2^31 of
// them, data 16-byte aligned;
// where k is not the contiguous dim of a, it is not that of b either. float with tf32: the same,
// and k is contiguous; else any strides. scratch: gemm_scratch floats, aligned to 16 bytes.
int64_t gemm_scratch(DType dtype, int64_t m, int64_t n, int64_t k, bool gated, bool tf32);
void gemm(const GemmArgs& g, bool tf32, const Place& place);
void gemm_ieee(const GemmArgs& g, const Place& place);  // float, as gemm calls it

// Floats of scratch that linear_bwd takes when a bias gradient is wanted.
int64_t linear_bwd_scratch(DType dtype, int64_t rows, int64_t cols);
void linear_bwd(const LinearBwdArgs& a, const Place& place);

// 16-bit tensors, head and value dim multiples of 8 up to 128, addresses and strides multiples of
// 16 bytes; of the inputs only q, k, v and key_mask. scratch: attention_bwd_scratch floats for the
// gradients that are wanted, aligned to 16 bytes.
void attention_fwd(const AttentionFwdArgs& a, const Place& place);
int64_t attention_bwd_scratch(const AttentionShape& s, bool dq, bool dk, bool dv);
void attention_bwd(const AttentionBwdArgs& a, const Place& place);

}  // namespace llmkern
