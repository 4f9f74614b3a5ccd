// What a launch gives back: a report of what stopped it, and the counters.
#pragma once

#include <string>
#include <vector>

#include "machine.h"

namespace llmkern {
namespace emulator {

// All that is known of a fault, as text and as fields.
struct Report {
  bool failed = false;
  std::string check, message, kernel;
  std::string source, other_source;  // "file.py:12, inlined at ..."
  std::string text, other_text;      // the PTX statement
  int line = 0, other_line = 0;      // in the PTX
  uint32_t cta[3] = {0, 0, 0};
  int warp = -1, lane = -1;
  int64_t position = -1;  // of the CTA in the order of the launch

  std::string str() const;
};

Report describe_fault(const Launch& launch, const Cta& cta, const Fault& fault);
Report describe_global_race(const Launch& launch, uint64_t linear_cta);
std::string source_of(const Program& program, const Place& place);
std::string statement_text(const Program& program, const Place& place);

struct Result {
  Report report;
  std::vector<Count> counts;  // by instruction
  std::string printed;        // by CTAs in their order, up to the one that failed
};

// Runs a launch on options.threads host threads.
Result run_launch(Launch& launch);

}  // namespace emulator
}  // namespace llmkern
