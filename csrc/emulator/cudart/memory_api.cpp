// Device memory is host memory: cudaMalloc keeps a list of what is live, copies check against it.
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

#include "runtime.h"

namespace llmkern {
namespace cudart {
namespace {

struct Heap {
  std::mutex lock;
  std::map<uint64_t, uint64_t> live;  // begin -> bytes
};

Heap& heap() {
  static Heap* one = new Heap;
  return *one;
}

constexpr size_t kAlignment = 256;  // of cudaMalloc
constexpr size_t kGap = 256;        // so that no two allocations touch: one's end is not the next

int allocate(void** out, size_t bytes) {
  *out = nullptr;
  if (!hooks()) return fail(kInsufficientDriver, "no emulated device is active");
  if (bytes == 0) return kSuccess;
  const size_t rounded = (bytes + kGap + kAlignment - 1) / kAlignment * kAlignment;
  void* p = rounded < bytes ? nullptr : std::aligned_alloc(kAlignment, rounded);
  if (!p) return fail(kMemoryAllocation, "cudaMalloc of " + std::to_string(bytes) + " bytes");
  // New device memory holds anything; all ones are NaN in every float type.
  std::memset(p, 0xff, rounded);
  const std::lock_guard<std::mutex> hold(heap().lock);
  heap().live[reinterpret_cast<uint64_t>(p)] = bytes;
  *out = p;
  return kSuccess;
}

int release(void* p) {
  if (!p) return kSuccess;
  {
    const std::lock_guard<std::mutex> hold(heap().lock);
    if (heap().live.erase(reinterpret_cast<uint64_t>(p)) == 0) {
      return fail(kInvalidValue, "cudaFree of memory that cudaMalloc did not give, or freed before");
    }
  }
  std::free(p);
  return kSuccess;
}

// Fails where [p, p + bytes) begins in an allocation and leaves it. Other memory is the host's.
int check(const char* what, const void* p, size_t bytes) {
  const uint64_t at = reinterpret_cast<uint64_t>(p);
  const std::lock_guard<std::mutex> hold(heap().lock);
  auto next = heap().live.upper_bound(at);
  if (next == heap().live.begin()) return kSuccess;
  const auto& [begin, size] = *std::prev(next);
  if (at >= begin + size || bytes <= begin + size - at) return kSuccess;
  return fail(kInvalidValue, std::string(what) + ": past the end of an allocation of " +
                                 std::to_string(size) + " bytes");
}

}  // namespace
}  // namespace cudart
}  // namespace llmkern

using namespace llmkern::cudart;

extern "C" {

size_t llmkern_cudart_allocations(uint64_t* begins, uint64_t* bytes, size_t capacity) {
  const std::lock_guard<std::mutex> hold(heap().lock);
  size_t n = 0;
  for (const auto& [begin, size] : heap().live) {
    if (n < capacity) {
      begins[n] = begin;
      bytes[n] = size;
    }
    ++n;
  }
  return n;
}

int cudaMalloc(void** out, size_t bytes) { return allocate(out, bytes); }
int cudaMallocAsync(void** out, size_t bytes, void*) { return allocate(out, bytes); }
int cudaMallocManaged(void** out, size_t bytes, unsigned) { return allocate(out, bytes); }
int cudaMallocHost(void** out, size_t bytes) { return allocate(out, bytes); }
int cudaHostAlloc(void** out, size_t bytes, unsigned) { return allocate(out, bytes); }
int cudaFree(void* p) { return release(p); }
int cudaFreeAsync(void* p, void*) { return release(p); }
int cudaFreeHost(void* p) { return release(p); }

int cudaMemcpy(void* to, const void* from, size_t bytes, int kind) {
  constexpr int kKinds = 5;
  if (kind < 0 || kind >= kKinds) return fail(kInvalidMemcpyDirection, "cudaMemcpy");
  if (const int error = check("cudaMemcpy: destination", to, bytes)) return error;
  if (const int error = check("cudaMemcpy: source", from, bytes)) return error;
  std::memmove(to, from, bytes);
  return kSuccess;
}

int cudaMemcpyAsync(void* to, const void* from, size_t bytes, int kind, void*) {
  return cudaMemcpy(to, from, bytes, kind);
}

int cudaMemset(void* p, int value, size_t bytes) {
  if (const int error = check("cudaMemset", p, bytes)) return error;
  std::memset(p, value, bytes);
  return kSuccess;
}

int cudaMemsetAsync(void* p, int value, size_t bytes, void*) {
  return cudaMemset(p, value, bytes);
}

int cudaMemGetInfo(size_t* free_bytes, size_t* total) {
  if (!hooks()) return fail(kInsufficientDriver, "no emulated device is active");
  *free_bytes = *total = size_t{16} << 30;
  return kSuccess;
}
}
