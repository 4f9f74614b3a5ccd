// Where a launch goes, and what a failed one throws; free of CUDA headers, so that the bindings
// need none.
#pragma once

#include <stdexcept>

namespace llmkern {

struct Place {
  int device;
  void* stream;  // cudaStream_t
};

// what(): "<kernel>: <what the CUDA runtime says>".
struct LaunchError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

}  // namespace llmkern
