// cp.async: queued at its issue, done at the wait for its group. Until then its destination belongs
// to nobody. The bytes count as written by the issuing warp when the wait is over, so a barrier
// after the wait is needed before other warps read them.
#include <algorithm>
#include <cstring>

#include "access.h"
#include "global_shadow.h"
#include "lanes.h"
#include "modifiers.h"

namespace llmkern {
namespace emulator {
namespace {

constexpr uint32_t kMostBytes = 16;

void move(Warp& w, const AsyncCopy& copy, uint32_t lanes) {
  if (copy.full && copy.bytes == kMostBytes && lanes == kAllLanes) {
    for (int l = 0; l < kLanes; ++l)
      std::memcpy(w.shared + copy.to[l], reinterpret_cast<const char*>(copy.from[l]), kMostBytes);
    return;
  }
  for_lanes(lanes, [&](int l) {
    char* to = w.shared + copy.to[l];
    std::memcpy(to, reinterpret_cast<const char*>(copy.from[l]), copy.size[l]);
    std::memset(to + copy.size[l], 0, copy.bytes - copy.size[l]);
  });
}

void land(Warp& w, const Instr& in, const AsyncCopy& copy, uint32_t lanes) {
  if (lanes == 0) return;
  move(w, copy, lanes);
  const Accesses a = copy.pattern != nullptr && lanes == copy.pattern->mask
                         ? Accesses(*copy.pattern, copy.to)
                         : accesses_of(w, in, lanes, copy.to, copy.bytes, true);
  if (w.options->races || w.options->uninitialised) w.worker->shadow.land_copies(w, in.index, a);
  if (w.options->warp_races) w.worker->lanes->land_copies(w, in.index, a);
}

// What is read of global memory: all of it, or the first bytes.
void read_source(Warp& w, const Instr& in, uint32_t mask, const AsyncCopy& copy) {
  uint32_t reading = mask, whole = mask;
  if (!copy.full) {
    reading &= lane_mask([&](int l) { return copy.size[l] != 0; });
    whole &= lane_mask([&](int l) { return copy.size[l] == in.bytes; });
  }
  const auto check = [&](uint32_t lanes, const uint64_t* address, int bytes) {
    const Accesses part = accesses_of(w, in, lanes, address, bytes, false, 1);
    check_global(w, in, part, Access::kAsyncRead);
  };
  if (whole != 0) check(whole, copy.from, in.bytes);
  for_lanes(reading & ~whole, [&](int l) {
    uint64_t byte[kLanes];
    for (uint32_t i = 0; i < copy.size[l]; ++i) {
      byte[l] = copy.from[l] + i;
      check(1u << l, byte, 1);
    }
  });
  if (reading == 0) return;
  const Accesses a = accesses_of(w, in, reading, copy.from, in.bytes, false, 1);
  count_global(w, in, a);
  if (w.options->global_races && w.launch->follow[static_cast<size_t>(in.index)] != 0)
    record_global_reads(w, in, a);
}

// The one after those under way.
AsyncCopy& next_copy(Warp& w) {
  if (w.under_way == w.copies.size()) w.copies.push_back(std::make_unique<AsyncCopy>());
  return *w.copies[w.under_way];
}

// r: to, from, size of the source; imm and mode: their offsets.
void issue(Warp& w, const Instr& in, uint32_t mask) {
  const uint32_t* size = w.at<uint32_t>(in.r[2]);
  const uint64_t* base = w.at<uint64_t>(in.r[1]);
  const auto offset = static_cast<uint64_t>(static_cast<int32_t>(in.mode));
  AsyncCopy& copy = next_copy(w);
  copy.bytes = in.bytes;
  copy.index = in.index;
  effective_addresses(w, in, copy.to);
  uint32_t other = 0;
  for (int l = 0; l < kLanes; ++l) {
    copy.to[l] &= ~kWindowMask;
    copy.from[l] = base[l] + offset;
    copy.size[l] = size[l];
    other |= size[l] ^ in.bytes;
  }
  copy.full = other == 0;
  for_lanes(copy.full ? 0 : mask, [&](int l) {
    if (size[l] > in.bytes)
      throw Fault{"bad cp.async",
                  "a source of " + std::to_string(size[l]) + " bytes for a copy of " +
                      std::to_string(in.bytes),
                  l, -1};
  });
  const Accesses to = accesses_of(w, in, mask, copy.to, in.bytes, true);
  copy.pattern = to.pattern.kept ? &to.pattern : nullptr;
  check_shared(w, to, "cp.async write");
  count_shared(w, in, to);
  if (w.options->races || w.options->uninitialised) w.worker->shadow.launch_copies(w, in, to);
  if (w.options->warp_races) w.worker->lanes->write(w, in, to, nullptr, 0);
  read_source(w, in, mask, copy);
  // Lanes that have committed different numbers of groups are kept apart.
  for (uint32_t left = mask;;) {
    AsyncCopy& part = *w.copies[w.under_way++];
    part.group = w.committed[__builtin_ctz(left)];
    part.mask = left & lane_mask([&](int l) { return w.committed[l] == part.group; });
    left &= ~part.mask;
    if (left == 0) return;
    next_copy(w) = part;
  }
}

void commit(Warp& w, const Instr&, uint32_t mask) {
  for_lanes(mask, [&](int l) { ++w.committed[l]; });
}

// imm: groups that may stay under way; mode 1: none, committed or not.
void wait(Warp& w, const Instr& in, uint32_t mask) {
  uint32_t newest = 0, oldest = ~uint32_t{0};
  for (uint32_t committed : w.committed) {
    newest = std::max(newest, committed);
    oldest = std::min(oldest, committed);
  }
  size_t kept = 0;
  for (size_t i = 0; i < w.under_way; ++i) {
    AsyncCopy& copy = *w.copies[i];
    const int64_t last = copy.group + in.imm;  // the newest that may stay under way with it
    uint32_t old = in.mode != 0 || last < int64_t{oldest} ? kAllLanes : 0;
    if (old == 0 && last < int64_t{newest})
      old = lane_mask([&](int l) { return last < int64_t{w.committed[l]}; });
    const uint32_t done = copy.mask & mask & old;
    land(w, in, copy, done);
    copy.mask &= ~done;
    if (copy.mask != 0) std::swap(w.copies[kept++], w.copies[i]);
  }
  w.under_way = kept;
}

void decode_copy(Decoder& d) {
  const bool all_levels = d.take_one_of({"ca", "cg"}) == 0;
  d.take_one_of({"shared", "shared::cta"});
  d.take_one_of({"global"});
  const bool hint = d.take("L2::cache_hint");
  d.take_optional({"L2::64B", "L2::128B", "L2::256B"});
  d.expect(3, hint ? 5 : 4);
  d.address(1, Space::kGlobal);
  const int64_t from_offset = d.out.imm;
  if (from_offset != static_cast<int32_t>(from_offset)) d.fail("the offset is too large");
  const uint32_t from = d.out.r[0];
  d.out.operands = 0;
  d.address(0, Space::kShared);
  d.append(from, false);
  d.out.mode = static_cast<uint32_t>(static_cast<int32_t>(from_offset));
  const uint32_t bytes = d.integer(2);
  if (bytes != 16 && (!all_levels || (bytes != 4 && bytes != 8)))
    d.fail("copies are of 4, 8 or 16 bytes, .cg of 16");
  d.out.bytes = static_cast<uint8_t>(bytes);
  const int extra = d.count() - 3 - (hint ? 1 : 0);
  if (extra > 0) {
    d.src(3, Type::kU32);
  } else {
    d.append(d.builder->constant(bytes, 4), false);
  }
  d.out.klass = Class::kAsyncCopy;
  d.out.run = &issue;
}

void decode_cp(Decoder& d) {
  d.take_one_of({"async"});
  d.out.klass = Class::kAsyncCopy;
  if (d.take("commit_group")) {
    d.expect(0);
    d.out.run = &commit;
  } else if (d.take("wait_group")) {
    d.expect(1);
    d.out.imm = d.integer(0);
    d.out.run = &wait;
  } else if (d.take("wait_all")) {
    d.expect(0);
    d.out.mode = 1;
    d.out.run = &wait;
  } else {
    decode_copy(d);
  }
}

}  // namespace

void add_async_opcodes(OpcodeTable* table) { (*table)["cp"] = decode_cp; }

}  // namespace emulator
}  // namespace llmkern
