// From a parsed module to decoded kernels: storage of variables, registers, branch targets.
#include <cstring>
#include <sstream>

#include "address_sources.h"
#include "decode.h"
#include "inline_calls.h"
#include "poison.h"

namespace llmkern {
namespace emulator {
namespace {

constexpr int64_t kMaxRegisterBytes = int64_t{16} << 20;
constexpr int64_t kMaxLocalBytes = 512 * 1024;  // the limit of CUDA
constexpr uint32_t kRegisterAlign = 64;

int64_t align_up(int64_t v, int64_t a) { return (v + a - 1) / a * a; }

int lane_bytes(Type t) { return std::max(2, bytes_of(t)); }

const OpcodeTable& opcode_table() {
  static const OpcodeTable table = [] {
    OpcodeTable t;
    add_integer_opcodes(&t);
    add_bit_opcodes(&t);
    add_float_opcodes(&t);
    add_special_opcodes(&t);
    add_compare_opcodes(&t);
    add_convert_opcodes(&t);
    add_move_opcodes(&t);
    add_memory_opcodes(&t);
    add_atomic_opcodes(&t);
    add_async_opcodes(&t);
    add_ldmatrix_opcodes(&t);
    add_mma_opcodes(&t);
    add_wmma_opcodes(&t);
    add_call_opcodes(&t);
    add_warp_opcodes(&t);
    add_control_opcodes(&t);
    return t;
  }();
  return table;
}

}  // namespace

KernelBuilder::KernelBuilder(Program* program, const Function* function, Kernel* kernel)
    : program(program), function(function), kernel(kernel) {
  int64_t offset = 0;
  for (const Variable& p : function->parameters) {
    offset = align_up(offset, p.align);
    parameter_[p.name] = static_cast<uint64_t>(offset);
    kernel->parameters.push_back({p.name, offset, p.bytes});
    offset += p.bytes;
  }
  kernel->parameter_bytes = offset;
  lay_out_shared();
  for (size_t i = 0; i < program->globals.size(); ++i) {
    global_[program->globals[i].first] =
        reinterpret_cast<uint64_t>(program->globals[i].second.data());
  }
}

// Shared variables of the module and of the function, then the dynamic part.
void KernelBuilder::lay_out_shared() {
  int64_t dynamic_align = 16;
  for (const Variable& v : program->ast.variables) {
    if (v.space != Space::kShared) continue;
    if (v.external) {
      dynamic_align = std::max(dynamic_align, v.align);
    } else {
      place_shared(v);
    }
  }
  for (const Scope& scope : function->scopes) {
    for (const auto& entry : scope.variables) {
      const Variable& v = entry.second;
      if (v.space == Space::kShared) {
        place_shared(v);
      } else if (v.space == Space::kLocal || v.space == Space::kParam) {
        // .param: what a call sequence passes.
        kernel->local_bytes = align_up(kernel->local_bytes, v.align);
        local_[&v] = static_cast<uint64_t>(kernel->local_bytes);
        kernel->local_bytes += v.bytes;
      } else {
        throw PtxError(v.line, "'" + v.name + "': only .shared, .local and .param inside a kernel");
      }
    }
  }
  if (kernel->local_bytes > kMaxLocalBytes) throw PtxError(function->line, "too much local memory");
  kernel->dynamic_base = align_up(kernel->static_shared, dynamic_align);
  for (const Variable& v : program->ast.variables) {
    if (v.space == Space::kShared && v.external) {
      shared_[v.name] = static_cast<uint64_t>(kernel->dynamic_base);
    }
  }
}

void KernelBuilder::place_shared(const Variable& v) {
  if (shared_.count(v.name) != 0) return;  // of a function that is called twice
  kernel->static_shared = align_up(kernel->static_shared, v.align);
  shared_[v.name] = static_cast<uint64_t>(kernel->static_shared);
  kernel->static_shared += v.bytes;
}

uint32_t KernelBuilder::allocate(int bytes) {
  const size_t size = bytes == 0 ? kRegisterAlign : static_cast<size_t>(bytes) * kLanes;
  const size_t offset = kernel->register_image.size();
  const size_t rounded = (size + kRegisterAlign - 1) / kRegisterAlign * kRegisterAlign;
  if (offset + rounded > static_cast<size_t>(kMaxRegisterBytes)) {
    throw PtxError(function->line, "too many registers");
  }
  kernel->register_image.resize(offset + rounded);
  return static_cast<uint32_t>(offset);
}

bool KernelBuilder::find_register(const std::string& name, int scope, Found* out) {
  for (int at = scope; at >= 0; at = function->scopes[at].parent) {
    const Scope& s = function->scopes[at];
    Type type = Type::kNone;
    const auto single = s.registers.find(name);
    if (single != s.registers.end()) {
      type = single->second;
    } else {
      const size_t digits = name.find_last_not_of("0123456789") + 1;
      const auto family = s.families.find(name.substr(0, digits));
      if (family == s.families.end() || digits == name.size() || name.size() - digits > 9) continue;
      if (std::stoi(name.substr(digits)) >= s.family_size.at(family->first)) continue;
      type = family->second;
    }
    const auto key = std::make_pair(at, name);
    const auto known = registers_.find(key);
    if (known != registers_.end()) {
      *out = known->second;
      return true;
    }
    const int bytes = type == Type::kPred ? 0 : lane_bytes(type);
    *out = {allocate(bytes), type};
    registers_[key] = *out;
    kernel->registers.push_back({name, out->offset, static_cast<uint32_t>(bytes)});
    return true;
  }
  return false;
}

const Variable* KernelBuilder::find_variable(const std::string& name, int scope) const {
  for (int at = scope; at >= 0; at = function->scopes[at].parent) {
    const auto alias = function->scopes[at].aliases.find(name);
    if (alias != function->scopes[at].aliases.end())
      return find_variable(alias->second.second, alias->second.first);
    const auto found = function->scopes[at].variables.find(name);
    if (found != function->scopes[at].variables.end()) return &found->second;
  }
  for (const Variable& p : function->parameters) {
    if (p.name == name) return &p;
  }
  for (const Variable& v : program->ast.variables) {
    if (v.name == name) return &v;
  }
  return nullptr;
}

bool KernelBuilder::is_local(const Variable& v) const { return local_.count(&v) != 0; }

uint64_t KernelBuilder::address_of(const Variable& v) const {
  const auto local = local_.find(&v);
  if (local != local_.end()) return local->second;
  const auto& table = v.space == Space::kShared  ? shared_
                      : v.space == Space::kParam ? parameter_
                                                 : global_;
  const auto found = table.find(v.name);
  if (found == table.end()) throw PtxError(v.line, "'" + v.name + "' has no storage here");
  return found->second;
}

int KernelBuilder::find_label(const std::string& name, int scope, int line) const {
  for (int at = scope; at >= 0; at = function->scopes[at].parent) {
    const auto found = function->scopes[at].labels.find(name);
    if (found != function->scopes[at].labels.end()) return found->second;
  }
  throw PtxError(line, "label '" + name + "' is not defined");
}

const std::vector<std::string>* KernelBuilder::find_targets(const std::string& name,
                                                            int scope) const {
  for (int at = scope; at >= 0; at = function->scopes[at].parent) {
    const auto found = function->scopes[at].branch_targets.find(name);
    if (found != function->scopes[at].branch_targets.end()) return &found->second;
  }
  return nullptr;
}

uint32_t KernelBuilder::constant(uint64_t bits, int bytes) {
  const auto key = std::make_pair(bits, bytes);
  const auto known = constants_.find(key);
  if (known != constants_.end()) return known->second;
  const uint32_t offset = allocate(bytes);
  char* at = kernel->register_image.data() + offset;
  const int step = bytes == 0 ? 4 : bytes;
  for (int lane = 0; lane < (bytes == 0 ? 1 : kLanes); ++lane) {
    std::memcpy(at + lane * step, &bits, static_cast<size_t>(std::min(step, 8)));
  }
  constants_[key] = offset;
  return offset;
}

uint32_t KernelBuilder::special(Special which) {
  uint32_t& offset = kernel->special[which];
  if (offset == kNoRegister) offset = allocate(4);
  return offset;
}

uint32_t KernelBuilder::scratch(int bytes) { return allocate(bytes); }

namespace {

void decode_statement(KernelBuilder* builder, const Statement& s, Instr* out) {
  out->place = s.place;
  Decoder d(builder, &s, out);
  const auto& table = opcode_table();
  const auto entry = table.find(s.opcode);
  if (entry == table.end()) d.fail("unknown opcode");
  if (!s.guard.empty()) {
    KernelBuilder::Found found;
    if (!builder->find_register(s.guard, s.scope, &found) || found.type != Type::kPred) {
      d.fail("guard '" + s.guard + "' is not a predicate register");
    }
    out->guard = found.offset;
    out->guard_negated = s.guard_negated;
  }
  entry->second(d);
}

int capability_of(const std::string& target) {
  const size_t digit = target.find_first_of("0123456789");
  return digit == std::string::npos ? 0 : std::atoi(target.c_str() + digit);
}

bool touches_memory(Class c) {
  return (c >= Class::kGlobalLoad && c <= Class::kAtomic) || c == Class::kMatrixLoad ||
         c == Class::kAsyncCopy;
}

std::unique_ptr<Kernel> load_kernel(Program* program, const Function& entry) {
  const Function f = inline_calls(program->ast, entry);
  auto kernel = std::make_unique<Kernel>();
  kernel->name = f.name;
  kernel->capability = capability_of(program->ast.target);
  kernel->threads_required = f.threads_required;
  if (f.threads_max > 0) kernel->threads_max = f.threads_max;
  KernelBuilder builder(program, &f, kernel.get());
  kernel->code.resize(f.body.size() + 1);
  for (size_t i = 0; i < f.body.size(); ++i) {
    kernel->code[i].index = static_cast<int32_t>(i);
    decode_statement(&builder, f.body[i], &kernel->code[i]);
    if (!touches_memory(kernel->code[i].klass)) continue;
    kernel->code[i].slot = kernel->slots;
    kernel->slots += 2;
  }
  // A body may end without ret.
  Instr& last = kernel->code.back();
  last.kind = Kind::kExit;
  last.klass = Class::kControl;
  last.index = static_cast<int32_t>(f.body.size());
  if (!f.body.empty()) last.place = f.body.back().place;
  find_address_sources(kernel.get());
  find_unset_registers(kernel.get());
  return kernel;
}

}  // namespace

std::unique_ptr<Program> load_program(const std::string& text) {
  auto program = std::make_unique<Program>();
  program->ast = parse_ptx(text);
  std::istringstream stream(text);
  for (std::string line; std::getline(stream, line);) program->lines.push_back(line);
  for (const Variable& v : program->ast.variables) {
    if (v.space != Space::kGlobal && v.space != Space::kConst) continue;
    if (v.external) throw PtxError(v.line, "external variable '" + v.name + "' is not here");
    std::vector<uint8_t> bytes(static_cast<size_t>(std::max<int64_t>(v.bytes, 1)));
    std::copy(v.init.begin(), v.init.end(), bytes.begin());
    program->globals.emplace_back(v.name, std::move(bytes));
  }
  for (const Function& f : program->ast.functions) {
    if (f.entry) program->kernels.push_back(load_kernel(program.get(), f));
  }
  return program;
}

}  // namespace emulator
}  // namespace llmkern
