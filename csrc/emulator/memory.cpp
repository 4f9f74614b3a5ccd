#include "memory.h"

#include <algorithm>

namespace llmkern {
namespace emulator {
namespace {

uint32_t granule_of(const Tensor& t) {
  const uint32_t bytes = std::min(t.element_bytes, 8u);
  return bytes & (0u - bytes);
}

}  // namespace

void Registry::build(std::vector<Tensor> tensors, bool slack) {
  std::sort(tensors.begin(), tensors.end(), [](const Tensor& a, const Tensor& b) {
    return a.begin != b.begin ? a.begin < b.begin : a.end > b.end;
  });
  allocations_.clear();
  for (Tensor& t : tensors) {
    if (t.end <= t.begin) continue;
    if (!allocations_.empty() && t.begin < allocations_.back()->end) {
      Allocation& last = *allocations_.back();
      last.end = std::max(last.end, t.end);
      last.granule = std::min(last.granule, granule_of(t));
      last.written = nullptr;
      last.tensors.push_back(std::move(t));
      continue;
    }
    auto a = std::make_unique<Allocation>();
    a->begin = t.begin;
    a->end = t.end;
    a->granule = granule_of(t);
    a->written = t.written;
    a->tensors.push_back(std::move(t));
    allocations_.push_back(std::move(a));
  }
  if (!slack) return;
  for (auto& a : allocations_) {
    a->written = nullptr;  // its first element would no longer be at the begin
    a->begin &= ~uint64_t{3};
    a->end = (a->end + 3) & ~uint64_t{3};
  }
}

const Allocation* Registry::find(uint64_t address, uint64_t bytes) const {
  auto after = std::upper_bound(
      allocations_.begin(), allocations_.end(), address,
      [](uint64_t v, const std::unique_ptr<Allocation>& a) { return v < a->begin; });
  if (after == allocations_.begin()) return nullptr;
  const Allocation* a = std::prev(after)->get();
  return address + bytes <= a->end && address + bytes > address ? a : nullptr;
}

std::string Registry::describe(uint64_t address) const {
  const Tensor* best = nullptr;
  uint64_t best_distance = ~uint64_t{0};
  for (const auto& a : allocations_) {
    for (const Tensor& t : a->tensors) {
      const uint64_t distance =
          address < t.begin ? t.begin - address : (address < t.end ? 0 : address - t.end + 1);
      if (distance < best_distance) {
        best_distance = distance;
        best = &t;
      }
    }
  }
  if (best == nullptr) return "no tensor is known to this launch";
  const auto offset = static_cast<int64_t>(address - best->begin);
  const auto element = static_cast<int64_t>(best->element_bytes);
  const auto size = static_cast<int64_t>(best->end - best->begin);
  std::string text = best->name + (offset < 0 ? " - " : " + ") +
                     std::to_string(offset < 0 ? -offset : offset) + " bytes";
  if (best_distance == 0) {
    text += " (element " + std::to_string(offset / element) + ")";
  } else if (offset < 0) {
    text += " (before its begin)";
  } else {
    text += " (" + std::to_string(offset - size) + " bytes past its end at " +
            std::to_string(size) + ")";
  }
  return text;
}

}  // namespace emulator
}  // namespace llmkern
