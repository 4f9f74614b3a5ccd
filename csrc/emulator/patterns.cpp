#include "patterns.h"

#include <algorithm>

#include "machine.h"

namespace llmkern {
namespace emulator {
namespace {

constexpr size_t kMostKept = 4096;
constexpr int kSector = 32, kBanks = 32, kBankBytes = 4;

// Distinct values of v[0..n), which is sorted in place if it is not.
int distinct(uint64_t* v, int n) {
  if (!std::is_sorted(v, v + n)) std::sort(v, v + n);
  int count = n > 0;
  for (int i = 1; i < n; ++i) count += v[i] != v[i - 1];
  return count;
}

// Passes of the banks over one phase: the most distinct units that one of `banks` has to give.
int passes(const uint32_t* units, int n, uint32_t banks, int* different) {
  uint32_t seen[kBanks][kLanes];
  uint8_t count[kBanks] = {};
  int most = 0, total = 0;
  for (int i = 0; i < n; ++i) {
    const uint32_t bank = units[i] & (banks - 1);
    bool known = false;
    for (int j = 0; j < count[bank] && !known; ++j) known = seen[bank][j] == units[i];
    if (known) continue;
    seen[bank][count[bank]++] = units[i];
    most = std::max<int>(most, count[bank]);
    ++total;
  }
  *different = total;
  return most;
}

void count_sectors(const uint64_t* address, Pattern* p) {
  uint64_t where[kLanes], sectors[kLanes];
  int n = 0;
  for_lanes(p->mask, [&](int l) { where[n++] = address[l]; });
  const auto step = static_cast<uint64_t>(p->bytes);
  p->total = static_cast<uint32_t>(n * p->bytes);
  bool in_row = true;
  for (int i = 1; i < n; ++i) in_row = in_row && where[i] == where[i - 1] + step;
  if (in_row) {
    p->passes = static_cast<uint32_t>((where[n - 1] + step - 1) / kSector - where[0] / kSector + 1);
    p->ideal = (p->total + kSector - 1) / kSector;
    return;
  }
  const auto different = static_cast<uint32_t>(distinct(where, n) * p->bytes);
  for (int i = 0; i < n; ++i) sectors[i] = where[i] / kSector;
  p->passes = static_cast<uint32_t>(distinct(sectors, n));
  p->ideal = (different + kSector - 1) / kSector;
}

// Wider accesses go in phases of 128 bytes: half warps for 8 bytes, quarters for 16. A unit is what
// a lane takes, at least a word; it fills as many banks as it has words.
void count_wavefronts(const uint64_t* address, Pattern* p) {
  const int unit = std::min(std::max(p->bytes, kBankBytes), kSector),
            lanes = kBanks * kBankBytes / unit;
  const int shift = __builtin_ctz(static_cast<unsigned>(unit));
  for (int begin = 0; begin < kLanes; begin += lanes) {
    uint32_t units[kLanes];
    int n = 0, different = 0;
    for (int l = begin; l < begin + lanes; ++l) {
      if ((p->mask >> l & 1) != 0) units[n++] = static_cast<uint32_t>(address[l] >> shift);
    }
    if (n == 0) continue;
    p->total += static_cast<uint32_t>(n * p->bytes);
    p->passes += static_cast<uint32_t>(passes(units, n, static_cast<uint32_t>(lanes), &different));
    p->ideal += static_cast<uint32_t>((different + lanes - 1) / lanes);
  }
}

// Accesses are aligned: a lane's bytes lie in one granule or fill two.
void find_granules(const uint64_t* address, Pattern* p) {
  std::pair<int, uint16_t> found[kMostGranules];
  int n = 0;
  p->apart = true;
  const int64_t base = static_cast<int64_t>(address[p->first] / kGranuleBytes);
  for_lanes(p->mask, [&](int l) {
    for (int at = 0; at < p->bytes; at += kGranuleBytes) {
      const uint64_t begin = address[l] + static_cast<uint64_t>(at);
      const auto granule = static_cast<int>(static_cast<int64_t>(begin / kGranuleBytes) - base);
      const uint32_t all = (1u << std::min(p->bytes, kGranuleBytes)) - 1;
      const auto bytes = static_cast<uint16_t>(all << (begin % kGranuleBytes));
      int i = n - 1;
      while (i >= 0 && found[i].first != granule) --i;
      if (i < 0) {
        found[n++] = {granule, bytes};
        continue;
      }
      p->apart = p->apart && (found[i].second & bytes) == 0;
      found[i].second |= bytes;
    }
  });
  std::sort(found, found + n);
  p->granules = n;
  p->dense = found[n - 1].first - found[0].first == n - 1;
  for (int i = 0; i < n; ++i) {
    const uint32_t bytes = found[i].second;
    p->granule[i] = static_cast<int16_t>(found[i].first);
    p->touched[i] = found[i].second;
    p->units[i] = 0;
    for (int unit = 0; unit < 8; ++unit) {
      if ((bytes >> (2 * unit) & 3) != 0) p->units[i] |= static_cast<uint8_t>(1 << unit);
    }
    p->dense = p->dense && bytes == 0xffff;
  }
}

void work_out(const uint64_t* address, Pattern* p) {
  const uint64_t base = address[p->first];
  uint64_t bits = base, apart = 0;
  int64_t lowest = 0, highest = 0;
  for_lanes(p->mask, [&](int l) {
    p->relative[l] = address[l] - base;
    lowest = std::min(lowest, static_cast<int64_t>(p->relative[l]));
    highest = std::max(highest, static_cast<int64_t>(p->relative[l]));
    bits |= address[l];
    apart |= p->relative[l] ^ static_cast<uint64_t>(l * p->bytes);
  });
  p->lowest = static_cast<uint64_t>(lowest);
  p->highest = static_cast<uint64_t>(highest);
  p->aligned = (bits & static_cast<uint64_t>(p->bytes - 1)) == 0;
  p->row = p->mask == kAllLanes && apart == 0;
  if (!p->shared) return count_sectors(address, p);
  count_wavefronts(address, p);
  // Shared memory ends below 2^18: farther ones are out of bounds, which is found first.
  constexpr int64_t kFar = 1 << 18;
  if (p->aligned && lowest > -kFar && highest < kFar) find_granules(address, p);
}

}  // namespace

void Patterns::begin_launch(size_t slots) {
  slots_.assign(slots, nullptr);
  if (known_.size() >= kMostKept) known_.clear();
}

const Pattern& Patterns::search(size_t slot, uint32_t mask, const uint64_t* address, int bytes,
                                bool shared) {
  const int first = __builtin_ctz(mask);
  const uint64_t base = address[first];
  uint64_t hash = mask ^ (base & kLow) << 32 ^ static_cast<uint64_t>(bytes) << 40 ^
                  static_cast<uint64_t>(shared) << 48;
  for_lanes(mask, [&](int l) {
    hash = (hash ^ (address[l] - base)) * 0x9e3779b97f4a7c15u;
    hash ^= hash >> 29;
  });
  const auto same = known_.equal_range(hash);
  for (auto i = same.first; i != same.second; ++i) {
    const Pattern& p = *i->second;
    if (p.mask == mask && p.bytes == bytes && p.shared == shared && fits(p, address))
      return *(slots_[slot] = &p);
  }
  std::unique_ptr<Pattern> made;
  Pattern* p = &scratch_[next_scratch_++ % 4];
  if (known_.size() < kMostKept) {
    made = std::make_unique<Pattern>();
    p = made.get();
  }
  *p = Pattern();
  p->kept = made != nullptr;
  p->mask = mask;
  p->first = first;
  p->bytes = bytes;
  p->low = static_cast<uint32_t>(base & kLow);
  p->shared = shared;
  work_out(address, p);
  slots_[slot] = p->kept ? p : nullptr;
  if (made != nullptr) known_.emplace(hash, std::move(made));
  return *p;
}

}  // namespace emulator
}  // namespace llmkern
