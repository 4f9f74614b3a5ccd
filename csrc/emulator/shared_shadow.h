// What is known of each 4-byte word of shared memory: who wrote and read it last and when, which
// bytes are set, which wait for a cp.async. Order between warps is by epochs: an access is ordered
// before a warp's next one if that warp has `seen` the epoch of the accessing warp (barriers join
// what warps have seen). Lanes of one warp: lane_shadow.h.
#pragma once

#include <cstdint>
#include <vector>

namespace llmkern {
namespace emulator {

struct Accesses;
struct Warp;
struct Instr;

struct ShadowWord {
  uint32_t write_epoch = 0;
  uint32_t write_at = 0;  // instruction << 5 | warp
  uint32_t read_epoch = 0;
  uint32_t readers = 0;  // warps, at read_epoch
  uint32_t read_at = 0;
  uint8_t set = 0;  // byte masks
  uint8_t write_bytes = 0;
  uint8_t read_bytes = 0;
  uint8_t in_flight = 0;
};

// 16 bytes. While all accesses are of the whole of it, one record stands for its four words.
struct alignas(32) ShadowGranule {
  ShadowWord whole;
  uint64_t split = 0;  // into words
};

class SharedShadow {
 public:
  // Forgets everything in constant time: older epochs do not count any more.
  void begin_cta(int64_t bytes);
  uint32_t next_epoch() { return ++epoch_; }
  uint32_t epoch() const { return epoch_; }

  // Up to 32 bytes a lane; `data`: what a store will write, `stride` bytes a lane. Throw Fault.
  void read(Warp& w, const Instr& in, const Accesses& a);
  void write(Warp& w, const Instr& in, const Accesses& a, const char* data, int stride);
  void atomic(Warp& w, const Instr& in, int lane, uint32_t address, int bytes);
  // cp.async: from issue to wait nobody may touch the bytes.
  void launch_copies(Warp& w, const Instr& in, const Accesses& a);
  void land_copies(Warp& w, int index, const Accesses& a);

 private:
  void check_read(Warp& w, const Instr& in, int lane, uint32_t address, uint8_t bytes);
  void check_write(Warp& w, const Instr& in, int lane, uint32_t address, uint8_t bytes,
                   const char* now);
  void record_write(Warp& w, int index, ShadowWord* word, uint8_t bytes);
  bool race_before_write(Warp& w, const ShadowWord& word, uint8_t bytes, bool* read) const;
  [[noreturn]] void fail_race(Warp& w, const Instr& in, int lane, uint32_t address,
                              const char* what, uint32_t other);

  // The record of all 16 bytes, if there is one: put together from equal words where it can be.
  ShadowWord* whole(uint32_t address);
  bool join(uint32_t granule);
  ShadowWord* whole_for_write(const Warp& w, uint32_t address);
  ShadowWord& word(uint32_t address);  // splits
  const ShadowWord& look(uint32_t address) const;
  bool plain_read(const Warp& w, const ShadowWord& word, uint8_t bytes) const;
  bool plain_write(const Warp& w, const ShadowWord& word) const;
  // Reads or writes what is plain; false: something was not, and the lanes are to be looked at.
  bool read_plain(Warp& w, const Instr& in, const Accesses& a);
  bool write_plain(Warp& w, const Instr& in, const Accesses& a);
  void read_words(Warp& w, const Instr& in, int lane, uint32_t address, int bytes);
  void write_words(Warp& w, const Instr& in, int lane, uint32_t address, int bytes,
                   const char* data);

  std::vector<ShadowGranule> granules_;
  std::vector<ShadowWord> words_;  // of granules that are split
  uint32_t epoch_ = 1;
  uint32_t base_ = 1;  // first epoch of this CTA
};

}  // namespace emulator
}  // namespace llmkern
