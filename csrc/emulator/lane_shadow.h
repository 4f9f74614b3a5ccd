// Races inside a warp: two lanes touch the same bytes of shared memory, one of them writing, with
// nothing between that brings the lanes together (bar.warp.sync, a collective, a barrier). Since
// sm_70 each lane has a place of its own, so code that counts on lockstep needs __syncwarp.
//
// Time is counted in ticks that never repeat. A point where all lanes of a warp meet moves the
// warp's `base`: whatever is older is ordered. Where only some meet, what each lane has seen of
// each other one is kept. Bytes are followed one by one, so lanes may share a word.
//
// Between two such points a warp mostly touches places apart: accesses are only listed, with a bit
// for each 2 bytes that they read or write, until one meets a bit that it could race with. Then
// they go into the words.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "patterns.h"

namespace llmkern {
namespace emulator {

struct LaneWord {
  uint32_t write_tick = 0, read_tick = 0;
  uint32_t readers = 0;   // lanes, since read_tick
  uint32_t instance = 0;  // the run of an instruction that wrote
  int32_t write_index = 0, read_index = 0;
  uint8_t warp = 0xff;  // whose lanes these are; between warps SharedShadow looks
  bool by_atomic = false;
  std::array<uint8_t, 4> writer, reader;  // lane of each byte, kNobody or kMany
};

class LaneShadow {
 public:
  void begin_cta(int64_t shared_bytes, int warps);
  // The lanes of `mask` wait for each other.
  void meet(Warp& w, uint32_t mask);

  // As in SharedShadow. Throw Fault.
  void read(Warp& w, const Instr& in, const Accesses& a);
  // `data` may be null: what will be written is not known.
  void write(Warp& w, const Instr& in, const Accesses& a, const char* data, int stride);
  void atomic(Warp& w, const Instr& in, int lane, uint32_t address, int bytes);
  // cp.async: its issue is checked as a write, its end is one.
  void land_copies(Warp& w, int index, const Accesses& a);

 private:
  enum class Touch : uint8_t { kRead, kWrite, kLanding };
  struct Listed {
    Touch touch;
    int index;
    uint32_t base;
    const Pattern* pattern;
  };
  struct Order {
    uint32_t base = 0, tick = 1;
    std::vector<Listed> list;  // its first `listed`: since the lanes met
    size_t listed = 0;
    std::vector<uint16_t> touched;  // by 16 bytes: 2-byte units written, then those read
    bool in_words = false;          // accesses since then are in words_
    bool partial = false;           // then the rest counts
    uint32_t at[kLanes];
    uint32_t seen[kLanes][kLanes];
  };
  struct Store {  // what a write is compared with
    const uint64_t* address;
    const char* data;
    int stride;
  };

  bool ordered(const Order& o, int lane, int other, uint32_t tick) const {
    return tick <= o.base || (o.partial && o.seen[lane][other] >= tick);
  }
  // Lists an access if it cannot race with those before it; the end of a copy races with nothing.
  bool listed(Order& o, Touch touch, int index, const Accesses& a);
  void forget_list(Order& o);
  void move_to_words(Warp& w, Order& o);
  void touch_read(Warp& w, const Order& o, int index, int lane, uint32_t address, uint8_t mask);
  void touch_write(Warp& w, const Order& o, int index, int lane, uint32_t address, uint8_t mask,
                   const Store& store);
  void record_write(const Order& o, LaneWord* word, int index, int lane, uint8_t mask);
  int racing_writer(const Order& o, const LaneWord& word, int lane, uint8_t mask) const;
  int racing_reader(const Order& o, const LaneWord& word, int lane, uint8_t mask) const;
  bool same_value(Warp& w, const LaneWord& word, int lane, int other, uint32_t address,
                  uint8_t mask, const Store& store) const;
  LaneWord& word_of(const Warp& w, uint32_t address);

  std::vector<LaneWord> words_;
  std::vector<Order> order_;  // by warp
  uint32_t tick_ = 1, instance_ = 0;
};

}  // namespace emulator
}  // namespace llmkern
