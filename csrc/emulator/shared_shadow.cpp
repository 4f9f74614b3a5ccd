#include "shared_shadow.h"

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

}  // namespace

void SharedShadow::begin_cta(int64_t bytes) {
  const size_t words = static_cast<size_t>((bytes + 3) / 4);
  const bool wrapped = epoch_ > 0xf0000000u;
  if (wrapped) {
    words_.assign(words_.size(), ShadowWord());
    epoch_ = 1;
  }
  if (words_.size() < words) words_.resize(words);
  base_ = ++epoch_;
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
  ShadowWord& word = words_[address >> 2];
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
  ShadowWord& word = words_[address >> 2];
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

// The loops over a warp's words take the plain cases at once: what is read is set and ordered, what
// is written nobody has touched since the last barrier. The rest goes to check_read, check_write.
void SharedShadow::read(Warp& w, const Instr& in, uint32_t mask, const uint64_t* address,
                        int bytes) {
  const uint32_t me = 1u << w.id, epoch = w.epoch, base = base_;
  const uint32_t at = static_cast<uint32_t>(in.index) << 5 | static_cast<uint32_t>(w.id);
  ShadowWord* words = words_.data();
  for_lanes(mask, [&](int l) {
    for_words(static_cast<uint32_t>(address[l]), bytes, [&](uint32_t a, uint8_t m) {
      ShadowWord& word = words[a >> 2];
      const bool plain = word.write_epoch >= base && (word.set & m) == m &&
                         (word.in_flight & m) == 0 &&
                         word.write_epoch <= w.seen[word.write_at & 31];
      if (!plain || word.read_epoch > epoch) return check_read(w, in, l, a, m);
      if (word.read_epoch < epoch) {
        word.read_epoch = epoch;
        word.readers = 0;
        word.read_bytes = 0;
      }
      if ((word.readers & me) == 0) word.read_at = at;
      word.readers |= me;
      word.read_bytes |= m;
    });
  });
}

void SharedShadow::write(Warp& w, const Instr& in, uint32_t mask, const uint64_t* address,
                         int bytes, const char* data, int stride) {
  const uint32_t at = static_cast<uint32_t>(in.index) << 5 | static_cast<uint32_t>(w.id);
  ShadowWord* words = words_.data();
  for_lanes(mask, [&](int l) {
    const auto begin = static_cast<uint32_t>(address[l]);
    for_words(begin, bytes, [&](uint32_t a, uint8_t m) {
      ShadowWord& word = words[a >> 2];
      const bool plain = m == 0xf && word.in_flight == 0 && word.write_epoch >= base_ &&
                         word.write_epoch <= w.all_seen && word.read_epoch <= w.all_seen;
      // `data` begins at the lane's first byte, which may lie inside the word.
      if (!plain)
        return check_write(w, in, l, a, m, data + l * stride + (static_cast<int64_t>(a) - begin));
      word.write_epoch = w.epoch;
      word.write_at = at;
      word.write_bytes = word.set = m;
    });
  });
}

// Atomics of different warps are in order with each other, not with plain accesses. A word that
// only atomics touch keeps no write record of them.
void SharedShadow::atomic(Warp& w, const Instr& in, int lane, uint32_t address, int bytes) {
  for_words(address, bytes, [&](uint32_t a, uint8_t m) {
    ShadowWord& word = words_[a >> 2];
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

void SharedShadow::launch_copy(Warp& w, const Instr& in, int lane, uint32_t address, int bytes) {
  for_words(address, bytes, [&](uint32_t a, uint8_t m) {
    check_write(w, in, lane, a, m, nullptr);
    if (w.options->async_copies) words_[a >> 2].in_flight |= m;
  });
}

void SharedShadow::land_copy(Warp& w, int index, uint32_t address, int bytes) {
  for_words(address, bytes, [&](uint32_t a, uint8_t m) {
    ShadowWord& word = words_[a >> 2];
    word.in_flight = static_cast<uint8_t>(word.in_flight & ~m);
    record_write(w, index, &word, m);
  });
}

}  // namespace emulator
}  // namespace llmkern
