// Decoding of one statement, with strict rules: every modifier must be taken by the opcode's
// decoder, every operand must have the right kind and size, or loading fails with the PTX line.
#pragma once

#include <map>
#include <string>

#include "ir.h"

namespace llmkern {
namespace emulator {

// What is gathered while a kernel's statements are decoded.
class KernelBuilder {
 public:
  KernelBuilder(Program* program, const Function* function, Kernel* kernel);

  struct Found {
    uint32_t offset;
    Type type;
  };
  bool find_register(const std::string& name, int scope, Found* out);
  const Variable* find_variable(const std::string& name, int scope) const;
  int find_label(const std::string& name, int scope, int line) const;
  const std::vector<std::string>* find_targets(const std::string& name, int scope) const;

  uint32_t constant(uint64_t bits, int bytes);  // a register with `bits` in each lane
  uint32_t special(Special which);
  uint32_t scratch(int bytes);  // a register that no one else names
  uint64_t address_of(const Variable& v) const;
  bool is_local(const Variable& v) const;  // in the thread's own memory

  Program* program;
  const Function* function;
  Kernel* kernel;

 private:
  uint32_t allocate(int bytes);
  void lay_out_shared();
  void place_shared(const Variable& v);

  std::map<std::pair<int, std::string>, Found> registers_;
  std::map<std::pair<uint64_t, int>, uint32_t> constants_;
  std::map<std::string, uint64_t> shared_, global_, parameter_;
  std::map<const Variable*, uint64_t> local_;
};

class Decoder {
 public:
  Decoder(KernelBuilder* builder, const Statement* statement, Instr* out)
      : builder(builder), s(*statement), out(*out) {}

  [[noreturn]] void fail(const std::string& what) const;

  // Modifiers, in order.
  bool more() const { return next_ < s.modifiers.size(); }
  std::string peek() const { return more() ? s.modifiers[next_] : std::string(); }
  bool take(const char* modifier);
  int take_one_of(std::initializer_list<const char*> names);    // index, or fails
  int take_optional(std::initializer_list<const char*> names);  // index, or -1
  Type take_type();
  Type take_type(std::initializer_list<Type> allowed);
  void end() const;  // nothing may be left

  // Operands.
  int count() const { return static_cast<int>(s.operands.size()); }
  void expect(int operands) const;
  void expect(int least, int most) const;
  const Operand& operand(int i) const { return s.operands[i]; }
  void dst(const Operand& o, Type t);  // appends to out.r; destinations come first
  void src(const Operand& o, Type t);
  void dst(int i, Type t) { dst(operand(i), t); }
  void src(int i, Type t) { src(operand(i), t); }
  void wide_dst(const Operand& o, Type t);  // ld: the register may be wider than t
  void wide_src(const Operand& o, Type t);  // st: the same
  uint32_t source(const Operand& o, Type t, bool wider_allowed);
  void address(int i, Space space);  // [reg + offset]: sets address, imm, wide_address
  void members(int i);               // the member mask of a collective
  void append(uint32_t offset, bool destination);
  uint32_t integer(int i) const;           // a literal
  int size_of_register(const Operand& o);  // bytes; 0 if it is no register
  const std::vector<Operand>& vector(int i, int size) const;
  bool is_register(const Operand& o);

  KernelBuilder* builder;
  const Statement& s;
  Instr& out;

 private:
  uint64_t literal(const Operand& o, Type t) const;
  size_t next_ = 0;
};

using DecodeFunction = void (*)(Decoder&);
using OpcodeTable = std::map<std::string, DecodeFunction>;

// Each family adds its opcodes.
void add_integer_opcodes(OpcodeTable* table);
void add_bit_opcodes(OpcodeTable* table);
void add_float_opcodes(OpcodeTable* table);
void add_special_opcodes(OpcodeTable* table);
void add_compare_opcodes(OpcodeTable* table);
void add_convert_opcodes(OpcodeTable* table);
void add_move_opcodes(OpcodeTable* table);
void add_memory_opcodes(OpcodeTable* table);
void add_atomic_opcodes(OpcodeTable* table);
void add_async_opcodes(OpcodeTable* table);
void add_ldmatrix_opcodes(OpcodeTable* table);
void add_call_opcodes(OpcodeTable* table);
void add_wmma_opcodes(OpcodeTable* table);
void add_mma_opcodes(OpcodeTable* table);
void add_warp_opcodes(OpcodeTable* table);
void add_control_opcodes(OpcodeTable* table);

}  // namespace emulator
}  // namespace llmkern
