// call, of the two functions that kernels get from the runtime: a failed assertion stops the kernel
// with its message; printf is counted as a call and prints nothing.
#include <cstring>

#include "decode.h"
#include "lanes.h"

namespace llmkern {
namespace emulator {
namespace {

// The text at a generic address, if it is a variable of the module.
std::string text_at(const Program& program, uint64_t address) {
  for (const auto& variable : program.globals) {
    const auto begin = reinterpret_cast<uint64_t>(variable.second.data());
    if (address < begin || address >= begin + variable.second.size()) continue;
    const char* at = reinterpret_cast<const char*>(address);
    return std::string(at,
                       strnlen(at, static_cast<size_t>(begin + variable.second.size() - address)));
  }
  return "";
}

// imm: where the first parameter, the message, lies in local memory; -1: unknown.
void assert_failed(Warp& w, const Instr& in, uint32_t mask) {
  const int lane = __builtin_ctz(mask);
  std::string message;
  if (in.imm >= 0) {
    uint64_t address;
    std::memcpy(&address, w.local + w.launch->kernel->local_bytes * lane + in.imm, sizeof address);
    message = text_at(*w.launch->program, address);
  }
  throw Fault{"assertion",
              "a device assertion failed" + (message.empty() ? message : ": " + message), lane, -1};
}

void print_nothing(Warp& w, const Instr& in, uint32_t mask) {
  if (in.imm < 0) return;
  for_lanes(mask, [&](int l) {
    std::memset(w.local + w.launch->kernel->local_bytes * l + in.imm, 0, 4);
  });
}

int64_t first_local(Decoder& d, const std::vector<Operand>& list, int64_t bytes) {
  if (list.empty()) return -1;
  const Variable* v = d.builder->find_variable(list[0].name, d.s.scope);
  if (v == nullptr || !d.builder->is_local(*v) || v->bytes < bytes)
    d.fail("'" + list[0].name + "' is no parameter of a call");
  return static_cast<int64_t>(d.builder->address_of(*v));
}

void decode_call(Decoder& d) {
  d.take("uni");
  d.expect(1, 3);
  const bool returns = d.operand(0).kind == Operand::kList;
  if (d.count() < (returns ? 2 : 1)) d.fail("the function is missing");
  const std::string& name = d.operand(returns).name;
  const std::vector<Operand> none;
  const std::vector<Operand>& passed =
      d.count() > returns + 1 ? d.operand(returns + 1).parts : none;
  d.out.klass = Class::kControl;
  if (name == "__assertfail") {
    d.out.imm = first_local(d, passed, 8);
    d.out.run = &assert_failed;
  } else if (name == "vprintf") {
    d.out.imm = returns ? first_local(d, d.operand(0).parts, 4) : -1;
    d.out.run = &print_nothing;
  } else {
    d.fail("calls of '" + name + "' are not known");
  }
}

}  // namespace

void add_call_opcodes(OpcodeTable* table) { (*table)["call"] = decode_call; }

}  // namespace emulator
}  // namespace llmkern
