// How a product is cut into tiles and parts of k, and what adds the parts up.
#pragma once

#include "gemm_epilogue.cuh"
#include "place.h"

namespace llmkern {

struct GemmPlan {
  int block;       // side of a tile
  int parts;       // of k
  int64_t part_k;  // k for each part but the last
};

// A pure function of the shape.
GemmPlan gemm_plan(DType dtype, int64_t m, int64_t n, int64_t k, bool gated);

struct JoinParams {
  const float* partial;  // [parts][m][stride]; gated: blocks of eight columns of z and u in turns
  int parts;
  int64_t stride, m;
  int n;
  EpilogueParams epilogue;
};

void gemm_join(const JoinParams& p, DType dtype, const Place& place);

}  // namespace llmkern
