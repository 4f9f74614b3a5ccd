// What the parser makes of a PTX module: declarations and statements with their places, nothing
// decoded yet. Names stay text; scopes keep `{ .reg ... }` of inline assembly apart.
#pragma once

#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

namespace llmkern {
namespace emulator {

// Text that is not PTX, or PTX that this emulator does not know. Carries the line.
struct PtxError : std::runtime_error {
  PtxError(int line, const std::string& what)
      : std::runtime_error("PTX line " + std::to_string(line) + ": " + what) {}
};

enum class Space : uint8_t { kGeneric, kGlobal, kShared, kLocal, kParam, kConst };

enum class Type : uint8_t {
  kNone,
  kPred,
  kB8,
  kB16,
  kB32,
  kB64,
  kB128,
  kU8,
  kU16,
  kU32,
  kU64,
  kS8,
  kS16,
  kS32,
  kS64,
  kF16,
  kF16x2,
  kBf16,
  kBf16x2,
  kTf32,
  kF32,
  kF32x2,
  kF64,
  kE4m3x2,
  kE5m2x2,
};  // clang-format off

inline int bytes_of(Type t) {
  switch (t) {
    case Type::kB8: case Type::kU8: case Type::kS8: return 1;
    case Type::kB16: case Type::kU16: case Type::kS16: case Type::kF16: case Type::kBf16:
    case Type::kE4m3x2: case Type::kE5m2x2: return 2;
    case Type::kB64: case Type::kU64: case Type::kS64: case Type::kF64: case Type::kF32x2: return 8;
    case Type::kB128: return 16;
    case Type::kNone: return 0;
    default: return 4;  // predicates are one 32-bit lane mask
  }
}
// clang-format on

// The type that a suffix such as "s32" names; kNone if it names none.
Type type_named(const std::string& name);

struct Place {
  int line = 0;                   // in the PTX text
  int file = 0, source_line = 0;  // of the last .loc
  int inlined = -1;               // index into Module::inlined_at, or -1
};

struct Operand {
  enum Kind { kName, kInteger, kFloat32, kFloat64, kVector, kAddress, kList, kSink };
  Kind kind = kName;
  std::string name;            // kName; base of kAddress (empty: absolute)
  bool negated = false;        // !%p
  uint64_t bits = 0;           // value of the constants (kFloat*: the IEEE pattern)
  int64_t offset = 0;          // kAddress; kName: symbol + offset
  std::vector<Operand> parts;  // kVector {a, b}; kList (a, b); a|b is kName with one part
};

struct Statement {
  Place place;
  int scope = 0;
  std::string guard;
  bool guard_negated = false;
  std::string opcode;                  // "ld"
  std::vector<std::string> modifiers;  // {"global", "v4", "b32"}
  std::vector<Operand> operands;
};

struct Variable {
  std::string name;
  Space space = Space::kGlobal;
  Type type = Type::kNone;
  int64_t align = 1, bytes = 0;
  bool external = false;
  std::vector<uint8_t> init;  // .global / .const; the rest is zero
  int line = 0;
};

struct Scope {
  int parent = -1;
  std::map<std::string, Type> registers;
  std::map<std::string, Type> families;  // %r<10>: prefix -> type
  std::map<std::string, int> family_size;
  std::map<std::string, Variable> variables;
  std::map<std::string, int> labels;  // -> index of the next statement
  std::map<std::string, std::vector<std::string>> branch_targets;
  // Of a function opened at a call: its parameters, as (scope, name) of what was passed.
  std::map<std::string, std::pair<int, std::string>> aliases;
};

struct Function {
  std::string name;
  bool entry = false, external = false;
  int line = 0;
  int threads_required = 0;  // .reqntid, 0 if absent
  int threads_max = 0;       // .maxntid
  std::vector<Variable> parameters, results;
  std::vector<Scope> scopes;
  std::vector<Statement> body;
};

struct Module {
  std::string version, target;
  std::map<int, std::string> files;
  std::vector<std::string> inlined_at;
  std::vector<Variable> variables;
  std::vector<Function> functions;
};

// Raises PtxError.
Module parse_ptx(const std::string& text);

}  // namespace emulator
}  // namespace llmkern
