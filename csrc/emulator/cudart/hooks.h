// Between the stand-in for libcudart.so.13 and the emulator: plain C, called through ctypes.
//
// A library that nvcc linked with --cudart=shared finds the stand-in's symbols in place of the CUDA
// runtime's. It keeps the fat binaries, kernels and variables that the library registers, and hands
// each launch to `launch`. Without hooks every call that needs a device fails as on a machine
// without a driver.
#pragma once

#include <cstddef>
#include <cstdint>

extern "C" {

struct LlmkernLaunch {
  const char* ptx;  // not terminated
  size_t ptx_bytes;
  const char* kernel;
  uint32_t grid[3], block[3];
  uint64_t shared_bytes;  // dynamic
  void** arguments;       // one pointer per parameter of the kernel
};

struct LlmkernFunction {  // what a kernel needs, for cudaFuncGetAttributes
  uint64_t shared_bytes, local_bytes;
  int32_t max_threads;
};

struct LlmkernHooks {
  int32_t capability;                                 // major * 10 + minor
  int (*launch)(const LlmkernLaunch*);                // a cudaError_t
  int (*variable)(const char* ptx, size_t ptx_bytes,  // address of a __device__ variable
                  const char* name, uint64_t* address);
  int (*function)(const char* ptx, size_t ptx_bytes, const char* name, LlmkernFunction* out);
};

// Null takes the device away. The struct is copied.
void llmkern_cudart_set_hooks(const LlmkernHooks* hooks);
// Live cudaMalloc allocations; returns how many there are, fills at most `capacity`.
size_t llmkern_cudart_allocations(uint64_t* begins, uint64_t* bytes, size_t capacity);
// Why the last call of this thread failed, beyond its error code; "" if there is nothing to add.
const char* llmkern_cudart_detail();
// What cudaGetErrorString adds to this thread's next error.
void llmkern_cudart_set_detail(const char* text);
}
