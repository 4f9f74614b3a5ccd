#include "address_sources.h"

#include <algorithm>
#include <cstring>
#include <unordered_map>

namespace llmkern {
namespace emulator {
namespace {

constexpr size_t kMostPointers = 64;  // bits of Instr::sources; further ones are not told apart

bool is_global(const Instr& in) {
  return in.space == Space::kGlobal || in.space == Space::kGeneric || in.space == Space::kConst;
}
bool stores(const Instr& in) {
  return (in.klass == Class::kGlobalStore || in.klass == Class::kAtomic) && is_global(in);
}
bool loads(const Instr& in) {
  const bool copies = in.klass == Class::kAsyncCopy && in.operands == 3;
  return copies || (in.klass == Class::kGlobalLoad && is_global(in));
}

// A parameter of 8 bytes that `in` loads: its place, or -1.
int64_t pointer_loaded(const Instr& in) {
  const bool whole = in.klass == Class::kParam && in.mode == kWholeParameter && in.bytes == 8;
  return whole ? in.imm : -1;
}

}  // namespace

void find_address_sources(Kernel* kernel) {
  std::unordered_map<uint32_t, uint64_t> of;  // register -> parameters
  for (Instr& in : kernel->code) {
    const int64_t at = pointer_loaded(in);
    if (at < 0) continue;
    auto& all = kernel->pointers;
    auto found = std::find(all.begin(), all.end(), at);
    if (found == all.end()) {
      if (all.size() == kMostPointers) continue;
      all.push_back(at);
      found = all.end() - 1;
    }
    of[in.r[0]] |= uint64_t{1} << (found - all.begin());
  }
  const auto sources = [&](const Instr& in, int first) {
    uint64_t bits = 0;
    for (int o = first; o < in.operands; ++o) {
      const auto found = of.find(in.r[o]);
      if (found != of.end()) bits |= found->second;
    }
    return bits;
  };
  for (bool changed = true; changed;) {
    changed = false;
    for (const Instr& in : kernel->code) {
      // What comes out of memory is no address of a parameter that is known.
      if (in.destinations == 0 || loads(in) || stores(in) || in.klass == Class::kParam) continue;
      const uint64_t bits = sources(in, in.destinations);
      if (bits == 0) continue;
      for (int o = 0; o < in.destinations; ++o) {
        uint64_t& mine = of[in.r[o]];
        changed = changed || (mine | bits) != mine;
        mine |= bits;
      }
    }
  }
  for (Instr& in : kernel->code) {
    if (!loads(in) && !stores(in)) continue;
    const int at = in.klass == Class::kAsyncCopy ? 1 : in.address;
    const auto found = of.find(in.r[at]);
    in.sources = found == of.end() ? 0 : found->second;
  }
}

std::vector<uint8_t> reads_of_stored_memory(const Launch& launch) {
  const Kernel& k = *launch.kernel;
  std::vector<const Allocation*> target;
  for (int64_t at : k.pointers) {
    uint64_t pointer = 0;
    std::memcpy(&pointer, launch.parameters.data() + at, sizeof pointer);
    target.push_back(launch.registry.find(pointer, 1));
  }
  // f(allocation) for each that the address may lie in; false if that is not known.
  const auto each = [&](const Instr& in, const auto& f) {
    bool known = false;
    for (size_t i = 0; i < target.size(); ++i) {
      if ((in.sources >> i & 1) == 0 || target[i] == nullptr) continue;
      known = true;
      f(target[i]);
    }
    return known;
  };
  std::vector<const Allocation*> stored;
  bool anything = false;
  for (const Instr& in : k.code) {
    if (stores(in)) anything |= !each(in, [&](const Allocation* a) { stored.push_back(a); });
  }
  std::sort(stored.begin(), stored.end());
  std::vector<uint8_t> follow(k.code.size());
  for (const Instr& in : k.code) {
    if (!loads(in)) continue;
    bool hit = anything;
    const bool known = each(in, [&](const Allocation* a) {
      hit = hit || std::binary_search(stored.begin(), stored.end(), a);
    });
    follow[static_cast<size_t>(in.index)] = hit || (!known && !stored.empty());
  }
  return follow;
}

}  // namespace emulator
}  // namespace llmkern
