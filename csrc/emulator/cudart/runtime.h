// Shared by the files of the stand-in: error codes, the device in use, types of the CUDA runtime's
// ABI (CUDA 13; no CUDA header is needed to build this).
#pragma once

#include <string>
#include <vector>

#include "hooks.h"

namespace llmkern {
namespace cudart {

// cudaError_t, those that the stand-in can give.
enum Error : int {
  kSuccess = 0,
  kInvalidValue = 1,
  kMemoryAllocation = 2,
  kInvalidConfiguration = 9,
  kInvalidSymbol = 13,
  kInvalidMemcpyDirection = 21,
  kInsufficientDriver = 35,
  kInvalidDeviceFunction = 98,
  kInvalidDevice = 101,
  kInvalidKernelImage = 200,
  kNoKernelImageForDevice = 209,
  kInvalidResourceHandle = 400,
  kNotReady = 600,
  kLaunchOutOfResources = 701,
  kLaunchFailure = 719,
  kNotSupported = 801,
};

struct Dim3 {
  unsigned x, y, z;
};

// The hooks in force, or null: no device.
const LlmkernHooks* hooks();

// Remembers an error for cudaGetLastError and returns it.
int fail(Error error, const std::string& detail);
int remember(int error);

int shared_bytes_optin(int capability);

// One PTX image of a fat binary.
struct Image {
  int capability = 0;
  std::string text;
};

// The PTX images of a fat binary (fatbin.cpp). `problem` says why an image could not be read.
std::vector<Image> read_fatbin(const void* wrapper, std::string* problem);

}  // namespace cudart
}  // namespace llmkern
