#include "report.h"

namespace llmkern {
namespace emulator {

std::string source_of(const Program& program, const Place& place) {
  const auto file = program.ast.files.find(place.file);
  if (place.file == 0 || file == program.ast.files.end()) return "";
  std::string text = file->second + ":" + std::to_string(place.source_line);
  if (place.inlined >= 0)
    text += ", inlined at " + program.ast.inlined_at[static_cast<size_t>(place.inlined)];
  return text;
}

std::string statement_text(const Program& program, const Place& place) {
  const auto line = static_cast<size_t>(place.line);
  if (line == 0 || line > program.lines.size()) return "";
  const std::string& text = program.lines[line - 1];
  const size_t begin = text.find_first_not_of(" \t"), end = text.find_last_not_of(" \t\r");
  return begin == std::string::npos ? "" : text.substr(begin, end - begin + 1);
}

namespace {

void set_place(const Launch& launch, int32_t index, int* line, std::string* source,
               std::string* text) {
  const Place& place = launch.kernel->code[static_cast<size_t>(index)].place;
  *line = place.line;
  *source = source_of(*launch.program, place);
  *text = statement_text(*launch.program, place);
}

}  // namespace

Report describe_fault(const Launch& launch, const Cta& cta, const Fault& fault) {
  Report r;
  r.failed = true;
  r.check = fault.check;
  r.message = fault.message;
  r.kernel = launch.kernel->name;
  const Warp& w = cta.warps[static_cast<size_t>(cta.current)];
  set_place(launch, w.pc, &r.line, &r.source, &r.text);
  if (fault.other >= 0)
    set_place(launch, fault.other, &r.other_line, &r.other_source, &r.other_text);
  for (int i = 0; i < 3; ++i) r.cta[i] = cta.id[i];
  r.warp = w.id;
  r.lane = fault.lane;
  r.position = cta.position;
  return r;
}

Report describe_global_race(const Launch& launch, uint64_t linear_cta) {
  const GlobalRace& race = launch.race;
  Report r;
  r.failed = true;
  r.check = "global race";
  r.kernel = launch.kernel->name;
  set_place(launch, race.index, &r.line, &r.source, &r.text);
  r.cta[0] = static_cast<uint32_t>(linear_cta % launch.grid[0]);
  r.cta[1] = static_cast<uint32_t>(linear_cta / launch.grid[0] % launch.grid[1]);
  r.cta[2] = static_cast<uint32_t>(linear_cta / launch.grid[0] / launch.grid[1]);
  r.position = race.later;
  set_place(launch, race.other, &r.other_line, &r.other_source, &r.other_text);
  r.message = std::string(race.what) + " " + launch.registry.describe(race.address) +
              ", and nothing orders them";
  return r;
}

std::string Report::str() const {
  std::string out = check + " in " + kernel + ": " + message;
  if (!source.empty()) out += "\n  at " + source;
  out += "\n  PTX line " + std::to_string(line) + ": " + text;
  if (other_line > 0) {
    out += "\n  the other access: PTX line " + std::to_string(other_line) + ": " + other_text;
    if (!other_source.empty()) out += "\n    at " + other_source;
  }
  out += "\n  CTA (" + std::to_string(cta[0]) + ", " + std::to_string(cta[1]) + ", " +
         std::to_string(cta[2]) + ")";
  if (warp >= 0) out += ", warp " + std::to_string(warp);
  if (lane >= 0) out += ", lane " + std::to_string(lane);
  return out;
}

}  // namespace emulator
}  // namespace llmkern
