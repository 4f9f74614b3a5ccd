// The emulated device's properties, streams, events and errors. Work is done when it is launched, so
// streams and events have nothing to wait for.
#include <algorithm>
#include <chrono>
#include <cstring>

#include "runtime.h"

namespace llmkern {
namespace cudart {
namespace {

LlmkernHooks installed;
bool active = false;
thread_local int last_error = kSuccess;
thread_local std::string last_detail;

// What occupancy and launches depend on, by compute capability (CUDA C++ Programming Guide, table
// of technical specifications).
struct Limits {
  int sm_shared, optin_shared, sm_threads, sm_blocks;
};

Limits limits(int capability) {
  switch (capability) {
    case 80:
      return {164 * 1024, 163 * 1024, 2048, 32};
    case 86:
      return {100 * 1024, 99 * 1024, 1536, 16};
    case 89:
      return {100 * 1024, 99 * 1024, 1536, 24};
    case 120:
      return {100 * 1024, 99 * 1024, 1536, 24};
    default:  // 90, 100, 103
      return {228 * 1024, 227 * 1024, 2048, 32};
  }
}

constexpr int kMultiprocessors = 4;  // enough for launches that fill the device to have several CTAs
constexpr int kStaticShared = 48 * 1024, kRegisters = 65536, kReservedShared = 1024;

using Clock = std::chrono::steady_clock;

struct Event {
  Clock::time_point at;
};

}  // namespace

const LlmkernHooks* hooks() { return active ? &installed : nullptr; }

int remember(int error) {
  if (error != kSuccess) last_error = error;
  return error;
}

int fail(Error error, const std::string& detail) {
  last_detail = detail;
  return remember(error);
}

int shared_bytes_optin(int capability) { return limits(capability).optin_shared; }

}  // namespace cudart
}  // namespace llmkern

using namespace llmkern::cudart;

