#include "shared_shadow.h"

#include <algorithm>
#include <array>
#include <cstring>

#include "machine.h"

namespace llmkern {
namespace emulator {
namespace {

std::string hex(uint32_t address) {
  char text[16];
  std::snprintf(text, sizeof text, "0x%x", address);
  return text;
}

// Calls f(word address, byte mask) for each word of [address, address + bytes).
template <class F>
inline void for_words(uint32_t address, int bytes, const F& f) {
  if (bytes >= 4) {  // aligned: the bounds check came before
    for (int i = 0; i < bytes; i += 4) f(address + static_cast<uint32_t>(i), uint8_t{0xf});
  } else {
    f(address & ~3u, static_cast<uint8_t>(((1u << bytes) - 1) << (address & 3)));
  }
}

constexpr uint32_t kGranule = kGranuleBytes, kWords = 4;
constexpr uint8_t kAll = 0xf;
constexpr uint32_t kWhole = 0xffff;

// Granules that an instruction touches are mostly alike: what was found and done for one holds for
// another one with the same record.
class Repeated {
 public:
  using Record = std::array<uint64_t, sizeof(ShadowGranule) / sizeof(uint64_t)>;

  static Record record(const ShadowGranule& g) {
    Record r;
    std::memcpy(&r, &g, sizeof r);
    return r;
  }
  bool done(ShadowGranule* g) const {
    if (after_ == nullptr) return false;
    const Record now = record(*g);
    uint64_t other = 0;
    for (size_t i = 0; i < now.size(); ++i) other |= now[i] ^ before_[i];
    if (other != 0) return false;
    *g = *after_;
    return true;
  }
  // `after`: where the result is, which stays as it is.
  void remember(const Record& before, const ShadowGranule& after) {
    before_ = before;
    after_ = &after;
  }

