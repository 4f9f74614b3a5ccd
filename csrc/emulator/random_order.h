// Shuffles by a seed, the same on every machine. Seed 0 leaves the order as it is.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

namespace llmkern {
namespace emulator {

class Shuffler {
 public:
  explicit Shuffler(uint64_t seed) : state_(seed) {}

  template <class T>
  void operator()(std::vector<T>* v) {
    if (state_ == 0) return;
    for (size_t i = v->size(); i > 1; --i) std::swap((*v)[i - 1], (*v)[next() % i]);
  }

 private:
  uint64_t next() {  // splitmix64
    uint64_t z = (state_ += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }

  uint64_t state_;
};

}  // namespace emulator
}  // namespace llmkern
