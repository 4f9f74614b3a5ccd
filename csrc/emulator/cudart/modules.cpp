// What nvcc's host code calls at start-up and at a launch: fat binaries, kernels and variables are
// registered under the addresses of their host stubs, and a launch is handed to the emulator.
#include <algorithm>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>

#include "runtime.h"

namespace llmkern {
namespace cudart {
namespace {

struct Binary {
  std::vector<Image> images;
  std::string problem;
};

struct Function {
  Binary* binary = nullptr;
  std::string name;
  int max_dynamic_shared = 48 * 1024;
};

struct Variable {
  Binary* binary = nullptr;
  std::string name;
  size_t bytes = 0;
};

struct Configuration {
  Dim3 grid, block;
  size_t shared_bytes;
  void* stream;
};

struct Modules {
  std::mutex lock;
  std::map<void**, std::unique_ptr<Binary>> binaries;
  std::map<const void*, std::unique_ptr<Function>> functions;
  std::map<const void*, Variable> variables;
};

Modules& modules() {
  static Modules* all = new Modules;  // never freed: libraries unregister after main ends
  return *all;
}

thread_local std::vector<Configuration> configurations;

// The image with the highest target that the device can run; null with an error remembered.
const Image* image_of(const Binary& binary, const std::string& name) {
  const Image* best = nullptr;
  for (const Image& image : binary.images) {
    const bool runs = image.capability <= hooks()->capability;
    if (runs && (!best || image.capability > best->capability)) best = &image;
  }
  if (!best) {
    const std::string why = binary.problem.empty()
                                ? "it has no PTX for sm_" + std::to_string(hooks()->capability)
                                : binary.problem;
    fail(kNoKernelImageForDevice, name + ": " + why);
  }
  return best;
}

Function* function_of(const void* stub) {
  const std::lock_guard<std::mutex> hold(modules().lock);
  const auto found = modules().functions.find(stub);
  return found == modules().functions.end() ? nullptr : found->second.get();
}

int launch(Function* f, Dim3 grid, Dim3 block, void** arguments, size_t shared_bytes) {
  if (!hooks()) return fail(kInsufficientDriver, "no emulated device is active");
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (threads == 0 || threads > 1024 || block.z > 64 || grid.x == 0 || grid.y == 0 ||
      grid.z == 0 || grid.y > 65535 || grid.z > 65535 || grid.x > 0x7fffffffu) {
    return fail(kInvalidConfiguration, f->name + ": grid or block out of range");
  }
  if (shared_bytes > static_cast<size_t>(f->max_dynamic_shared)) {
    return fail(kInvalidValue, f->name + ": " + std::to_string(shared_bytes) +
                                   " bytes of dynamic shared memory, allowed are " +
                                   std::to_string(f->max_dynamic_shared));
  }
  const Image* image = image_of(*f->binary, f->name);
  if (!image) return kNoKernelImageForDevice;
  const LlmkernLaunch call{image->text.data(),
                           image->text.size(),
                           f->name.c_str(),
                           {grid.x, grid.y, grid.z},
                           {block.x, block.y, block.z},
                           shared_bytes,
                           arguments};
  return remember(hooks()->launch(&call));
}

}  // namespace
}  // namespace cudart
}  // namespace llmkern

using namespace llmkern::cudart;

