// The decoded program: instructions with a handler and register offsets, ready to run.
//
// A register is an array of 32 lanes inside the warp's register file, found by byte offset; a
// predicate is one 32-bit lane mask. Constants and special registers are registers too, filled in
// before the warp starts, so handlers know one kind of operand.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "ptx_ast.h"

namespace llmkern {
namespace emulator {

constexpr int kLanes = 32;
constexpr uint32_t kAllLanes = 0xffffffffu;
constexpr uint32_t kNoRegister = 0xffffffffu;
constexpr int kMaxWarps = 32;
constexpr int kMaxOperands = 32;

// Generic addresses: these windows in the top byte; anything else is a host pointer.
constexpr uint64_t kSharedWindow = uint64_t{0x71} << 56;
constexpr uint64_t kLocalWindow = uint64_t{0x72} << 56;
constexpr uint64_t kWindowMask = uint64_t{0xff} << 56;

struct Warp;
struct Instr;
using Handler = void (*)(Warp&, const Instr&, uint32_t mask);

// How the warp's loop treats an instruction; everything but control flow is a call of `run`.
enum class Kind : uint8_t {
  kLane,        // each lane for itself
  kCollective,  // all lanes of the member mask must be here: r[member]
  kAligned,     // all alive lanes must be here (mma, ldmatrix)
  kBranch,
  kBranchTable,
  kExit,
  kBarrier,
};

enum class Class : uint8_t {
  kMove,
  kInteger,
  kFloat,
  kSpecial,
  kConvert,
  kCompare,
  kParam,
  kGlobalLoad,
  kGlobalStore,
  kSharedLoad,
  kSharedStore,
  kLocal,
  kAtomic,
  kMatrix,
  kMatrixLoad,
  kAsyncCopy,
  kExchange,
  kControl,
  kBarrier,
  kFence,
};  // clang-format off
constexpr const char* kClassNames[] = {
  "move", "integer", "float", "special", "convert", "compare", "param", "global load",
  "global store", "shared load", "shared store", "local", "atomic", "mma", "ldmatrix",
  "async copy", "exchange", "control", "barrier", "fence",
};  // clang-format on
constexpr int kClasses = sizeof(kClassNames) / sizeof(kClassNames[0]);

// How unset lanes of operands make lanes of the result unset (poison.h).
// kPart: a result put together of parts is unset only if all of them are; which bytes of it are is
// not followed.
enum class Track : uint8_t { kAny, kSelect, kShuffle, kAnd, kOr, kPart };

// Slots of the poison masks that an instruction meets, -1 where it can meet none.
struct Tracked {
  int guard = -1;
  int operand[kMaxOperands];
};

// What every instruction needs when it runs comes first, in one cache line with its first operands.
struct alignas(64) Instr {
  Handler run = nullptr;
  uint32_t guard = kNoRegister;
  int32_t index = 0;  // own position
  bool guard_negated = false;
  Kind kind = Kind::kLane;
  Class klass = Class::kInteger;
  Type type = Type::kNone;
  Space space = Space::kGeneric;
  uint8_t destinations = 0;  // r[0 .. destinations) are written, the rest read
  uint8_t operands = 0;
  uint8_t width = 1;          // elements of a vector access, matrices of ldmatrix
  uint8_t bytes = 0;          // of one element in memory
  uint8_t member = 0;         // index in r of a collective's member mask
  uint8_t address = 0;        // index in r of the address register
  bool wide_address = false;  // 64-bit
  uint8_t order = 0;          // kStrong ...
  bool uniform = false;       // bra.uni: all lanes must go one way
  Track track = Track::kAny;
  int64_t imm = 0;       // address offset, or the handler's own
  uint32_t mode = 0;     // meaning is the handler's own
  int32_t tracked = -1;  // index in Kernel::tracked: may meet an unset register
  uint32_t r[kMaxOperands] = {};
  uint32_t all_members = 0;  // the member mask, if it is a constant
  int32_t target = 0;        // branch
  int32_t slot = 0;          // of those below Kernel::slots, for what it touches: this and the next
  uint64_t sources = 0;      // bits of Kernel::pointers that a global address may come from
  Handler untracked = nullptr;  // where tracked: what `run` was
  Place place;
};

// Instr::order: volatile, relaxed, acquire, release; hands on what happened before; learns what was
// handed on, with no fence after it; is not for other CTAs.
constexpr uint8_t kStrong = 1, kReleases = 2, kAcquires = 4, kOwnCta = 8;
// Instr::mode of a load of a parameter at imm.
constexpr uint32_t kWholeParameter = 1;

struct Parameter {
  std::string name;
  int64_t offset = 0, bytes = 0;
};

struct RegisterName {
  std::string name;
  uint32_t offset = 0, bytes = 0;
};

// Registers that the launch fills in; kNoRegister where the kernel does not use them.
enum Special {
  kTidX,
  kTidY,
  kTidZ,
  kNtidX,
  kNtidY,
  kNtidZ,
  kCtaX,
  kCtaY,
  kCtaZ,
  kNctaX,
  kNctaY,
  kNctaZ,
  kLaneId,
  kWarpId,
  kNwarpId,
  kSmId,
  kNsmId,
  kGridId,
  kEqMask,
  kLtMask,
  kLeMask,
  kGtMask,
  kGeMask,
  kDynamicShared,
  kTotalShared,
  kSpecials
};

struct Kernel {
  std::string name;
  int capability = 0;
  std::vector<Instr> code;
  std::vector<std::vector<int32_t>> branch_tables;
  std::vector<char> register_image;  // constants in place, the rest zero
  std::vector<RegisterName> registers;
  std::array<uint32_t, kSpecials> special;
  std::vector<Parameter> parameters;
  int64_t parameter_bytes = 0;
  int64_t static_shared = 0;  // bytes; the dynamic part follows
  int64_t dynamic_base = 0;   // where `.extern .shared` begins
  int64_t local_bytes = 0;
  int threads_required = 0, threads_max = 1024;
  bool has_global_atomics = false;           // or volatile, relaxed ... accesses
  std::vector<int64_t> pointers;             // places of 64-bit parameters
  bool compares = false;                     // atom.cas
  std::vector<std::vector<int64_t>> passed;  // by call: where in local memory its parameters lie
  std::vector<Tracked> tracked;
  int poison_slots = 0;
  int slots = 2;  // the first two are for all that touch no memory

  Kernel() { special.fill(kNoRegister); }
};

// A module's kernels and what they share: variables, sources, text.
struct Program {
  Module ast;
  std::vector<std::string> lines;
  std::vector<std::unique_ptr<Kernel>> kernels;
  std::vector<std::pair<std::string, std::vector<uint8_t>>> globals;  // .global and .const
};

// Raises PtxError for anything that it does not know: opcode, modifier, type, operand.
std::unique_ptr<Program> load_program(const std::string& text);

}  // namespace emulator
}  // namespace llmkern
