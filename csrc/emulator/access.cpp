#include "access.h"

#include <algorithm>
#include <cstring>

#include "global_shadow.h"

namespace llmkern {
namespace emulator {
namespace {

std::string hex(uint64_t v) {
  char text[24];
  std::snprintf(text, sizeof text, "0x%llx", static_cast<unsigned long long>(v));
  return text;
}

[[noreturn]] void fail(const char* check, const std::string& message, int lane) {
  throw Fault{check, message, lane, -1};
}

bool inside(const Accesses& a, uint64_t begin, uint64_t end) {
  const auto size = static_cast<uint64_t>(a.bytes);
  return !a.wraps() && a.lowest() >= begin && a.highest() + size <= end &&
         a.highest() + size >= size;
}

void check_alignment(uint32_t mask, const uint64_t* address, int bytes, const char* verb,
                     const char* memory) {
  for_lanes(mask, [&](int l) {
    if ((address[l] & static_cast<uint64_t>(bytes - 1)) != 0) {
      fail("misaligned",
           std::string(verb) + " of " + std::to_string(bytes) + " bytes in " + memory +
               " memory at " + hex(address[l]),
           l);
    }
  });
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
  const Allocation*& hint = w.worker->hints[static_cast<size_t>(in.index)];
  if (hint == nullptr || !inside(a, hint->begin, hint->end)) {
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
  if (!a.pattern.aligned) check_alignment(a.mask, address, a.bytes, verb, "global");
}

void check_shared(Warp& w, const Accesses& a, const char* verb) {
  const auto end = static_cast<uint64_t>(w.launch->shared_bytes());
  const auto size = static_cast<uint64_t>(a.bytes);
  if (!inside(a, 0, end)) {
    for_lanes(a.mask, [&](int l) {
      if (a.address[l] + size <= end && a.address[l] + size >= size) return;
      fail("out of bounds",
           std::string(verb) + " of " + std::to_string(a.bytes) + " bytes of shared memory at " +
               hex(a.address[l]) + ", which ends at " + hex(end),
           l);
    });
  }
  if (!a.pattern.aligned) check_alignment(a.mask, a.address, a.bytes, verb, "shared");
}

void count_global(Warp& w, const Instr& in, const Accesses& a) {
  if (!w.options->counters) return;
  Count& c = w.worker->counts[static_cast<size_t>(in.index)];
  c.bytes += a.pattern.total;
  c.sectors += a.pattern.passes;
  c.ideal_sectors += a.pattern.ideal;
}

void count_shared(Warp& w, const Instr& in, const Accesses& a) {
  if (!w.options->counters) return;
  Count& c = w.worker->counts[static_cast<size_t>(in.index)];
  c.bytes += a.pattern.total;
  c.wavefronts += a.pattern.passes;
  c.ideal_wavefronts += a.pattern.ideal;
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
  check_alignment(mask, address, bytes, "access", "local");
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
  switch (space) {
    case Space::kGlobal: {
      const Accesses a = accesses_of(w, in, mask, address, bytes, false);
      check_global(w, in, a, Access::kRead);
      count_global(w, in, a);
      follow_read(w, in, a);
      return host_pointers(address, to);
    }
    case Space::kShared: {
      const Accesses a = accesses_of(w, in, mask, address, bytes, true);
      check_shared(w, a, "read");
      count_shared(w, in, a);
      if (w.options->races || w.options->uninitialised) w.worker->shadow.read(w, in, a);
      if (w.options->warp_races) w.worker->lanes->read(w, in, a);
      return shared_pointers(w, address, to);
    }
    case Space::kLocal:
      return local_pointers(w, mask, address, bytes, to);
    case Space::kParam:
      return parameter_pointers(w, mask, address, bytes, to);
    case Space::kConst:
      check_global(w, in, accesses_of(w, in, mask, address, bytes, false), Access::kRead);
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
  switch (space) {
    case Space::kGlobal: {
      const Accesses a = accesses_of(w, in, mask, address, bytes, false);
      check_global(w, in, a, Access::kWrite);
      count_global(w, in, a);
      follow_write(w, in, a, data, stride);
      return host_pointers(address, to);
    }
    case Space::kShared: {
      const Accesses a = accesses_of(w, in, mask, address, bytes, true);
      check_shared(w, a, "write");
      count_shared(w, in, a);
      if (w.options->races || w.options->uninitialised)
        w.worker->shadow.write(w, in, a, data, stride);
      if (w.options->warp_races) w.worker->lanes->write(w, in, a, data, stride);
      return shared_pointers(w, address, to);
    }
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
  const Accesses a = accesses_of(w, in, mask, address, bytes, space == Space::kShared);
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
  if (w.launch->order != nullptr) record_global_atomics(w, in, a, GlobalAccessKind::kAtomic);
  host_pointers(address, to);
}

}  // namespace emulator
}  // namespace llmkern
