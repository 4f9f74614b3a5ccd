// Attention backward; formulas: llmkern/attention.h. With
// P = exp(S - lse), dP = drop(dO V^T), delta_i = sum_j P_ij dP_ij - dlse_i = <dO_i, O_i> - dlse_i:
//
//   dS = P (dP - delta);  dQ = scale dS K;  dK = scale dS^T Q;  dV = drop(P)^T dO
//
// Bitwise repeatable, and an element's gradients do not depend on the rest of the batch.
#pragma once

#include "attention.cuh"
#include "place.h"

namespace llmkern {

// dK and dV; dQ; of what p.dk and p.dv name, all that p.dq names.
void attention_bwd_keys(const AttentionShape& s, const AttentionParams& p, const Place& place);
void attention_bwd_queries(const AttentionShape& s, const AttentionParams& p, const Place& place);

// All three at once. Each query sees a key; p.sums is set, its locks and ticket are 0.
void attention_bwd_joint(const AttentionShape& s, const AttentionParams& p, const Place& place);

}  // namespace llmkern
