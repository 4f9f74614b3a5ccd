#include "lane_shadow.h"

#include <algorithm>
#include <string>

#include "machine.h"

namespace llmkern {
namespace emulator {
namespace {

constexpr uint8_t kNobody = 0xff, kMany = 0xfe;
constexpr uint32_t kWrap = 0xf0000000u;
constexpr size_t kMostListed = 64;
constexpr uint32_t kGranule = kGranuleBytes, kAllUnits = 0xff;

// Calls f(word address, byte mask) for each word of [address, address + bytes).
template <class F>
inline void for_words(uint32_t address, int bytes, const F& f) {
  if (bytes >= 4) {
    for (int i = 0; i < bytes; i += 4) f(address + static_cast<uint32_t>(i), uint8_t{0xf});
  } else {
    f(address & ~3u, static_cast<uint8_t>(((1u << bytes) - 1) << (address & 3)));
  }
}

[[noreturn]] void fail(const Warp& w, int lane, int other, int index, uint32_t address,
                       const char* what) {
  char at[16];
  std::snprintf(at, sizeof at, "0x%x", address);
  Fault fault;
  fault.check = "warp race";
  fault.message = std::string(what) + " lane " + std::to_string(other) +
                  " of the same warp with no __syncwarp between: shared memory at " + at +
                  ", warp " + std::to_string(w.id);
  fault.lane = lane;
  fault.other = index;
  throw fault;
}

}  // namespace

void LaneShadow::begin_cta(int64_t shared_bytes, int warps) {
  const auto words = static_cast<size_t>((shared_bytes + 3) / 4);
  if (tick_ > kWrap || instance_ > kWrap) {
    words_.assign(words_.size(), LaneWord());
    tick_ = 1;
    instance_ = 0;
  }
  if (words_.size() < words) words_.resize(words);
  order_.resize(static_cast<size_t>(warps));
  for (Order& o : order_) {
    o.base = tick_;
    o.tick = ++tick_;
    o.partial = o.in_words = false;
    forget_list(o);
    if (o.touched.size() * kGranule < words * 4) o.touched.resize(words * 4 / kGranule + 1);
  }
}

void LaneShadow::meet(Warp& w, uint32_t mask) {
  Order& o = order_[static_cast<size_t>(w.id)];
  if ((w.alive & ~mask) == 0) {
    forget_list(o);
    o.in_words = false;
    o.base = tick_;
    o.tick = ++tick_;
    o.partial = false;
    return;
  }
  move_to_words(w, o);
  if (!o.partial) {
    o.partial = true;
    std::fill(o.at, o.at + kLanes, o.tick);
    for (auto& row : o.seen) std::fill(row, row + kLanes, o.base);
  }
  uint32_t joined[kLanes] = {};
  for_lanes(mask, [&](int l) {
    for (int j = 0; j < kLanes; ++j) joined[j] = std::max(joined[j], o.seen[l][j]);
    joined[l] = std::max(joined[l], o.at[l]);
  });
  ++tick_;
  for_lanes(mask, [&](int l) {
    std::copy(joined, joined + kLanes, o.seen[l]);
    o.at[l] = tick_;
  });
}

LaneWord& LaneShadow::word_of(const Warp& w, uint32_t address) {
  LaneWord& word = words_[address >> 2];
  if (word.warp != w.id) {
    word = LaneWord();
    word.warp = static_cast<uint8_t>(w.id);
  }
  return word;
}

int LaneShadow::racing_writer(const Order& o, const LaneWord& word, int lane, uint8_t mask) const {
  if (word.write_tick <= o.base) return -1;
  for (size_t b = 0; b < 4; ++b) {
    const int other = word.writer[b];
    if ((mask >> b & 1) == 0 || other == kNobody || other == lane) continue;
    if (!ordered(o, lane, other, word.write_tick)) return other;
  }
  return -1;
}

int LaneShadow::racing_reader(const Order& o, const LaneWord& word, int lane, uint8_t mask) const {
  if (word.read_tick <= o.base) return -1;
  for (size_t b = 0; b < 4; ++b) {
    const uint8_t reader = word.reader[b];
    if ((mask >> b & 1) == 0 || reader == kNobody || reader == lane) continue;
    uint32_t others = reader == kMany ? word.readers & ~(1u << lane) : 1u << reader;
    for (; others != 0; others &= others - 1) {
      const int other = __builtin_ctz(others);
      if (!ordered(o, lane, other, word.read_tick)) return other;
    }
  }
  return -1;
}

void LaneShadow::touch_read(Warp& w, const Order& o, int index, int lane, uint32_t address,
                            uint8_t mask) {
  LaneWord& word = word_of(w, address);
  const int writer = racing_writer(o, word, lane, mask);
  if (writer >= 0) fail(w, lane, writer, word.write_index, address, "reads what was written by");
  const uint32_t now = o.partial ? o.at[lane] : o.tick;
  if (word.read_tick <= o.base) {
    word.readers = 0;
    word.reader.fill(kNobody);
    word.read_tick = now;
  }
  // The oldest of several ticks: an order that holds for it may be missed for a later one.
  word.read_tick = std::min(word.read_tick, now);
  word.readers |= 1u << lane;
  word.read_index = index;
  for (size_t b = 0; b < 4; ++b) {
    if ((mask >> b & 1) == 0 || word.reader[b] == lane) continue;
    word.reader[b] = word.reader[b] == kNobody ? static_cast<uint8_t>(lane) : kMany;
  }
}

// Lanes that write what is there already, or the same in one store, do no harm.
bool LaneShadow::same_value(Warp& w, const LaneWord& word, int lane, int other, uint32_t address,
                            uint8_t mask, const Store& store) const {
  if (store.data == nullptr) return false;
  const auto begin = static_cast<uint32_t>(store.address[lane]);
  const char* mine = store.data + static_cast<int64_t>(lane) * store.stride;
  const bool together = other >= 0 && word.instance == instance_;
  const char* theirs = w.shared;
  uint32_t from = 0;
  if (together) {
    theirs = store.data + static_cast<int64_t>(other) * store.stride;
    from = static_cast<uint32_t>(store.address[other]);
  }
  for (uint32_t i = 0; i < 4; ++i) {
    if ((mask >> i & 1) == 0 || (together && word.writer[i] != other)) continue;
    if (mine[address + i - begin] != theirs[address + i - from]) return false;
  }
  return true;
}

void LaneShadow::touch_write(Warp& w, const Order& o, int index, int lane, uint32_t address,
                             uint8_t mask, const Store& store) {
  LaneWord& word = word_of(w, address);
  const int writer = racing_writer(o, word, lane, mask);
  if (writer >= 0 && !same_value(w, word, lane, writer, address, mask, store))
    fail(w, lane, writer, word.write_index, address, "overwrites what was written by");
  const int reader = racing_reader(o, word, lane, mask);
  if (reader >= 0 && !same_value(w, word, lane, -1, address, mask, store))
    fail(w, lane, reader, word.read_index, address, "overwrites what was read by");
  record_write(o, &word, index, lane, mask);
}

void LaneShadow::record_write(const Order& o, LaneWord* word, int index, int lane, uint8_t mask) {
  const uint32_t now = o.partial ? o.at[lane] : o.tick;
  if (word->write_tick != now) word->writer.fill(kNobody);
  word->write_tick = now;
  word->write_index = index;
  word->instance = instance_;
  word->by_atomic = false;
  for (size_t b = 0; b < 4; ++b) {
    if ((mask >> b & 1) != 0) word->writer[b] = static_cast<uint8_t>(lane);
  }
}

void LaneShadow::forget_list(Order& o) {
  for (size_t i = 0; i < o.listed; ++i) {
    const Pattern& p = *o.list[i].pattern;
    uint16_t* touched = &o.touched[o.list[i].base / kGranule];
    if (p.dense) {
      std::fill_n(touched + p.granule[0], p.granules, uint16_t{0});
    } else {
      for (int k = 0; k < p.granules; ++k) touched[p.granule[k]] = 0;
    }
  }
  o.listed = 0;
}

bool LaneShadow::listed(Order& o, Touch touch, int index, const Accesses& a) {
  const Pattern& p = a.pattern;
  if (o.in_words || o.listed == kMostListed || !p.kept) return false;
  if (touch == Touch::kWrite && !p.apart) return false;
  if (o.listed == o.list.size()) o.list.emplace_back();
  o.list[o.listed++] = {touch, index, static_cast<uint32_t>(a.base), &p};
  // A write meets those before it and reads, a read writes.
  const uint32_t meets = touch == Touch::kRead ? 1 : touch == Touch::kWrite ? 0x101 : 0;
  const uint32_t sets = touch == Touch::kRead ? 0x100 : 1;
  uint32_t met = 0;
  uint16_t* touched = &o.touched[a.first_granule()];
  if (p.dense) {
    touched += p.granule[0];
    for (int i = 0; i < p.granules; ++i) {
      met |= touched[i];
      touched[i] = static_cast<uint16_t>(touched[i] | kAllUnits * sets);
    }
    met &= kAllUnits * meets;
  } else {
    for (int i = 0; i < p.granules; ++i) {
      uint16_t& at = touched[p.granule[i]];
      met |= at & (p.units[i] * meets);
      at = static_cast<uint16_t>(at | p.units[i] * sets);
    }
  }
  if (met == 0) return true;
  const size_t before = o.listed - 1;
  forget_list(o);
  o.listed = before;
  return false;
}

void LaneShadow::move_to_words(Warp& w, Order& o) {
  for (size_t i = 0; i < o.listed; ++i) {
    const Listed& before = o.list[i];
    ++instance_;
    for_lanes(before.pattern->mask, [&](int l) {
      const auto address = before.base + static_cast<uint32_t>(before.pattern->relative[l]);
      for_words(address, before.pattern->bytes, [&](uint32_t a, uint8_t m) {
        if (before.touch != Touch::kRead) {
          record_write(o, &word_of(w, a), before.index, l, m);
        } else {
          touch_read(w, o, before.index, l, a, m);
        }
      });
    });
  }
  forget_list(o);
  o.in_words = true;
}

void LaneShadow::read(Warp& w, const Instr& in, const Accesses& a) {
  Order& o = order_[static_cast<size_t>(w.id)];
  // All lanes met just now and meet again after this read: nothing can race with it.
  if (in.kind == Kind::kAligned && !o.partial && !o.in_words && o.listed == 0) return;
  if (listed(o, Touch::kRead, in.index, a)) return;
  move_to_words(w, o);
  for_lanes(a.mask, [&](int l) {
    for_words(static_cast<uint32_t>(a.address[l]), a.bytes,
              [&](uint32_t at, uint8_t m) { touch_read(w, o, in.index, l, at, m); });
  });
}

void LaneShadow::write(Warp& w, const Instr& in, const Accesses& a, const char* data, int stride) {
  Order& o = order_[static_cast<size_t>(w.id)];
  if (listed(o, Touch::kWrite, in.index, a)) return;
  move_to_words(w, o);
  const Store store{a.address, data, stride};
  ++instance_;
  for_lanes(a.mask, [&](int l) {
    for_words(static_cast<uint32_t>(a.address[l]), a.bytes,
              [&](uint32_t at, uint8_t m) { touch_write(w, o, in.index, l, at, m, store); });
  });
}

void LaneShadow::atomic(Warp& w, const Instr& in, int lane, uint32_t address, int bytes) {
  Order& o = order_[static_cast<size_t>(w.id)];
  move_to_words(w, o);
  for_words(address, bytes, [&](uint32_t a, uint8_t m) {
    LaneWord& word = word_of(w, a);
    const int writer = word.by_atomic ? -1 : racing_writer(o, word, lane, m);
    if (writer >= 0) fail(w, lane, writer, word.write_index, a, "atomic on what was written by");
    const int reader = racing_reader(o, word, lane, m);
    if (reader >= 0) fail(w, lane, reader, word.read_index, a, "atomic on what was read by");
    record_write(o, &word, in.index, lane, m);
    word.by_atomic = true;
  });
}

void LaneShadow::land_copies(Warp& w, int index, const Accesses& a) {
  Order& o = order_[static_cast<size_t>(w.id)];
  if (listed(o, Touch::kLanding, index, a)) return;
  move_to_words(w, o);
  ++instance_;
  for_lanes(a.mask, [&](int l) {
    for_words(static_cast<uint32_t>(a.address[l]), a.bytes,
              [&](uint32_t at, uint8_t m) { record_write(o, &word_of(w, at), index, l, m); });
  });
}

}  // namespace emulator
}  // namespace llmkern
