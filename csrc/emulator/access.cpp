#include "access.h"

#include <algorithm>
#include <cstring>

#include "global_shadow.h"

namespace llmkern {
namespace emulator {
namespace {

constexpr int kSector = 32, kBanks = 32, kBankBytes = 4;

std::string hex(uint64_t v) {
  char text[24];
  std::snprintf(text, sizeof text, "0x%llx", static_cast<unsigned long long>(v));
  return text;
}

[[noreturn]] void fail(const char* check, const std::string& message, int lane) {
  throw Fault{check, message, lane, -1};
}

struct Range {
  uint64_t lowest = ~uint64_t{0}, highest = 0, bits = 0;
};

Range range_of(const Accesses& a) {
  const uint64_t* address = a.address;
  if (a.row) return {address[0], address[kLanes - 1], address[0] | static_cast<uint64_t>(a.bytes)};
  Range r;
  const auto include = [&](int l) {
    r.lowest = std::min(r.lowest, address[l]);
    r.highest = std::max(r.highest, address[l]);
    r.bits |= address[l];
  };
  if (a.mask == kAllLanes) {
    for (int l = 0; l < kLanes; ++l) include(l);
  } else {
    for_lanes(a.mask, include);
  }
  return r;
}

void check_alignment(const Accesses& a, const Range& range, const char* verb, const char* memory) {
  const auto low = static_cast<uint64_t>(a.bytes - 1);
  if ((range.bits & low) == 0) return;
  for_lanes(a.mask, [&](int l) {
    if ((a.address[l] & low) != 0) {
      fail("misaligned",
           std::string(verb) + " of " + std::to_string(a.bytes) + " bytes in " + memory +
               " memory at " + hex(a.address[l]),
           l);
    }
  });
}

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

}  // namespace

void effective_addresses(Warp& w, const Instr& in, uint64_t* address) {
  if (in.wide_address) {
    const uint64_t* base = w.at<uint64_t>(in.r[in.address]);
    for (int l = 0; l < kLanes; ++l) address[l] = base[l] + static_cast<uint64_t>(in.imm);
  } else {
    const uint32_t* base = w.at<uint32_t>(in.r[in.address]);
    const auto offset = static_cast<uint32_t>(in.imm);
    for (int l = 0; l < kLanes; ++l) address[l] = base[l] + offset;
  }
}

namespace {

// Elements of a tracked tensor: a store sets them, a load wants them set.
void follow_written(Warp& w, const Allocation& a, uint32_t mask, const uint64_t* address, int bytes,
                    Access access) {
  const uint64_t element = a.tensors[0].element_bytes;
  for_lanes(mask, [&](int l) {
    const uint64_t first = (address[l] - a.begin) / element;
    const uint64_t last = (address[l] - a.begin + static_cast<uint64_t>(bytes) - 1) / element;
    for (uint64_t e = first; e <= last; ++e) {
      if (access == Access::kWrite) {
        a.written[e] = 1;
      } else if (a.written[e] == 0 && w.options->uninitialised) {
        fail("uninitialised global memory",
             "nothing has written " + w.launch->registry.describe(address[l]), l);
      }
    }
  });
}

}  // namespace

void check_global(Warp& w, const Instr& in, const Accesses& a, Access access) {
  static const char* verbs[] = {"read", "write", "atomic", "cp.async read"};
  const char* verb = verbs[static_cast<int>(access)];
  if (!w.options->bounds) return;
  const uint64_t* address = a.address;
  const auto size = static_cast<uint64_t>(a.bytes);
  const Range range = range_of(a);
  const Allocation*& hint = w.worker->hints[static_cast<size_t>(in.index)];
  const bool hit = hint != nullptr && range.lowest >= hint->begin &&
                   range.highest <= hint->end - size && hint->end - hint->begin >= size;
  if (!hit) {
    for_lanes(a.mask, [&](int l) {
      hint = w.launch->registry.find(address[l], size);
      if (hint == nullptr) {
        fail("out of bounds",
             std::string(verb) + " of " + std::to_string(a.bytes) + " bytes of global memory at " +
                 hex(address[l]) + ": " + w.launch->registry.describe(address[l]),
             l);
      }
      if (hint->written != nullptr) follow_written(w, *hint, 1u << l, address, a.bytes, access);
    });
  } else if (hint->written != nullptr) {
    follow_written(w, *hint, a.mask, address, a.bytes, access);
  }
  check_alignment(a, range, verb, "global");
}

void check_shared(Warp& w, const Accesses& a, const char* verb) {
  const auto end = static_cast<uint64_t>(w.launch->shared_bytes());
  const auto size = static_cast<uint64_t>(a.bytes);
  const Range range = range_of(a);
  if (range.highest + size > end || range.highest + size < size) {
    for_lanes(a.mask, [&](int l) {
      if (a.address[l] + size <= end && a.address[l] + size >= size) return;
      fail("out of bounds",
           std::string(verb) + " of " + std::to_string(a.bytes) + " bytes of shared memory at " +
               hex(a.address[l]) + ", which ends at " + hex(end),
           l);
    });
  }
  check_alignment(a, range, verb, "shared");
}

void count_row(Count& c, uint64_t begin, uint64_t bytes) {
  c.bytes += bytes;
  c.sectors += (begin + bytes - 1) / kSector - begin / kSector + 1;
  c.ideal_sectors += (bytes + kSector - 1) / kSector;
}

void count_global(Warp& w, const Instr& in, const Accesses& a) {
  if (!w.options->counters) return;
  Count& c = w.worker->counts[static_cast<size_t>(in.index)];
  const int bytes = a.bytes;
  const auto step = static_cast<uint64_t>(bytes);
  if (a.row) return count_row(c, a.address[0], kLanes * step);
  uint64_t where[kLanes], sectors[kLanes];
  int n = 0;
  for_lanes(a.mask, [&](int l) { where[n++] = a.address[l]; });
  bool in_row = true;
  for (int i = 1; i < n; ++i) in_row = in_row && where[i] == where[i - 1] + step;
  if (in_row) return count_row(c, where[0], static_cast<uint64_t>(n) * step);
  c.bytes += static_cast<uint64_t>(n * bytes);
  const int different = distinct(where, n);
  for (int i = 0; i < n; ++i) sectors[i] = where[i] / kSector;
  c.sectors += static_cast<uint64_t>(distinct(sectors, n));
  c.ideal_sectors += static_cast<uint64_t>((different * bytes + kSector - 1) / kSector);
}

void count_shared(Warp& w, const Instr& in, const Accesses& a) {
  if (!w.options->counters) return;
  Count& c = w.worker->counts[static_cast<size_t>(in.index)];
  const uint32_t mask = a.mask;
  const uint64_t* address = a.address;
  const int bytes = a.bytes;
  // Wider accesses go in phases of 128 bytes: half warps for 8 bytes, quarters for 16. A unit is
  // what a lane takes, at least a word; it fills as many banks as it has words.
  const int unit = std::min(std::max(bytes, kBankBytes), kSector),
            lanes = kBanks * kBankBytes / unit;
  if (a.row) {  // one pass a phase
    const auto phases = static_cast<uint64_t>(kLanes / lanes);
    c.bytes += static_cast<uint64_t>(kLanes * bytes);
    c.wavefronts += phases;
    c.ideal_wavefronts += phases;
    return;
  }
  const int shift = __builtin_ctz(static_cast<unsigned>(unit));
  const auto banks = static_cast<uint32_t>(lanes);
  for (int begin = 0; begin < kLanes; begin += lanes) {
    uint32_t units[kLanes];
    int n = 0;
    if (mask == kAllLanes) {
      for (; n < lanes; ++n) units[n] = static_cast<uint32_t>(address[begin + n] >> shift);
    } else {
      for (int l = begin; l < begin + lanes; ++l) {
        if ((mask >> l & 1) != 0) units[n++] = static_cast<uint32_t>(address[l] >> shift);
      }
    }
    if (n == 0) continue;
    c.bytes += static_cast<uint64_t>(n * bytes);
    uint32_t used = 0;
    for (int i = 0; i < n; ++i) used |= 1u << (units[i] & (banks - 1));
    int different = n;  // banks of their own: one pass
    c.wavefronts +=
        bit_count(used) == n ? 1 : static_cast<uint64_t>(passes(units, n, banks, &different));
    c.ideal_wavefronts += static_cast<uint64_t>((different + lanes - 1) / lanes);
  }
}

namespace {

void local_pointers(Warp& w, uint32_t mask, const uint64_t* address, int bytes, char** to) {
  const auto end = static_cast<uint64_t>(w.launch->kernel->local_bytes);
  for_lanes(mask, [&](int l) {
    if (address[l] + static_cast<uint64_t>(bytes) > end || address[l] > end) {
      fail("out of bounds",
           "access of " + std::to_string(bytes) + " bytes of local memory at " + hex(address[l]) +
               ", which ends at " + hex(end),
           l);
    }
    to[l] = w.local + static_cast<uint64_t>(l) * end + address[l];
  });
  const Accesses a(mask, address, bytes);
  check_alignment(a, range_of(a), "access", "local");
}

void parameter_pointers(Warp& w, uint32_t mask, const uint64_t* address, int bytes, char** to) {
  const uint64_t end = w.launch->parameters.size();
  for_lanes(mask, [&](int l) {
    if (address[l] + static_cast<uint64_t>(bytes) > end || address[l] > end) {
      fail("out of bounds",
           "read of " + std::to_string(bytes) + " bytes past the parameters, at " + hex(address[l]),
           l);
    }
    to[l] = const_cast<char*>(w.launch->parameters.data()) + address[l];
  });
}

// Calls f(space, lanes, addresses) for the lanes of each window of generic addresses.
template <class F>
void by_window(uint32_t mask, const uint64_t* address, const F& f) {
  const std::pair<uint64_t, Space> windows[] = {{kSharedWindow, Space::kShared},
                                                {kLocalWindow, Space::kLocal}};
  for (const auto& window : windows) {
    uint32_t lanes = 0;
    for_lanes(mask,
              [&](int l) { lanes |= uint32_t{(address[l] & kWindowMask) == window.first} << l; });
    if (lanes == 0) continue;
    uint64_t inside[kLanes] = {};
    for_lanes(lanes, [&](int l) { inside[l] = address[l] & ~kWindowMask; });
    f(window.second, lanes, inside);
    mask &= ~lanes;
  }
  if (mask != 0) f(Space::kGlobal, mask, address);
}

// Races between CTAs.
void follow_read(Warp& w, const Instr& in, const Accesses& a) {
  if (!w.options->global_races) return;
  if (w.launch->order != nullptr && in.order != 0) {
    record_global_atomics(w, in, a, GlobalAccessKind::kAtomicRead);
  } else if (w.launch->follow[static_cast<size_t>(in.index)] != 0) {
    record_global_reads(w, in, a);
  }
}
void follow_write(Warp& w, const Instr& in, const Accesses& a, const char* data, int stride) {
  if (!w.options->global_races) return;
  if (w.launch->order != nullptr && in.order != 0) {
    record_global_atomics(w, in, a, GlobalAccessKind::kAtomicStore);
  } else {
    record_global_stores(w, in, a, data, stride);
  }
}

void host_pointers(const uint64_t* address, char** to) {
  for (int l = 0; l < kLanes; ++l) to[l] = reinterpret_cast<char*>(address[l]);
}

// Lanes outside the mask get anything.
void shared_pointers(const Warp& w, const uint64_t* address, char** to) {
  for (int l = 0; l < kLanes; ++l) to[l] = w.shared + address[l];
}

}  // namespace

void resolve_read(Warp& w, const Instr& in, uint32_t mask, Space space, const uint64_t* address,
                  int bytes, char** to) {
  const Accesses a(mask, address, bytes);
  switch (space) {
    case Space::kGlobal:
      check_global(w, in, a, Access::kRead);
      count_global(w, in, a);
      follow_read(w, in, a);
      return host_pointers(address, to);
    case Space::kShared:
      check_shared(w, a, "read");
      count_shared(w, in, a);
      if (w.options->races || w.options->uninitialised) w.worker->shadow.read(w, in, a);
      if (w.options->warp_races) w.worker->lanes->read(w, in, a);
      return shared_pointers(w, address, to);
    case Space::kLocal:
      return local_pointers(w, mask, address, bytes, to);
    case Space::kParam:
      return parameter_pointers(w, mask, address, bytes, to);
    case Space::kConst:
      check_global(w, in, a, Access::kRead);
      return host_pointers(address, to);
    default:
      by_window(mask, address, [&](Space inner, uint32_t lanes, const uint64_t* inside) {
        char* part[kLanes];
        resolve_read(w, in, lanes, inner, inside, bytes, part);
        for_lanes(lanes, [&](int l) { to[l] = part[l]; });
      });
  }
}

void resolve_write(Warp& w, const Instr& in, uint32_t mask, Space space, const uint64_t* address,
                   int bytes, const char* data, int stride, char** to) {
  const Accesses a(mask, address, bytes);
  switch (space) {
    case Space::kGlobal:
      check_global(w, in, a, Access::kWrite);
      count_global(w, in, a);
      follow_write(w, in, a, data, stride);
      return host_pointers(address, to);
    case Space::kShared:
      check_shared(w, a, "write");
      count_shared(w, in, a);
      if (w.options->races || w.options->uninitialised)
        w.worker->shadow.write(w, in, a, data, stride);
      if (w.options->warp_races) w.worker->lanes->write(w, in, a, data, stride);
      return shared_pointers(w, address, to);
    case Space::kLocal:
      return local_pointers(w, mask, address, bytes, to);
    case Space::kParam:
    case Space::kConst:
      fail("read-only memory", "write to parameters or constants", -1);
    default:
      by_window(mask, address, [&](Space inner, uint32_t lanes, const uint64_t* inside) {
        char* part[kLanes];
        resolve_write(w, in, lanes, inner, inside, bytes, data, stride, part);
        for_lanes(lanes, [&](int l) { to[l] = part[l]; });
      });
  }
}

void resolve_atomic(Warp& w, const Instr& in, uint32_t mask, Space space, const uint64_t* address,
                    int bytes, char** to) {
  if (space == Space::kGeneric) {
    return by_window(mask, address, [&](Space inner, uint32_t lanes, const uint64_t* inside) {
      char* part[kLanes];
      resolve_atomic(w, in, lanes, inner, inside, bytes, part);
      for_lanes(lanes, [&](int l) { to[l] = part[l]; });
    });
  }
  const Accesses a(mask, address, bytes);
  if (space == Space::kShared) {
    check_shared(w, a, "atomic");
    count_shared(w, in, a);
    for_lanes(mask, [&](int l) {
      const auto at = static_cast<uint32_t>(address[l]);
      w.worker->shadow.atomic(w, in, l, at, bytes);
      if (w.options->warp_races) w.worker->lanes->atomic(w, in, l, at, bytes);
      to[l] = w.shared + address[l];
    });
    return;
  }
  if (space != Space::kGlobal) fail("out of bounds", "atomic on local memory", -1);
  check_global(w, in, a, Access::kAtomic);
  count_global(w, in, a);
  if (w.launch->order != nullptr)
    record_global_atomics(w, in, a, GlobalAccessKind::kAtomic);
  host_pointers(address, to);
}

}  // namespace emulator
}  // namespace llmkern
