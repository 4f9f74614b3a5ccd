// call, of the two functions that kernels get from the runtime: a failed assertion stops the kernel
// with its message, vprintf formats its text. Calls of the module's own functions are opened before
// (inline_calls.h).
#include <cstring>

#include "decode.h"
#include "device_printf.h"
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

template <class T>
T passed(Warp& w, const Instr& in, int lane, size_t i) {
  const auto& at = w.launch->kernel->passed[static_cast<size_t>(in.target)];
  T value;
  std::memcpy(&value, w.local + w.launch->kernel->local_bytes * lane + at[i], sizeof value);
  return value;
}

// __assertfail(message, file, line, function, bytes of a character)
void assert_failed(Warp& w, const Instr& in, uint32_t mask) {
  const int lane = __builtin_ctz(mask);
  const auto text = [&](size_t i) {
    return text_at(*w.launch->program, passed<uint64_t>(w, in, lane, i));
  };
  throw Fault{"assertion",
              text(1) + ":" + std::to_string(passed<uint32_t>(w, in, lane, 2)) + ": " + text(3) +
                  ": the device assertion `" + text(0) + "` failed",
              lane, -1};
}

// vprintf(format, arguments) -> int. Lanes print in their order.
void print(Warp& w, const Instr& in, uint32_t mask) {
  for_lanes(mask, [&](int l) {
    const std::string format = text_at(*w.launch->program, passed<uint64_t>(w, in, l, 0));
    const uint64_t list = passed<uint64_t>(w, in, l, 1);
    const Printed printed = format_text(
        format,
        [&](uint64_t offset, int bytes, void* to) {
          read_print_argument(w, l, list + offset, bytes, to);
        },
        [&](uint64_t address) { return text_at(*w.launch->program, address); });
    std::string& out = w.worker->printed;
    if (out.size() < kMostPrinted) out += printed.text;
    if (in.imm >= 0) {
      std::memcpy(w.local + w.launch->kernel->local_bytes * l + in.imm, &printed.arguments, 4);
    }
  });
}

int64_t local_offset(Decoder& d, const Operand& o, int64_t bytes) {
  const Variable* v = d.builder->find_variable(o.name, d.s.scope);
  if (v == nullptr || !d.builder->is_local(*v) || v->bytes != bytes)
    d.fail("'" + o.name + "' is no parameter of " + std::to_string(bytes) + " bytes");
  return static_cast<int64_t>(d.builder->address_of(*v));
}

void take_passed(Decoder& d, const std::vector<Operand>& operands,
                 std::initializer_list<int> bytes) {
  if (operands.size() != bytes.size())
    d.fail("expected " + std::to_string(bytes.size()) + " parameters, got " +
           std::to_string(operands.size()));
  std::vector<int64_t> offsets;
  for (int size : bytes) offsets.push_back(local_offset(d, operands[offsets.size()], size));
  d.out.target = static_cast<int32_t>(d.builder->kernel->passed.size());
  d.builder->kernel->passed.push_back(std::move(offsets));
}

void decode_call(Decoder& d) {
  d.take("uni");
  d.expect(1, 3);
  const bool returns = d.operand(0).kind == Operand::kList;
  if (d.count() < (returns ? 2 : 1)) d.fail("the function is missing");
  const std::string& name = d.operand(returns).name;
  const std::vector<Operand> none;
  const std::vector<Operand>& operands =
      d.count() > returns + 1 ? d.operand(returns + 1).parts : none;
  d.out.klass = Class::kControl;
  if (name == "__assertfail") {
    take_passed(d, operands, {8, 8, 4, 8, 8});
    d.out.run = &assert_failed;
  } else if (name == "vprintf") {
    take_passed(d, operands, {8, 8});
    d.out.imm = -1;
    if (returns && !d.operand(0).parts.empty())
      d.out.imm = local_offset(d, d.operand(0).parts[0], 4);
    d.out.run = &print;
  } else {
    d.fail("calls of '" + name + "' are not known");
  }
}

}  // namespace

void add_call_opcodes(OpcodeTable* table) { (*table)["call"] = decode_call; }

}  // namespace emulator
}  // namespace llmkern
