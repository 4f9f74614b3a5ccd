// bra brx ret exit trap bar barrier.
#include "decode.h"
#include "lanes.h"

namespace llmkern {
namespace emulator {
namespace {

void decode_bra(Decoder& d) {
  d.out.uniform = d.take("uni");
  d.expect(1);
  d.out.kind = Kind::kBranch;
  d.out.klass = Class::kControl;
  d.out.target = d.builder->find_label(d.operand(0).name, d.s.scope, d.s.place.line);
}

void decode_brx(Decoder& d) {
  d.take_one_of({"idx"});
  d.take("uni");
  d.expect(2);
  d.src(0, Type::kU32);
  const auto* names = d.builder->find_targets(d.operand(1).name, d.s.scope);
  if (names == nullptr) d.fail("'" + d.operand(1).name + "' is no list of branch targets");
  std::vector<int32_t> table;
  for (const std::string& name : *names)
    table.push_back(d.builder->find_label(name, d.s.scope, d.s.place.line));
  d.out.target = static_cast<int32_t>(d.builder->kernel->branch_tables.size());
  d.builder->kernel->branch_tables.push_back(std::move(table));
  d.out.kind = Kind::kBranchTable;
  d.out.klass = Class::kControl;
}

void decode_exit(Decoder& d) {
  d.take("uni");
  d.expect(0);
  d.out.kind = Kind::kExit;
  d.out.klass = Class::kControl;
}

void trap(Warp&, const Instr&, uint32_t mask) {
  throw Fault{"trap", "the kernel executed trap", __builtin_ctz(mask), -1};
}

void decode_trap(Decoder& d) {
  d.expect(0);
  d.out.klass = Class::kControl;
  d.out.run = &trap;
}

// r: [result,] barrier, count, [predicate].
void barrier_operands(Decoder& d, int first, bool counted) {
  d.src(first, Type::kU32);
  if (counted) {
    d.src(first + 1, Type::kU32);
  } else {
    d.append(d.builder->constant(0, 4), false);
  }
}

void decode_warp_barrier(Decoder& d) {
  d.take_one_of({"sync"});
  d.expect(1);
  d.members(0);
  d.out.kind = Kind::kCollective;
  d.out.klass = Class::kExchange;
  d.out.run = [](Warp&, const Instr&, uint32_t) {};
}

void decode_reduction(Decoder& d) {
  const int op = d.take_one_of({"popc", "and", "or"});
  d.take("aligned");
  const Type t = d.take_type({Type::kPred, Type::kU32});
  if ((op == 0) != (t == Type::kU32)) d.fail("popc counts into u32, and / or vote into pred");
  d.expect(3, 4);
  d.dst(0, t);
  barrier_operands(d, 1, d.count() == 4);
  Operand p = d.operand(d.count() - 1);
  if (p.negated) d.fail("a negated predicate is not known here");
  d.src(p, Type::kPred);
  d.out.mode = static_cast<uint32_t>(op);
}

// bar and barrier differ in what they ask of lanes that diverge; here all alive lanes come together
// in both.
void decode_bar(Decoder& d) {
  if (d.s.opcode == "bar" && d.take("warp")) return decode_warp_barrier(d);
  d.take("cta");
  d.out.kind = Kind::kBarrier;
  d.out.klass = Class::kBarrier;
  const int what = d.take_one_of({"sync", "arrive", "red"});
  if (what == 2) return decode_reduction(d);
  d.take("aligned");
  d.expect(what == 1 ? 2 : 1, 2);
  barrier_operands(d, 0, d.count() == 2);
  d.out.imm = what == 1;
}

}  // namespace

void add_control_opcodes(OpcodeTable* table) {
  (*table)["bra"] = decode_bra;
  (*table)["brx"] = decode_brx;
  (*table)["ret"] = decode_exit;
  (*table)["exit"] = decode_exit;
  (*table)["trap"] = decode_trap;
  (*table)["brkpt"] = decode_trap;
  (*table)["bar"] = decode_bar;
  (*table)["barrier"] = decode_bar;
}

}  // namespace emulator
}  // namespace llmkern
