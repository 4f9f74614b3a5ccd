// Global memory: the allocations that a launch may touch, and who wrote them.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "global_order.h"
#include "ir.h"

namespace llmkern {
namespace emulator {

// A tensor as the caller knows it; several may lie in one allocation.
struct Tensor {
  std::string name;
  uint64_t begin = 0, end = 0;
  uint32_t element_bytes = 1;
  uint8_t* written = nullptr;  // a byte for each element, kept by the caller; or null
};

// The earliest CTA that stored an element in this launch, and what it stored. All zero: nobody.
struct StoreRecord {
  uint32_t after_position;  // position + 1
  uint32_t value;           // folded to 32 bits
  int32_t index;            // instruction
};

// Of 16 bytes that one CTA stored as a whole, the values apart from it. All zero: nobody.
struct StoredBlock {
  uint32_t after_position;  // or kSplit: each element has a record of its own
  int32_t index;
};
constexpr uint32_t kSplit = ~uint32_t{0};

// The two earliest CTAs that read an element before they stored it.
struct ReadRecord {
  uint32_t first, second;  // position + 1
  int32_t first_index, second_index;
};

// Of zeroed memory: from calloc, or mapped if that many bytes.
struct Freed {
  size_t mapped = 0;
  void operator()(void* p) const;
};

struct Allocation {
  uint64_t begin = 0, end = 0;
  uint32_t granule = 1;  // bytes of a shadow element, a power of two
  std::vector<Tensor> tensors;
  mutable std::atomic_flag lock = ATOMIC_FLAG_INIT;
  uint8_t* written = nullptr;  // of its only tensor
  // Made, zeroed, at the first access.
  mutable std::unique_ptr<StoredBlock[], Freed> blocks;
  mutable std::unique_ptr<char[], Freed> values;  // of the blocks
  mutable std::unique_ptr<StoreRecord[], Freed> stores;
  mutable std::unique_ptr<ReadRecord[], Freed> reads;
  mutable std::unique_ptr<OrderRecord[], Freed> order;
};

class Registry {
 public:
  // Overlapping tensors become one allocation. `slack`: round ends to 4 bytes.
  void build(std::vector<Tensor> tensors, bool slack);
  const Allocation* find(uint64_t address, uint64_t bytes) const;
  // "x + 4096 bytes, element [1024] of 1024 ..." for reports.
  std::string describe(uint64_t address) const;

 private:
  std::vector<std::unique_ptr<Allocation>> allocations_;  // by begin
};

}  // namespace emulator
}  // namespace llmkern
