// Sums over rows, column by column, in an order that the shape alone decides: kernels write one
// partial sum a block of rows, column_sums adds those up.
#pragma once

#include <cstdint>

#include "llmkern/dtype.h"
#include "place.h"

namespace llmkern {

struct ColumnSumsParams {
  const float* partial;  // [parts] rows of cols floats, part_stride apart
  int64_t part_stride;
  int parts, cols;
  DType dtype;  // of out
  void* out;    // [cols]
};

void column_sums(const ColumnSumsParams& p, const Place& place);

}  // namespace llmkern