extern "C" {

void llmkern_cudart_set_hooks(const LlmkernHooks* given) {
  active = given != nullptr;
  if (given) installed = *given;
}

const char* llmkern_cudart_detail() { return last_detail.c_str(); }

void llmkern_cudart_set_detail(const char* text) { last_detail = text; }

int cudaGetLastError() {
  const int error = last_error;
  last_error = kSuccess;
  return error;
}

int cudaPeekAtLastError() { return last_error; }

const char* cudaGetErrorName(int error) {
  switch (error) {
    case kSuccess:
      return "cudaSuccess";
    case kInvalidValue:
      return "cudaErrorInvalidValue";
    case kMemoryAllocation:
      return "cudaErrorMemoryAllocation";
    case kInvalidConfiguration:
      return "cudaErrorInvalidConfiguration";
    case kInvalidSymbol:
      return "cudaErrorInvalidSymbol";
    case kInvalidMemcpyDirection:
      return "cudaErrorInvalidMemcpyDirection";
    case kInsufficientDriver:
      return "cudaErrorInsufficientDriver";
    case kInvalidDeviceFunction:
      return "cudaErrorInvalidDeviceFunction";
    case kInvalidDevice:
      return "cudaErrorInvalidDevice";
    case kInvalidKernelImage:
      return "cudaErrorInvalidKernelImage";
    case kNoKernelImageForDevice:
      return "cudaErrorNoKernelImageForDevice";
    case kInvalidResourceHandle:
      return "cudaErrorInvalidResourceHandle";
    case kNotReady:
      return "cudaErrorNotReady";
    case kLaunchOutOfResources:
      return "cudaErrorLaunchOutOfResources";
    case kLaunchFailure:
      return "cudaErrorLaunchFailure";
    case kNotSupported:
      return "cudaErrorNotSupported";
  }
  return "unrecognized error code";
}

const char* cudaGetErrorString(int error) {
  static thread_local std::string text;
  text = cudaGetErrorName(error);
  if (error != kSuccess && !last_detail.empty()) text += " (emulator: " + last_detail + ")";
  return text.c_str();
}

int cudaGetDeviceCount(int* count) {
  *count = hooks() ? 1 : 0;
  return hooks() ? kSuccess : fail(kInsufficientDriver, "no emulated device is active");
}

int cudaGetDevice(int* device) {
  *device = 0;
  return hooks() ? kSuccess : fail(kInsufficientDriver, "no emulated device is active");
}

int cudaSetDevice(int device) {
  if (!hooks()) return fail(kInsufficientDriver, "no emulated device is active");
  return device == 0 ? kSuccess : fail(kInvalidDevice, "there is one emulated device, number 0");
}

int cudaDeviceSynchronize() { return kSuccess; }
int cudaDeviceReset() { return kSuccess; }

int cudaDriverGetVersion(int* version) {
  *version = hooks() ? 13000 : 0;
  return kSuccess;
}

int cudaRuntimeGetVersion(int* version) {
  *version = 13000;
  return kSuccess;
}

// cudaDeviceAttr, by number.
int cudaDeviceGetAttribute(int* value, int attribute, int device) {
  if (!hooks()) return fail(kInsufficientDriver, "no emulated device is active");
  if (device != 0) return fail(kInvalidDevice, "there is one emulated device, number 0");
  const int capability = hooks()->capability;
  const Limits l = limits(capability);
  const struct {
    int attribute, value;
  } known[] = {
      {1, 1024},                   // MaxThreadsPerBlock
      {2, 1024},                   // MaxBlockDimX
      {3, 1024},                   // MaxBlockDimY
      {4, 64},                     // MaxBlockDimZ
      {5, 0x7fffffff},             // MaxGridDimX
      {6, 65535},                  // MaxGridDimY
      {7, 65535},                  // MaxGridDimZ
      {8, kStaticShared},          // MaxSharedMemoryPerBlock
      {10, 32},                    // WarpSize
      {12, kRegisters},            // MaxRegistersPerBlock
      {16, kMultiprocessors},      // MultiProcessorCount
      {38, 4 << 20},               // L2CacheSize
      {39, l.sm_threads},          // MaxThreadsPerMultiProcessor
      {75, capability / 10},       // ComputeCapabilityMajor
      {76, capability % 10},       // ComputeCapabilityMinor
      {81, l.sm_shared},           // MaxSharedMemoryPerMultiprocessor
      {82, kRegisters},            // MaxRegistersPerMultiprocessor
      {95, 0},                     // CooperativeLaunch
      {97, l.optin_shared},        // MaxSharedMemoryPerBlockOptin
      {106, l.sm_blocks},          // MaxBlocksPerMultiprocessor
      {111, kReservedShared},      // ReservedSharedMemoryPerBlock
  };
  for (const auto& k : known) {
    if (k.attribute == attribute) {
      *value = k.value;
      return kSuccess;
    }
  }
  return fail(kNotSupported, "cudaDeviceGetAttribute: attribute " + std::to_string(attribute));
}

// cudaDeviceProp of CUDA 13, as far as it is filled in; 1008 bytes in all.
struct DeviceProperties {
  char name[256], uuid[16], luid[8];
  unsigned luid_mask;
  size_t global_bytes, shared_bytes;
  int registers, warp_size;
  size_t pitch;
  int block_threads, block_dim[3], grid_dim[3];
  size_t const_bytes;
  int major, minor;
  size_t texture_alignment, texture_pitch;
  int multiprocessors;
};
constexpr size_t kDevicePropertiesBytes = 1008;
static_assert(offsetof(DeviceProperties, major) == 360 &&
                  offsetof(DeviceProperties, multiprocessors) == 384,
              "as CUDA 13's driver_types.h lays it out");

int cudaGetDeviceProperties(DeviceProperties* out, int device) {
  if (!hooks()) return fail(kInsufficientDriver, "no emulated device is active");
  if (device != 0) return fail(kInvalidDevice, "there is one emulated device, number 0");
  std::memset(static_cast<void*>(out), 0, kDevicePropertiesBytes);
  std::strcpy(out->name, "llmkern emulator");
  out->global_bytes = size_t{16} << 30;
  out->shared_bytes = kStaticShared;
  out->registers = kRegisters;
  out->warp_size = 32;
  out->block_threads = 1024;
  const int block[3] = {1024, 1024, 64}, grid[3] = {0x7fffffff, 65535, 65535};
  std::copy(block, block + 3, out->block_dim);
  std::copy(grid, grid + 3, out->grid_dim);
  out->const_bytes = 64 * 1024;
  out->major = hooks()->capability / 10;
  out->minor = hooks()->capability % 10;
  out->multiprocessors = kMultiprocessors;
  return kSuccess;
}

// By threads and shared memory; the emulator knows no register counts.
int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int threads,
                                                           size_t shared_bytes, unsigned) {
  if (!hooks()) return fail(kInsufficientDriver, "no emulated device is active");
  if (threads < 1 || threads > 1024) return fail(kInvalidValue, "threads of a block");
  const Limits l = limits(hooks()->capability);
  const int by_shared = l.sm_shared / static_cast<int>(shared_bytes + kReservedShared);
  *blocks = std::min({l.sm_blocks, l.sm_threads / ((threads + 31) / 32 * 32), by_shared});
  return kSuccess;
}

int cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* stub, int threads,
                                                  size_t shared_bytes) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, stub, threads,
                                                                shared_bytes, 0);
}

int cudaStreamCreate(void** stream) {
  *stream = new char;
  return kSuccess;
}
int cudaStreamCreateWithFlags(void** stream, unsigned) { return cudaStreamCreate(stream); }
int cudaStreamCreateWithPriority(void** stream, unsigned, int) { return cudaStreamCreate(stream); }
int cudaStreamDestroy(void* stream) {
  delete static_cast<char*>(stream);
  return kSuccess;
}
int cudaStreamSynchronize(void*) { return kSuccess; }
int cudaStreamQuery(void*) { return kSuccess; }
int cudaStreamWaitEvent(void*, void*, unsigned) { return kSuccess; }
int cudaStreamIsCapturing(void*, int* status) {
  *status = 0;
  return kSuccess;
}

int cudaEventCreate(void** event) {
  *event = new Event{Clock::now()};
  return kSuccess;
}
int cudaEventCreateWithFlags(void** event, unsigned) { return cudaEventCreate(event); }
int cudaEventDestroy(void* event) {
  delete static_cast<Event*>(event);
  return kSuccess;
}
int cudaEventRecord(void* event, void*) {
  static_cast<Event*>(event)->at = Clock::now();
  return kSuccess;
}
int cudaEventSynchronize(void*) { return kSuccess; }
int cudaEventQuery(void*) { return kSuccess; }

// Time of the emulation, not of any device.
int cudaEventElapsedTime(float* ms, void* begin, void* end) {
  const auto between = static_cast<Event*>(end)->at - static_cast<Event*>(begin)->at;
  *ms = std::chrono::duration<float, std::milli>(between).count();
  return kSuccess;
}
}
