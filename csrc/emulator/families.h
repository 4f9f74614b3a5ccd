// Opcodes that several families share (add.s32, add.f32, add.f16x2 ...): the decoder of each
// family, called once the type at the end of the opcode is known.
#pragma once

#include "decode.h"

namespace llmkern {
namespace emulator {

void decode_integer_add(Decoder& d);
void decode_integer_sub(Decoder& d);
void decode_integer_mul(Decoder& d);
void decode_integer_mad(Decoder& d);
void decode_integer_div(Decoder& d);
void decode_integer_min_max(Decoder& d, bool max);
void decode_integer_abs_neg(Decoder& d, bool negate);

// f16, bf16 and their pairs.
enum class HalfOp { kAdd, kSub, kMul, kFma, kMin, kMax, kAbs, kNeg };
void decode_half(Decoder& d, HalfOp op);

// The type that ends the opcode.
inline Type last_type(const Decoder& d) {
  return d.s.modifiers.empty() ? Type::kNone : type_named(d.s.modifiers.back());
}
inline bool is_half(Type t) {
  return t == Type::kF16 || t == Type::kF16x2 || t == Type::kBf16 || t == Type::kBf16x2;
}

}  // namespace emulator
}  // namespace llmkern
