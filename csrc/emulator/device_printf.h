// printf of device code: a format, and a list of arguments in memory, each at a multiple of its
// size as vprintf's callers lay it out.
#pragma once

#include <functional>
#include <string>

#include "machine.h"

namespace llmkern {
namespace emulator {

constexpr size_t kMostPrinted = size_t{1} << 20;  // bytes, of a launch; CUDA's buffer is as large

struct Printed {
  std::string text;
  int32_t arguments = 0;  // what printf returns on a device
};

// read(offset, bytes, to): a piece of the argument list. text_at(address): what %s points at.
Printed format_text(const std::string& format,
                    const std::function<void(uint64_t, int, void*)>& read,
                    const std::function<std::string(uint64_t)>& text_at);

// From a generic address that one lane passed; throws Fault where the lane may not read.
void read_print_argument(Warp& w, int lane, uint64_t address, int bytes, void* to);

}  // namespace emulator
}  // namespace llmkern