extern "C" {

void** __cudaRegisterFatBinary(void* wrapper) {
  auto binary = std::make_unique<Binary>();
  binary->images = read_fatbin(wrapper, &binary->problem);
  void** handle = reinterpret_cast<void**>(binary.get());
  const std::lock_guard<std::mutex> hold(modules().lock);
  modules().binaries[handle] = std::move(binary);
  return handle;
}

void __cudaRegisterFatBinaryEnd(void**) {}

char __cudaInitModule(void**) { return 1; }

void __cudaUnregisterFatBinary(void** handle) {
  const std::lock_guard<std::mutex> hold(modules().lock);
  Modules& all = modules();
  auto* binary = reinterpret_cast<Binary*>(handle);
  for (auto at = all.functions.begin(); at != all.functions.end();) {
    at = at->second->binary == binary ? all.functions.erase(at) : std::next(at);
  }
  for (auto at = all.variables.begin(); at != all.variables.end();) {
    at = at->second.binary == binary ? all.variables.erase(at) : std::next(at);
  }
  all.binaries.erase(handle);
}

void __cudaRegisterFunction(void** handle, const char* stub, char*, const char* name, int, void*,
                            void*, void*, void*, int*) {
  auto f = std::make_unique<Function>();
  f->binary = reinterpret_cast<Binary*>(handle);
  f->name = name;
  const std::lock_guard<std::mutex> hold(modules().lock);
  modules().functions[stub] = std::move(f);
}

void __cudaRegisterVar(void** handle, char* stub, char*, const char* name, int, size_t bytes, int,
                       int) {
  const std::lock_guard<std::mutex> hold(modules().lock);
  modules().variables[stub] = Variable{reinterpret_cast<Binary*>(handle), name, bytes};
}

unsigned __cudaPushCallConfiguration(Dim3 grid, Dim3 block, size_t shared_bytes, void* stream) {
  configurations.push_back({grid, block, shared_bytes, stream});
  return 0;
}

int __cudaPopCallConfiguration(Dim3* grid, Dim3* block, size_t* shared_bytes, void* stream) {
  if (configurations.empty()) return fail(kInvalidConfiguration, "no launch configuration");
  const Configuration& c = configurations.back();
  *grid = c.grid;
  *block = c.block;
  *shared_bytes = c.shared_bytes;
  *static_cast<void**>(stream) = c.stream;
  configurations.pop_back();
  return kSuccess;
}

int __cudaGetKernel(void** kernel, const void* stub) {
  *kernel = function_of(stub);
  return *kernel ? kSuccess : fail(kInvalidDeviceFunction, "the kernel was not registered");
}

int __cudaLaunchKernel(void* kernel, Dim3 grid, Dim3 block, void** arguments, size_t shared_bytes,
                       void*) {
  if (!kernel) return fail(kInvalidDeviceFunction, "the kernel was not registered");
  return launch(static_cast<Function*>(kernel), grid, block, arguments, shared_bytes);
}

int __cudaLaunchKernel_ptsz(void* kernel, Dim3 grid, Dim3 block, void** arguments,
                            size_t shared_bytes, void* stream) {
  return __cudaLaunchKernel(kernel, grid, block, arguments, shared_bytes, stream);
}

int cudaLaunchKernel(const void* stub, Dim3 grid, Dim3 block, void** arguments,
                     size_t shared_bytes, void* stream) {
  return __cudaLaunchKernel(function_of(stub), grid, block, arguments, shared_bytes, stream);
}

// cudaLaunchConfig_t; launch attributes (clusters, priorities ...) are refused, not ignored.
struct LaunchConfig {
  Dim3 grid, block;
  size_t shared_bytes;
  void* stream;
  void* attributes;
  unsigned attribute_count;
};

int cudaLaunchKernelExC(const LaunchConfig* config, const void* stub, void** arguments) {
  if (config->attribute_count) {
    return fail(kNotSupported, "launch attributes are not emulated");
  }
  return cudaLaunchKernel(stub, config->grid, config->block, arguments, config->shared_bytes,
                          config->stream);
}

// The leading part of cudaFuncAttributes; the rest is left zero.
struct FuncAttributes {
  size_t shared_bytes, const_bytes, local_bytes;
  int max_threads, registers, ptx_version, binary_version, cache_mode, max_dynamic_shared;
  int rest[23];
};
static_assert(sizeof(FuncAttributes) == 144, "as CUDA 13's driver_types.h lays it out");

int cudaFuncGetAttributes(FuncAttributes* out, const void* stub) {
  if (!hooks()) return fail(kInsufficientDriver, "no emulated device is active");
  Function* f = function_of(stub);
  if (!f) return fail(kInvalidDeviceFunction, "the kernel was not registered");
  const Image* image = image_of(*f->binary, f->name);
  if (!image) return kNoKernelImageForDevice;
  LlmkernFunction found{};
  const int error =
      hooks()->function(image->text.data(), image->text.size(), f->name.c_str(), &found);
  if (error) return remember(error);
  std::memset(out, 0, sizeof *out);
  out->shared_bytes = found.shared_bytes;
  out->local_bytes = found.local_bytes;
  out->max_threads = found.max_threads;
  out->ptx_version = out->binary_version = image->capability;
  out->max_dynamic_shared = f->max_dynamic_shared;
  return kSuccess;
}

int cudaFuncSetAttribute(const void* stub, int attribute, int value) {
  if (!hooks()) return fail(kInsufficientDriver, "no emulated device is active");
  Function* f = function_of(stub);
  if (!f) return fail(kInvalidDeviceFunction, "the kernel was not registered");
  constexpr int kMaxDynamicShared = 8, kPreferredCarveout = 9;
  if (attribute == kPreferredCarveout) return kSuccess;
  if (attribute != kMaxDynamicShared) {
    return fail(kNotSupported, "cudaFuncSetAttribute: attribute " + std::to_string(attribute));
  }
  const int limit = shared_bytes_optin(hooks()->capability);
  if (value < 0 || value > limit) {
    return fail(kInvalidValue, f->name + ": " + std::to_string(value) +
                                   " bytes of dynamic shared memory, the device has " +
                                   std::to_string(limit));
  }
  f->max_dynamic_shared = value;
  return kSuccess;
}

int cudaFuncSetCacheConfig(const void*, int) { return kSuccess; }

int cudaGetSymbolAddress(void** address, const void* symbol) {
  if (!hooks()) return fail(kInsufficientDriver, "no emulated device is active");
  Variable v;
  {
    const std::lock_guard<std::mutex> hold(modules().lock);
    const auto found = modules().variables.find(symbol);
    if (found == modules().variables.end()) return fail(kInvalidSymbol, "unknown variable");
    v = found->second;
  }
  const Image* image = image_of(*v.binary, v.name);
  if (!image) return kNoKernelImageForDevice;
  uint64_t at = 0;
  const int error =
      hooks()->variable(image->text.data(), image->text.size(), v.name.c_str(), &at);
  if (error) return remember(error);
  *address = reinterpret_cast<void*>(at);
  return kSuccess;
}

int cudaGetSymbolSize(size_t* bytes, const void* symbol) {
  const std::lock_guard<std::mutex> hold(modules().lock);
  const auto found = modules().variables.find(symbol);
  if (found == modules().variables.end()) return fail(kInvalidSymbol, "unknown variable");
  *bytes = found->second.bytes;
  return kSuccess;
}

int cudaMemcpyToSymbol(const void* symbol, const void* from, size_t bytes, size_t offset, int) {
  void* to = nullptr;
  size_t size = 0;
  if (const int error = cudaGetSymbolAddress(&to, symbol)) return error;
  if (const int error = cudaGetSymbolSize(&size, symbol)) return error;
  if (offset > size || bytes > size - offset) {
    return fail(kInvalidValue, "cudaMemcpyToSymbol: past the end of the variable");
  }
  std::memcpy(static_cast<char*>(to) + offset, from, bytes);
  return kSuccess;
}

int cudaMemcpyToSymbolAsync(const void* symbol, const void* from, size_t bytes, size_t offset,
                            int kind, void*) {
  return cudaMemcpyToSymbol(symbol, from, bytes, offset, kind);
}

int cudaMemcpyFromSymbol(void* to, const void* symbol, size_t bytes, size_t offset, int) {
  void* from = nullptr;
  size_t size = 0;
  if (const int error = cudaGetSymbolAddress(&from, symbol)) return error;
  if (const int error = cudaGetSymbolSize(&size, symbol)) return error;
  if (offset > size || bytes > size - offset) {
    return fail(kInvalidValue, "cudaMemcpyFromSymbol: past the end of the variable");
  }
  std::memcpy(to, static_cast<char*>(from) + offset, bytes);
  return kSuccess;
}
}
