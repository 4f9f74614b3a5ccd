#include "decode.h"

#include <cstring>

namespace llmkern {
namespace emulator {
namespace {

bool is_float(Type t) { return t == Type::kF32 || t == Type::kF64; }

}  // namespace

void Decoder::fail(const std::string& what) const {
  std::string name = s.opcode;
  for (const std::string& m : s.modifiers) name += "." + m;
  throw PtxError(s.place.line, name + ": " + what);
}

bool Decoder::take(const char* modifier) {
  if (!more() || s.modifiers[next_] != modifier) return false;
  ++next_;
  return true;
}

int Decoder::take_optional(std::initializer_list<const char*> names) {
  int i = 0;
  for (const char* name : names) {
    if (take(name)) return i;
    ++i;
  }
  return -1;
}

int Decoder::take_one_of(std::initializer_list<const char*> names) {
  const int i = take_optional(names);
  if (i >= 0) return i;
  std::string known;
  for (const char* name : names) known += std::string(" .") + name;
  fail((more() ? "unknown modifier ." + peek() : std::string("a modifier is missing")) +
       "; known here:" + known);
}

Type Decoder::take_type() {
  const Type t = type_named(peek());
  if (t == Type::kNone) {
    fail(more() ? "unknown modifier or type ." + peek() : std::string("the type is missing"));
  }
  ++next_;
  return t;
}

Type Decoder::take_type(std::initializer_list<Type> allowed) {
  const std::string name = peek();
  const Type t = take_type();
  for (Type a : allowed) {
    if (a == t) return t;
  }
  fail("type ." + name + " is not known here");
}

void Decoder::end() const {
  if (more()) fail("unknown modifier ." + peek());
}

void Decoder::expect(int operands) const { expect(operands, operands); }

void Decoder::expect(int least, int most) const {
  end();
  if (count() >= least && count() <= most) return;
  fail("expected " + std::to_string(least) +
       (most > least ? " to " + std::to_string(most) : std::string()) + " operands, got " +
       std::to_string(count()));
}

void Decoder::append(uint32_t offset, bool destination) {
  if (out.operands == kMaxOperands) fail("too many operands");
  if (destination && out.destinations != out.operands) fail("destinations must come first");
  out.r[out.operands++] = offset;
  out.destinations += destination;
}

bool Decoder::is_register(const Operand& o) {
  KernelBuilder::Found found;
  return o.kind == Operand::kName && builder->find_register(o.name, s.scope, &found);
}

int Decoder::size_of_register(const Operand& o) {
  KernelBuilder::Found found;
  if (o.kind != Operand::kName || !builder->find_register(o.name, s.scope, &found)) return 0;
  return found.type == Type::kPred ? 0 : std::max(2, bytes_of(found.type));
}

namespace {

// Registers of 8 bits are kept in 16.
int register_bytes(Type t) { return t == Type::kPred ? 4 : std::max(2, bytes_of(t)); }

}  // namespace

void Decoder::dst(const Operand& o, Type t) {
  KernelBuilder::Found found;
  if (o.kind == Operand::kSink) {
    return append(builder->scratch(register_bytes(t)), true);
  }
  if (o.kind != Operand::kName || o.negated || !o.parts.empty() || o.offset != 0 ||
      !builder->find_register(o.name, s.scope, &found)) {
    fail("destination '" + o.name + "' is not a register");
  }
  const bool pred = t == Type::kPred;
  if (pred != (found.type == Type::kPred) || register_bytes(t) != register_bytes(found.type)) {
    fail("register " + o.name + " has the wrong size for this type");
  }
  append(found.offset, true);
}

void Decoder::wide_dst(const Operand& o, Type t) {
  const int size = size_of_register(o);
  if (o.kind == Operand::kSink) return dst(o, t);
  if (size == 0 || size < bytes_of(t)) fail("register " + o.name + " is too small for this type");
  KernelBuilder::Found found;
  builder->find_register(o.name, s.scope, &found);
  append(found.offset, true);
}

uint64_t Decoder::literal(const Operand& o, Type t) const {
  if (o.kind == Operand::kFloat64 && (t == Type::kF32 || t == Type::kB32)) {
    double wide;
    std::memcpy(&wide, &o.bits, 8);
    const float narrow = static_cast<float>(wide);
    uint32_t bits;
    std::memcpy(&bits, &narrow, 4);
    return bits;
  }
  const int bytes = bytes_of(t);
  if (o.kind == Operand::kFloat32 && bytes != 4) fail("a 32-bit float literal for another size");
  if (o.kind == Operand::kFloat64 && bytes != 8) fail("a 64-bit float literal for another size");
  if (o.kind == Operand::kInteger && is_float(t)) fail("an integer literal for a float type");
  return bytes >= 8 ? o.bits : o.bits & ((uint64_t{1} << (8 * bytes)) - 1);
}

namespace {

bool special_named(const std::string& name, Special* which) {
  static const std::map<std::string, Special> names = {
      {"%tid.x", kTidX},
      {"%tid.y", kTidY},
      {"%tid.z", kTidZ},
      {"%ntid.x", kNtidX},
      {"%ntid.y", kNtidY},
      {"%ntid.z", kNtidZ},
      {"%ctaid.x", kCtaX},
      {"%ctaid.y", kCtaY},
      {"%ctaid.z", kCtaZ},
      {"%nctaid.x", kNctaX},
      {"%nctaid.y", kNctaY},
      {"%nctaid.z", kNctaZ},
      {"%laneid", kLaneId},
      {"%warpid", kWarpId},
      {"%nwarpid", kNwarpId},
      {"%smid", kSmId},
      {"%nsmid", kNsmId},
      {"%lanemask_eq", kEqMask},
      {"%lanemask_lt", kLtMask},
      {"%lanemask_le", kLeMask},
      {"%lanemask_gt", kGtMask},
      {"%lanemask_ge", kGeMask},
      {"%dynamic_smem_size", kDynamicShared},
      {"%total_smem_size", kTotalShared},
  };
  const auto found = names.find(name);
  if (found == names.end()) return false;
  *which = found->second;
  return true;
}

}  // namespace

uint32_t Decoder::source(const Operand& o, Type t, bool wider_allowed) {
  const bool pred = t == Type::kPred;
  if (o.kind == Operand::kInteger || o.kind == Operand::kFloat32 || o.kind == Operand::kFloat64) {
    if (pred) return builder->constant(o.bits != 0 ? kAllLanes : 0, 0);
    return builder->constant(literal(o, t), register_bytes(t));
  }
  if (o.kind != Operand::kName || o.negated || !o.parts.empty()) {
    fail("operand '" + o.name + "' is not a register or a constant");
  }
  KernelBuilder::Found found;
  if (builder->find_register(o.name, s.scope, &found)) {
    const int have = register_bytes(found.type), want = register_bytes(t);
    if (o.offset != 0) fail("an offset on a register is only for addresses");
    if (pred != (found.type == Type::kPred) || have < want || (have > want && !wider_allowed)) {
      fail("register " + o.name + " has the wrong size for this type");
    }
    return found.offset;
  }
  Special which;
  if (special_named(o.name, &which)) {
    if (register_bytes(t) != 4 || pred) fail(o.name + " is a 32-bit register");
    return builder->special(which);
  }
  const Variable* v = builder->find_variable(o.name, s.scope);
  if (v == nullptr) fail("'" + o.name + "' is not declared");
  const uint64_t address = builder->address_of(*v) + static_cast<uint64_t>(o.offset);
  const bool narrow = v->space == Space::kShared || v->space == Space::kLocal;
  if (register_bytes(t) != 8 && !(register_bytes(t) == 4 && narrow && !pred)) {
    fail("the address of '" + o.name + "' needs 64 bits");
  }
  return builder->constant(address, register_bytes(t));
}

void Decoder::src(const Operand& o, Type t) { append(source(o, t, false), false); }
void Decoder::wide_src(const Operand& o, Type t) { append(source(o, t, true), false); }

void Decoder::address(int i, Space space) {
  const Operand& o = operand(i);
  if (o.kind != Operand::kAddress) fail("expected an address in brackets");
  out.imm = o.offset;
  out.address = out.operands;
  out.wide_address = true;
  KernelBuilder::Found found;
  if (o.name.empty()) return append(builder->constant(0, 8), false);
  if (builder->find_register(o.name, s.scope, &found)) {
    const int size = register_bytes(found.type);
    if (found.type == Type::kPred || size < 4 || size > 8) fail("bad address register " + o.name);
    if (size == 4 && (space == Space::kGlobal || space == Space::kGeneric)) {
      fail("a global address needs a 64-bit register, " + o.name + " has 32");
    }
    out.wide_address = size == 8;
    return append(found.offset, false);
  }
  const Variable* v = builder->find_variable(o.name, s.scope);
  if (v == nullptr) fail("'" + o.name + "' is not declared");
  const Space declared = builder->is_local(*v) ? Space::kLocal : v->space;
  if (declared == Space::kShared && space == Space::kGeneric)
    fail("a name in shared memory needs .shared");
  if (space != Space::kGeneric && declared != space) {
    fail("'" + o.name + "' is in another state space");
  }
  append(builder->constant(builder->address_of(*v), 8), false);
}

void Decoder::members(int i) {
  out.member = out.operands;
  if (operand(i).kind == Operand::kInteger)
    out.all_members = static_cast<uint32_t>(operand(i).bits);
  src(i, Type::kB32);
}

uint32_t Decoder::integer(int i) const {
  const Operand& o = operand(i);
  if (o.kind != Operand::kInteger) fail("operand " + std::to_string(i) + " must be a literal");
  return static_cast<uint32_t>(o.bits);
}

const std::vector<Operand>& Decoder::vector(int i, int size) const {
  const Operand& o = operand(i);
  if (o.kind != Operand::kVector || static_cast<int>(o.parts.size()) != size) {
    fail("operand " + std::to_string(i) + " must be a vector of " + std::to_string(size));
  }
  return o.parts;
}

}  // namespace emulator
}  // namespace llmkern
