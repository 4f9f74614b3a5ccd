// The launchers, as the bindings see them. They allocate nothing and do not wait for the device;
// they throw LaunchError.
#pragma once

#include "llmkern/gemm.h"
#include "llmkern/norm.h"
#include "place.h"

namespace llmkern {

void norm_fwd(const NormFwdArgs& a, const Place& place);

// Floats of scratch that norm_bwd takes when dweight or dbias is wanted.
int64_t norm_bwd_scratch(int64_t rows, int64_t cols);
void norm_bwd(const NormBwdArgs& a, const Place& place);

}  // namespace llmkern