 private:
  Record before_;
  const ShadowGranule* after_ = nullptr;
};

}  // namespace

void SharedShadow::begin_cta(int64_t bytes) {
  const auto granules = static_cast<size_t>((bytes + kGranuleBytes - 1) / kGranuleBytes);
  const bool wrapped = epoch_ > 0xf0000000u;
  if (wrapped) {
    granules_.assign(granules_.size(), ShadowGranule());
    words_.assign(words_.size(), ShadowWord());
    epoch_ = 1;
  }
  if (granules_.size() < granules) {
    granules_.resize(granules);
    words_.resize(granules * kWords);
  }
  base_ = ++epoch_;
}

// The loops over a warp's accesses take the plain cases at once: what is read is set and ordered,
// what is written nobody else has touched since the last barrier. The rest goes to check_read,
// check_write.
inline bool SharedShadow::plain_read(const Warp& w, const ShadowWord& word, uint8_t bytes) const {
  return word.write_epoch >= base_ && (word.set & bytes) == bytes &&
         (word.in_flight & bytes) == 0 && word.write_epoch <= w.seen[word.write_at & 31] &&
         word.read_epoch <= w.epoch;
}

inline bool SharedShadow::plain_write(const Warp& w, const ShadowWord& word) const {
  return word.in_flight == 0 && word.write_epoch <= w.seen[word.write_at & 31] &&
         (word.read_epoch <= w.all_seen || (word.readers & ~(1u << w.id)) == 0);
}

inline ShadowWord* SharedShadow::whole(uint32_t address) {
  ShadowGranule& g = granules_[address / kGranule];
  return !g.split || join(address / kGranule) ? &g.whole : nullptr;
}

bool SharedShadow::join(uint32_t granule) {
  const ShadowWord* first = &words_[granule * kWords];
  for (uint32_t i = 1; i < kWords; ++i) {
    if (std::memcmp(first, first + i, sizeof *first) != 0) return false;
  }
  granules_[granule].whole = *first;
  granules_[granule].split = 0;
  return true;
}

// Reads that everyone who can write has seen the end of need not be kept: words may differ in them.
ShadowWord* SharedShadow::whole_for_write(const Warp& w, uint32_t address) {
  ShadowGranule& g = granules_[address / kGranule];
  if (!g.split) return plain_write(w, g.whole) ? &g.whole : nullptr;
  const ShadowWord* words = &words_[address / kGranule * kWords];
  for (uint32_t i = 0; i < kWords; ++i) {
    if (!plain_write(w, words[i]) || words[i].read_epoch > w.all_seen) return nullptr;
  }
  g.whole = ShadowWord();
  g.split = 0;
  return &g.whole;
}

ShadowWord& SharedShadow::word(uint32_t address) {
  ShadowGranule& g = granules_[address / kGranule];
  if (!g.split) {
    std::fill_n(&words_[address / kGranule * kWords], kWords, g.whole);
    g.split = 1;
  }
  return words_[address / 4];
}

const ShadowWord& SharedShadow::look(uint32_t address) const {
  const ShadowGranule& g = granules_[address / kGranule];
  return g.split ? words_[address / 4] : g.whole;
}

void SharedShadow::fail_race(Warp& w, const Instr& in, int lane, uint32_t address, const char* what,
                             uint32_t other) {
  Fault fault;
  fault.check = "shared race";
  fault.message = std::string(what) + " warp " + std::to_string(other & 31) +
                  " with no barrier between: shared memory at " + hex(address) + ", warp " +
                  std::to_string(w.id);
  fault.lane = lane;
  fault.other = static_cast<int>(other >> 5);
  (void)in;
  throw fault;
}

void SharedShadow::check_read(Warp& w, const Instr& in, int lane, uint32_t address, uint8_t bytes) {
  ShadowWord& word = this->word(address);
  const bool fresh = word.write_epoch >= base_;
  if (fresh && (word.in_flight & bytes) != 0) {
    throw Fault{"async copy in flight",
                "read of shared memory at " + hex(address) + " before cp.async.wait of its group",
                lane, static_cast<int>(word.write_at >> 5)};
  }
  if ((!fresh || (word.set & bytes) != bytes) && w.options->uninitialised) {
    throw Fault{"uninitialised shared memory",
                "read of shared memory at " + hex(address) + " that nothing has written", lane, -1};
  }
  if (!w.options->races) return;
  if (fresh && word.write_epoch > w.seen[word.write_at & 31] && (word.write_bytes & bytes) != 0) {
    fail_race(w, in, lane, address, "reads what was written by", word.write_at);
  }
  const uint32_t me = 1u << w.id;
  if (word.read_epoch < w.epoch) {
    word.read_epoch = w.epoch;
    word.readers = me;
    word.read_bytes = bytes;
    word.read_at = static_cast<uint32_t>(in.index) << 5 | static_cast<uint32_t>(w.id);
  } else if (word.read_epoch == w.epoch) {
    // A report names the last reader that is not the writer; keep one that differs from the first.
    if ((word.readers & me) == 0) {
      word.read_at = static_cast<uint32_t>(in.index) << 5 | static_cast<uint32_t>(w.id);
    }
    word.readers |= me;
    word.read_bytes |= bytes;
  }
}

bool SharedShadow::race_before_write(Warp& w, const ShadowWord& word, uint8_t bytes,
                                     bool* read) const {
  if (word.write_epoch >= base_ && word.write_epoch > w.seen[word.write_at & 31] &&
      (word.write_bytes & bytes) != 0) {
    *read = false;
    return true;
  }
  const uint32_t others = word.readers & ~(1u << w.id);
  if (word.read_epoch < base_ || others == 0 || (word.read_bytes & bytes) == 0) return false;
  for (uint32_t left = others; left != 0; left &= left - 1) {
    if (word.read_epoch > w.seen[__builtin_ctz(left)]) {
      *read = true;
      return true;
    }
  }
  return false;
}

void SharedShadow::record_write(Warp& w, int index, ShadowWord* word, uint8_t bytes) {
  const uint32_t at = static_cast<uint32_t>(index) << 5 | static_cast<uint32_t>(w.id);
  if (word->write_epoch < base_) {
    word->set = 0;
    word->write_bytes = 0;
    word->in_flight = 0;
  } else if (word->write_epoch != w.epoch || (word->write_at & 31) != (at & 31)) {
    word->write_bytes = 0;
  }
  word->write_epoch = w.epoch;
  word->write_at = at;
  word->write_bytes |= bytes;
  word->set |= bytes;
}

void SharedShadow::check_write(Warp& w, const Instr& in, int lane, uint32_t address, uint8_t bytes,
                               const char* now) {
  ShadowWord& word = this->word(address);
  if (word.write_epoch >= base_ && (word.in_flight & bytes) != 0) {
    throw Fault{"async copy in flight",
                "write to shared memory at " + hex(address) + " before cp.async.wait of its group",
                lane, static_cast<int>(word.write_at >> 5)};
  }
  bool read = false;
  // Writing what is there already is no race: Triton repeats stores in several warps.
  if (w.options->races && race_before_write(w, word, bytes, &read)) {
    bool same = now != nullptr;
    for (int i = 0; same && i < 4; ++i) {
      if ((bytes >> i & 1) != 0) same = w.shared[address + static_cast<uint32_t>(i)] == now[i];
    }
    if (!same) {
      uint32_t other = word.write_at;
      if (read) {
        const uint32_t others = word.readers & ~(1u << w.id);
        other = (others >> (word.read_at & 31) & 1) != 0
                    ? word.read_at
                    : (word.read_at & ~31u) | static_cast<uint32_t>(__builtin_ctz(others));
      }
      fail_race(w, in, lane, address,
                read ? "overwrites what was read by" : "overwrites what was written by", other);
    }
  }
  record_write(w, in.index, &word, bytes);
}

namespace {

inline void record_read(const Warp& w, uint32_t at, ShadowWord* word, uint8_t bytes) {
  const uint32_t me = 1u << w.id;
  if (word->read_epoch < w.epoch) {
    word->read_epoch = w.epoch;
    word->readers = 0;
    word->read_bytes = 0;
  }
  if ((word->readers & me) == 0) word->read_at = at;
  word->readers |= me;
  word->read_bytes |= bytes;
}

inline void record_full_write(const Warp& w, uint32_t at, ShadowWord* word) {
  word->write_epoch = w.epoch;
  word->write_at = at;
  word->write_bytes = word->set = kAll;
}

inline uint32_t place(const Warp& w, int index) {
  return static_cast<uint32_t>(index) << 5 | static_cast<uint32_t>(w.id);
}

}  // namespace

void SharedShadow::read_words(Warp& w, const Instr& in, int lane, uint32_t address, int bytes) {
  for_words(address, bytes, [&](uint32_t a, uint8_t m) {
    ShadowWord& word = this->word(a);
    plain_read(w, word, m) ? record_read(w, place(w, in.index), &word, m)
                           : check_read(w, in, lane, a, m);
  });
}

// `data` begins at the lane's first byte, which may lie inside the word.
void SharedShadow::write_words(Warp& w, const Instr& in, int lane, uint32_t address, int bytes,
                               const char* data) {
  for_words(address, bytes, [&](uint32_t a, uint8_t m) {
    ShadowWord& word = this->word(a);
    m == kAll&& plain_write(w, word)
        ? record_full_write(w, place(w, in.index), &word)
        : check_write(w, in, lane, a, m,
                      data == nullptr ? nullptr : data + (static_cast<int64_t>(a) - address));
  });
}

bool SharedShadow::read_plain(Warp& w, const Instr& in, const Accesses& a) {
  const uint32_t at = place(w, in.index);
  Repeated repeated;
  for (int i = 0; i < a.pattern.granules; ++i) {
    const uint32_t number = a.first_granule() + static_cast<uint32_t>(a.pattern.granule[i]);
    ShadowGranule& g = granules_[number];
    const uint32_t bytes = a.pattern.touched[i];
    if (bytes == kWhole && repeated.done(&g)) continue;
    const bool was_whole = g.split == 0;
    const Repeated::Record before = Repeated::record(g);
    ShadowWord* const word = bytes == kWhole ? whole(number * kGranule) : nullptr;
    if (word != nullptr) {
      if (!plain_read(w, *word, kAll)) return false;
      record_read(w, at, word, kAll);
      if (was_whole) repeated.remember(before, g);  // else the words count
      continue;
    }
    for (uint32_t k = 0; k < kWords; ++k) {
      const auto part = static_cast<uint8_t>(bytes >> (4 * k) & kAll);
      if (part == 0) continue;
      ShadowWord& one = this->word(number * kGranule + 4 * k);
      if (!plain_read(w, one, part)) return false;
      record_read(w, at, &one, part);
    }
  }
  return true;
}

bool SharedShadow::write_plain(Warp& w, const Instr& in, const Accesses& a) {
  const uint32_t at = place(w, in.index);
  Repeated repeated;
  for (int i = 0; i < a.pattern.granules; ++i) {
    const uint32_t number = a.first_granule() + static_cast<uint32_t>(a.pattern.granule[i]);
    ShadowGranule& g = granules_[number];
    const uint32_t bytes = a.pattern.touched[i];
    if (bytes == kWhole && repeated.done(&g)) continue;
    const bool was_whole = g.split == 0;
    const Repeated::Record before = Repeated::record(g);
    ShadowWord* const word = bytes == kWhole ? whole_for_write(w, number * kGranule) : nullptr;
    if (word != nullptr) {
      record_full_write(w, at, word);
      if (was_whole) repeated.remember(before, g);  // else the words count
      continue;
    }
    for (uint32_t k = 0; k < kWords; ++k) {
      const auto part = static_cast<uint8_t>(bytes >> (4 * k) & kAll);
      if (part == 0) continue;
      ShadowWord& one = this->word(number * kGranule + 4 * k);
      if (part != kAll || !plain_write(w, one)) return false;
      record_full_write(w, at, &one);
    }
  }
  return true;
}

// What is looked at twice is recorded as it was the first time.
void SharedShadow::read(Warp& w, const Instr& in, const Accesses& a) {
  if (read_plain(w, in, a)) return;
  for_lanes(a.mask,
            [&](int l) { read_words(w, in, l, static_cast<uint32_t>(a.address[l]), a.bytes); });
}

void SharedShadow::write(Warp& w, const Instr& in, const Accesses& a, const char* data,
                         int stride) {
  if (write_plain(w, in, a)) return;
  for_lanes(a.mask, [&](int l) {
    write_words(w, in, l, static_cast<uint32_t>(a.address[l]), a.bytes, data + l * stride);
  });
}

// Atomics of different warps are in order with each other, not with plain accesses. A word that
// only atomics touch keeps no write record of them.
void SharedShadow::atomic(Warp& w, const Instr& in, int lane, uint32_t address, int bytes) {
  for_words(address, bytes, [&](uint32_t a, uint8_t m) {
    const ShadowWord& word = look(a);
    if ((word.write_epoch < base_ || (word.set & m) != m) && w.options->uninitialised) {
      throw Fault{"uninitialised shared memory",
                  "atomic on shared memory at " + hex(a) + " that nothing has written", lane, -1};
    }
    bool read = false;
    if (w.options->races && race_before_write(w, word, m, &read)) {
      fail_race(w, in, lane, a, "atomic on what was plainly accessed by",
                read ? word.read_at : word.write_at);
    }
  });
}

void SharedShadow::launch_copies(Warp& w, const Instr& in, const Accesses& a) {
  const bool follow = w.options->async_copies;
  Repeated repeated;
  for_lanes(a.mask, [&](int l) {
    const auto address = static_cast<uint32_t>(a.address[l]);
    if (a.bytes == kGranuleBytes) {
      ShadowGranule& g = granules_[address / kGranule];
      if (repeated.done(&g)) return;
      const bool was_whole = g.split == 0;
      const Repeated::Record before = Repeated::record(g);
      ShadowWord* const whole = whole_for_write(w, address);
      if (whole != nullptr) {
        record_full_write(w, place(w, in.index), whole);
        whole->in_flight = follow ? kAll : 0;
        if (was_whole) repeated.remember(before, g);  // else the words count
        return;
      }
    }
    for_words(address, a.bytes, [&](uint32_t at, uint8_t m) {
      check_write(w, in, l, at, m, nullptr);
      if (follow) word(at).in_flight |= m;
    });
  });
}

void SharedShadow::land_copies(Warp& w, int index, const Accesses& a) {
  Repeated repeated;
  for_lanes(a.mask, [&](int l) {
    const auto address = static_cast<uint32_t>(a.address[l]);
    if (a.bytes == kGranuleBytes) {
      ShadowGranule& g = granules_[address / kGranule];
      if (repeated.done(&g)) return;
      const bool was_whole = g.split == 0;
      const Repeated::Record before = Repeated::record(g);
      ShadowWord* const whole = this->whole(address);
      if (whole != nullptr) {
        whole->in_flight = 0;
        record_write(w, index, whole, kAll);
        if (was_whole) repeated.remember(before, g);  // else the words count
        return;
      }
    }
    for_words(address, a.bytes, [&](uint32_t at, uint8_t m) {
      ShadowWord& word = this->word(at);
      word.in_flight = static_cast<uint8_t>(word.in_flight & ~m);
      record_write(w, index, &word, m);
    });
  });
}

}  // namespace emulator
}  // namespace llmkern
