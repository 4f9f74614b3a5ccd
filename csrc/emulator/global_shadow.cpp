#include "global_shadow.h"

#include <algorithm>
#include <cstring>

namespace llmkern {
namespace emulator {
namespace {

// Holds an allocation's lock while host threads share it.
class Locked {
 public:
  Locked(const Allocation* a, bool shared) : a_(shared ? a : nullptr) {
    while (a_ != nullptr && a_->lock.test_and_set(std::memory_order_acquire)) {
    }
  }
  ~Locked() {
    if (a_ != nullptr) a_->lock.clear(std::memory_order_release);
  }
  Locked(const Locked&) = delete;
  Locked& operator=(const Locked&) = delete;

 private:
  const Allocation* a_;
};

void note_race(const Launch& launch, int64_t later, uint64_t address, int32_t index) {
  GlobalRace& race = launch.race;
  const std::lock_guard<std::mutex> guard(race.mutex);
  if (race.later >= 0 && (race.later < later || (race.later == later && race.address <= address)))
    return;
  race.later = later;
  race.address = address;
  race.index = index;
}

struct Store {
  uint64_t address;
  int bytes;
  const char* data;
};

// T: an unsigned integer of a granule's size.
template <class T>
void record_store(Warp& w, const Instr& in, const Allocation& a, const Store& s) {
  const auto mine = static_cast<uint32_t>(w.cta->position + 1);
  constexpr int kBytes = static_cast<int>(sizeof(T));
  const uint64_t first = (s.address - a.begin) / sizeof(T);
  for (int at = 0; at < s.bytes; at += kBytes) {
    const uint64_t element = first + static_cast<uint64_t>(at / kBytes);
    StoreRecord& record = a.stores[element];
    uint64_t bits;
    if (s.bytes >= kBytes) {
      T whole;
      std::memcpy(&whole, s.data + at, sizeof whole);
      bits = whole;
    } else {
      bits = 0;
      std::memcpy(&bits, s.data, static_cast<size_t>(s.bytes));
    }
    const auto value = static_cast<uint32_t>(bits ^ bits >> 32);
    const uint32_t theirs = record.after_position;
    if (theirs != 0 && theirs != mine && record.value != value) {
      note_race(*w.launch, std::max(theirs, mine) - 1, a.begin + element * sizeof(T),
                theirs > mine ? record.index : in.index);
    }
    if (theirs == 0 || mine <= theirs) record = {mine, value, in.index};
  }
}

using RecordStore = void (*)(Warp&, const Instr&, const Allocation&, const Store&);

RecordStore recorder(uint32_t granule) {
  return granule == 1   ? &record_store<uint8_t>
         : granule == 2 ? &record_store<uint16_t>
         : granule == 4 ? &record_store<uint32_t>
                        : &record_store<uint64_t>;
}

}  // namespace

void record_global_stores(Warp& w, const Instr& in, uint32_t mask, const uint64_t* address,
                          int bytes, const char* data, int stride) {
  // Kernels with atomics may order their CTAs by them; their stores are left alone.
  if (w.launch->kernel->has_global_atomics) return;
  const auto size = static_cast<uint64_t>(bytes);
  while (mask != 0) {
    const Allocation* a = w.launch->registry.find(address[__builtin_ctz(mask)], size);
    if (a == nullptr) {  // bounds are not checked, and this is outside
      mask &= mask - 1;
      continue;
    }
    const Locked locked(a, w.options->threads > 1);
    if (a->stores == nullptr) {
      const uint64_t elements = (a->end - a->begin + a->granule - 1) / a->granule;
      a->stores.reset(static_cast<StoreRecord*>(std::calloc(elements, sizeof(StoreRecord))));
    }
    const RecordStore record = recorder(a->granule);
    for (uint32_t left = mask; left != 0; left &= left - 1) {
      const int l = __builtin_ctz(left);
      if (address[l] < a->begin || address[l] + size > a->end) continue;
      record(w, in, *a, {address[l], bytes, data + l * stride});
      mask &= ~(1u << l);
    }
  }
}

}  // namespace emulator
}  // namespace llmkern
