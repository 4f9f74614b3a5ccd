#include "global_shadow.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>

#include "address_sources.h"

namespace llmkern {
namespace emulator {

void Freed::operator()(void* p) const {
  if (mapped == 0) {
    std::free(p);
  } else {
    munmap(p, mapped);
  }
}

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

struct Found {
  int64_t later;  // position of the later CTA
  uint64_t address;
  int32_t index, other;  // the later CTA's instruction, and the earlier one's
  const char* what;
};

constexpr const char* kStores = "two CTAs store different values to";
constexpr const char* kReads = "one CTA stores and another one reads";
constexpr const char* kAtomics = "one CTA's atomic meets another one's plain access at";

void note_race(const Launch& launch, const Found& found) {
  GlobalRace& race = launch.race;
  const std::lock_guard<std::mutex> guard(race.mutex);
  if (race.later >= 0 &&
      (race.later < found.later || (race.later == found.later && race.address <= found.address)))
    return;
  race.later = found.later;
  race.address = found.address;
  race.index = found.index;
  race.other = found.other;
  race.what = found.what;
}

// Calls f(allocation, lanes) for the lanes of each allocation, under its lock. Lanes outside all of
// them are left out: bounds are not checked then.
template <class F>
void for_allocations(Warp& w, const Accesses& accesses, const F& f) {
  const uint64_t* address = accesses.address;
  const auto size = static_cast<uint64_t>(accesses.bytes);
  uint32_t mask = accesses.mask;
  while (mask != 0) {
    const Allocation* a = w.launch->registry.find(address[__builtin_ctz(mask)], size);
    if (a == nullptr) {
      mask &= mask - 1;
      continue;
    }
    uint32_t inside = 0;
    for_lanes(mask, [&](int l) {
      inside |= uint32_t{address[l] >= a->begin && address[l] + size <= a->end} << l;
    });
    const Locked locked(a, w.options->threads > 1);
    f(*a, inside);
    mask &= ~inside;
  }
}

// For each `bytes` of an allocation. What is kept of a large tensor may pass the machine's memory
// many times, most of it untouched: then it is mapped, and promised nothing.
constexpr uint64_t kMapped = 1 << 26;

template <class T>
std::unique_ptr<T[], Freed> zeroed(const Allocation& a, uint64_t bytes) {
  const uint64_t count = (a.end - a.begin + bytes - 1) / bytes;
  Freed freed;
  void* found = nullptr;
  if (count * sizeof(T) < kMapped) {
    found = std::calloc(count, sizeof(T));
  } else {
    freed.mapped = count * sizeof(T);
    found = mmap(nullptr, freed.mapped, PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (found == MAP_FAILED) found = nullptr;
  }
  if (found == nullptr) throw std::bad_alloc();
  return {static_cast<T*>(found), freed};
}

// Calls f(element, value) for each shadow element of a lane's bytes; value: what `data` holds
// there. T: an unsigned integer of a granule's size.
template <class T, class F>
void for_elements(const Allocation& a, uint64_t address, int bytes, const char* data, const F& f) {
  constexpr int kBytes = static_cast<int>(sizeof(T));
  const uint64_t first = (address - a.begin) / sizeof(T);
  for (int at = 0; at < bytes; at += kBytes) {
    uint64_t bits = 0;
    if (bytes >= kBytes) {
      T whole;
      std::memcpy(&whole, data + at, sizeof whole);
      bits = whole;
    } else {
      std::memcpy(&bits, data, static_cast<size_t>(bytes));
    }
    f(first + static_cast<uint64_t>(at / kBytes), static_cast<uint32_t>(bits ^ bits >> 32));
  }
}

template <class F>
void by_granule(const Allocation& a, const F& f) {
  switch (a.granule) {
    case 1:
      return f(uint8_t{});
    case 2:
      return f(uint16_t{});
    case 4:
      return f(uint32_t{});
    default:
      return f(uint64_t{});
  }
}

// Without order between CTAs.

constexpr uint64_t kBlock = 16;

StoredBlock stored(const Allocation& a, uint64_t element) {
  if (a.blocks == nullptr) return {};
  const StoredBlock& block = a.blocks[element * a.granule / kBlock];
  if (block.after_position != kSplit) return block;
  return {a.stores[element].after_position, a.stores[element].index};
}

// Whether the record of the block can stand for the store of it.
bool note_block(Warp& w, const Instr& in, const Allocation& a, uint64_t offset, const char* data) {
  const auto mine = static_cast<uint32_t>(w.cta->position + 1);
  StoredBlock& block = a.blocks[offset / kBlock];
  if (a.reads != nullptr || (block.after_position != 0 && block.after_position != mine))
    return false;
  block = {mine, in.index};
  std::memcpy(&a.values[offset], data, kBlock);
  return true;
}

template <class T>
void split(const Allocation& a, uint64_t number) {
  StoredBlock& block = a.blocks[number];
  if (block.after_position == kSplit) return;
  if (a.stores == nullptr) a.stores = zeroed<StoreRecord>(a, a.granule);
  if (block.after_position != 0) {
    const auto note = [&](uint64_t element, uint32_t value) {
      a.stores[element] = {block.after_position, value, block.index};
    };
    for_elements<T>(a, a.begin + number * kBlock, kBlock, &a.values[number * kBlock], note);
  }
  block.after_position = kSplit;
}

void note_read(Warp& w, const Instr& in, const Allocation& a, uint64_t element) {
  const auto mine = static_cast<uint32_t>(w.cta->position + 1);
  const StoredBlock store = stored(a, element);
  const uint32_t writer = store.after_position;
  if (writer == mine) return;  // its own value
  ReadRecord& read = a.reads[element];
  if (writer != 0) {
    const bool later = mine > writer;
    note_race(*w.launch, {std::max(writer, mine) - 1, a.begin + element * a.granule,
                          later ? in.index : store.index, later ? store.index : in.index, kReads});
  }
  if (read.first == mine || read.second == mine) return;
  if (read.first == 0 || mine < read.first) {
    read = {mine, read.first, in.index, read.first_index};
  } else if (read.second == 0 || mine < read.second) {
    read.second = mine;
    read.second_index = in.index;
  }
}

void note_store(Warp& w, const Instr& in, const Allocation& a, uint64_t element, uint32_t value) {
  const auto mine = static_cast<uint32_t>(w.cta->position + 1);
  StoreRecord& record = a.stores[element];
  const uint32_t theirs = record.after_position;
  if (theirs != 0 && theirs != mine && record.value != value) {
    const bool later = mine > theirs;
    note_race(*w.launch,
              {std::max(theirs, mine) - 1, a.begin + element * a.granule,
               later ? in.index : record.index, later ? record.index : in.index, kStores});
  }
  if (a.reads != nullptr) {
    const ReadRecord& read = a.reads[element];
    const bool first = read.first != 0 && read.first != mine;
    const uint32_t reader = first ? read.first : read.second;
    const int32_t index = first ? read.first_index : read.second_index;
    if (reader != 0 && reader != mine) {
      const bool later = mine > reader;
      note_race(*w.launch, {std::max(reader, mine) - 1, a.begin + element * a.granule,
                            later ? in.index : index, later ? index : in.index, kReads});
    }
  }
  if (theirs == 0 || mine <= theirs) record = {mine, value, in.index};
}

template <class T>
void note_lane(Warp& w, const Instr& in, const Allocation& a, uint64_t address, int bytes,
               const char* data) {
  const auto step = static_cast<uint64_t>(bytes);
  const bool whole = step % kBlock == 0 && (address - a.begin) % kBlock == 0;
  for (uint64_t at = 0; at < step; at += kBlock) {
    if (whole && note_block(w, in, a, address - a.begin + at, data + at)) continue;
    const auto note = [&](uint64_t element, uint32_t value) {
      split<T>(a, element * sizeof(T) / kBlock);
      note_store(w, in, a, element, value);
    };
    for_elements<T>(a, address + at, static_cast<int>(std::min(step, kBlock)), data + at, note);
  }
}

template <class T>
void note_stores(Warp& w, const Instr& in, const Allocation& a, const Accesses& accesses,
                 uint32_t lanes, const char* data, int stride) {
  if (a.blocks == nullptr) {
    a.blocks = zeroed<StoredBlock>(a, kBlock);
    a.values = zeroed<char>(a, 1);
  }
  const int bytes = accesses.bytes, together = static_cast<int>(kBlock) / bytes;
  const bool by_block = accesses.pattern.row && lanes == kAllLanes && together > 1 &&
                        bytes >= static_cast<int>(sizeof(T)) &&
                        (accesses.address[0] - a.begin) % kBlock == 0;
  if (!by_block) {
    return for_lanes(lanes, [&](int l) {
      note_lane<T>(w, in, a, accesses.address[l], bytes, data + l * stride);
    });
  }
  for (int first = 0; first < kLanes; first += together) {
    char block[kBlock];
    for (int l = 0; l < together; ++l)
      std::memcpy(block + l * bytes, data + (first + l) * stride, static_cast<size_t>(bytes));
    note_lane<T>(w, in, a, accesses.address[first], static_cast<int>(kBlock), block);
  }
}

// With order.

void note_ordered(Warp& w, const Instr& in, const Allocation& a, uint64_t element, uint32_t value,
                  GlobalAccessKind kind) {
  if (a.order == nullptr) a.order = zeroed<OrderRecord>(a, a.granule);
  OrderRecord& record = a.order[element];
  const GlobalAccess* other = w.launch->order->touch(w, in, kind, value, &record);
  if (other == nullptr) return;
  const bool plain = kind == GlobalAccessKind::kRead || kind == GlobalAccessKind::kStore;
  const char* what = !plain || other == &record.atomic                            ? kAtomics
                     : kind == GlobalAccessKind::kStore && other == &record.store ? kStores
                                                                                  : kReads;
  note_race(*w.launch,
            {w.cta->position, a.begin + element * a.granule, in.index, other->index, what});
}

}  // namespace

void prepare_global_races(Launch* launch) {
  if (!launch->options.global_races) return;
  const int64_t ctas = int64_t{launch->grid[0]} * launch->grid[1] * launch->grid[2];
  if (launch->kernel->has_global_atomics) {
    if (ctas > kMostOrderedCtas) return;
    launch->order = std::make_unique<GlobalOrder>(ctas, launch->warps());
  }
  launch->follow = reads_of_stored_memory(*launch);
}

void record_global_reads(Warp& w, const Instr& in, const Accesses& accesses) {
  const uint64_t* address = accesses.address;
  const int bytes = accesses.bytes;
  for_allocations(w, accesses, [&](const Allocation& a, uint32_t lanes) {
    if (w.launch->order == nullptr && a.reads == nullptr)
      a.reads = zeroed<ReadRecord>(a, a.granule);
    const auto granule = static_cast<uint64_t>(a.granule);
    for_lanes(lanes, [&](int l) {
      const uint64_t first = (address[l] - a.begin) / granule;
      const uint64_t last = (address[l] - a.begin + static_cast<uint64_t>(bytes) - 1) / granule;
      for (uint64_t element = first; element <= last; ++element) {
        if (w.launch->order == nullptr) {
          note_read(w, in, a, element);
        } else {
          note_ordered(w, in, a, element, 0, GlobalAccessKind::kRead);
        }
      }
    });
  });
}

void record_global_stores(Warp& w, const Instr& in, const Accesses& accesses, const char* data,
                          int stride) {
  if (w.launch->kernel->has_global_atomics && w.launch->order == nullptr) return;
  for_allocations(w, accesses, [&](const Allocation& a, uint32_t lanes) {
    by_granule(a, [&](auto granule) {
      using T = decltype(granule);
      if (w.launch->order == nullptr)
        return note_stores<T>(w, in, a, accesses, lanes, data, stride);
      for_lanes(lanes, [&](int l) {
        const auto note = [&](uint64_t element, uint32_t value) {
          note_ordered(w, in, a, element, value, GlobalAccessKind::kStore);
        };
        for_elements<T>(a, accesses.address[l], accesses.bytes, data + l * stride, note);
      });
    });
  });
}

void record_global_atomics(Warp& w, const Instr& in, const Accesses& accesses,
                           GlobalAccessKind kind) {
  const uint64_t* address = accesses.address;
  const int bytes = accesses.bytes;
  GlobalOrder& order = *w.launch->order;
  for_allocations(w, accesses, [&](const Allocation& a, uint32_t lanes) {
    if (a.order == nullptr) a.order = zeroed<OrderRecord>(a, a.granule);
    const auto record = [&](int l) -> OrderRecord& {
      return a.order[(address[l] - a.begin) / a.granule];
    };
    if (kind != GlobalAccessKind::kAtomicStore) {
      uint32_t last = 0;
      for_lanes(lanes, [&](int l) {
        if (record(l).release != last) order.learn(w, in, last = record(l).release);
      });
    }
    // A wider word is compared and swapped to change one of its elements, which one is not known.
    if (bytes <= static_cast<int>(a.granule)) {
      for_lanes(lanes, [&](int l) {
        note_ordered(w, in, a, (address[l] - a.begin) / a.granule, 0, kind);
      });
    }
    if (kind == GlobalAccessKind::kAtomicRead) return;
    const bool stores = kind == GlobalAccessKind::kAtomicStore;
    uint32_t before = 0, release = order.hand_on(w, in, 0);
    for_lanes(lanes, [&](int l) {
      uint32_t& at = record(l).release;
      if (!stores && at != release && at != before) release = order.hand_on(w, in, before = at);
      if (release != 0 || stores) at = release;
    });
  });
}

}  // namespace emulator
}  // namespace llmkern
