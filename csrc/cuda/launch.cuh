// Starting a kernel: the only place that calls the CUDA runtime.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <string>

#include "place.h"

namespace llmkern {

constexpr size_t kSharedWithoutOptIn = 48 * 1024;

inline void check(cudaError_t status, const char* name) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // not sticky: the next call starts clean
  throw LaunchError(std::string(name) + ": " + cudaGetErrorString(status));
}

// Bytes of shared memory that a block may have.
inline size_t most_shared_bytes(const char* name, const Place& place) {
  int bytes = 0;
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, place.device),
        name);
  return static_cast<size_t>(bytes);
}

template <class Params>
void launch(const char* name, void (*kernel)(Params), dim3 grid, int threads, size_t shared_bytes,
            const Place& place, const Params& params) {
  check(cudaSetDevice(place.device), name);
  if (shared_bytes > kSharedWithoutOptIn) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(shared_bytes)),
          name);
  }
  kernel<<<grid, threads, shared_bytes, static_cast<cudaStream_t>(place.stream)>>>(params);
  check(cudaGetLastError(), name);
}

}  // namespace llmkern
