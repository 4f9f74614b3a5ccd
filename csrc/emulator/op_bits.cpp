// Bits: and or xor not cnot shl shr shf bfe bfi bfind clz popc brev prmt lop3.
#include "decode.h"
#include "lanes.h"

namespace llmkern {
namespace emulator {
namespace {

template <class T>
struct And {
  static T apply(T a, T b) { return a & b; }
};
template <class T>
struct Or {
  static T apply(T a, T b) { return a | b; }
};
template <class T>
struct Xor {
  static T apply(T a, T b) { return a ^ b; }
};
template <class T>
struct Not {
  static T apply(T a) { return static_cast<T>(~a); }
};
template <class T>
struct LogicalNot {
  static T apply(T a) { return a == 0 ? 1 : 0; }
};
// Shifts clamp at the width.
template <class T>
struct ShiftLeft {
  static T apply(T a, uint32_t n) {
    return n >= 8 * sizeof(T) ? T{0} : static_cast<T>(uint64_t(a) << n);
  }
};
template <class T>
struct ShiftRight {
  static T apply(T a, uint32_t n) {
    const uint32_t last = 8 * sizeof(T) - 1;
    return n > last ? static_cast<T>((a >> last) >> 1) : static_cast<T>(a >> n);
  }
};
template <bool kClamp>
struct FunnelLeft {
  static uint32_t apply(uint32_t a, uint32_t b, uint32_t c) {
    const uint32_t n = kClamp ? (c > 32 ? 32 : c) : c & 31;
    return static_cast<uint32_t>(((uint64_t(b) << 32 | a) << n) >> 32);
  }
};
template <bool kClamp>
struct FunnelRight {
  static uint32_t apply(uint32_t a, uint32_t b, uint32_t c) {
    const uint32_t n = kClamp ? (c > 32 ? 32 : c) : c & 31;
    return static_cast<uint32_t>((uint64_t(b) << 32 | a) >> n);
  }
};
// Bits [pos, pos + len) with the field's top bit (or the value's, past its end) spread upwards.
template <class U, bool kSigned>
struct ExtractField {
  static U apply(U a, uint32_t b, uint32_t c) {
    const uint32_t width = 8 * sizeof(U), pos = b & 0xff, len = c & 0xff;
    if (len == 0) return 0;
    const uint32_t top = std::min(pos + len - 1, width - 1);
    const U sign = kSigned ? (a >> top) & 1 : 0;
    U field = pos >= width ? 0 : static_cast<U>(a >> pos);
    const uint32_t have = pos >= width ? 0 : std::min(len, width - pos);
    if (have < width) {
      const U low = (U{1} << have) - 1;
      field = (field & low) | (sign != 0 ? static_cast<U>(~low) : 0);
    }
    return field;
  }
};
template <class U>
U insert_field(U a, U b, uint32_t c, uint32_t d) {
  const uint32_t width = 8 * sizeof(U), pos = c & 0xff, len = d & 0xff;
  if (pos >= width || len == 0) return b;
  const U field = len >= width ? static_cast<U>(~U{0}) : (U{1} << len) - 1;
  const U mask = static_cast<U>(field << pos);
  return (b & ~mask) | (static_cast<U>(a << pos) & mask);
}
template <class U>
void bfi(Warp& w, const Instr& in, uint32_t mask) {
  for_lanes(mask, [&](int l) {
    w.at<U>(in.r[0])[l] = insert_field<U>(w.at<U>(in.r[1])[l], w.at<U>(in.r[2])[l],
                                          w.at<uint32_t>(in.r[3])[l], w.at<uint32_t>(in.r[4])[l]);
  });
}
template <class U>
int leading_zeros(U a) {
  if (a == 0) return 8 * sizeof(U);
  return sizeof(U) == 8 ? __builtin_clzll(a) : __builtin_clz(static_cast<uint32_t>(a));
}
template <class U>
struct CountLeading {
  static uint32_t apply(U a) { return static_cast<uint32_t>(leading_zeros(a)); }
};
template <class U>
struct PopCount {
  static uint32_t apply(U a) {
    return static_cast<uint32_t>(bit_count(static_cast<uint32_t>(a)) +
                                 bit_count(static_cast<uint32_t>(uint64_t(a) >> 32)));
  }
};
template <class U>
struct Reverse {
  static U apply(U a) {
    U r = 0;
    for (size_t i = 0; i < 8 * sizeof(U); ++i) r = static_cast<U>(r << 1 | (a >> i & 1));
    return r;
  }
};
template <class U, bool kSigned, bool kShift>
struct FindTop {
  static uint32_t apply(U a) {
    const int width = 8 * sizeof(U);
    if (kSigned && (a >> (width - 1)) != 0) a = static_cast<U>(~a);
    if (a == 0) return ~0u;
    const int at = width - 1 - leading_zeros(a);
    return static_cast<uint32_t>(kShift ? width - 1 - at : at);
  }
};
struct Permute {
  static uint32_t apply(uint32_t a, uint32_t b, uint32_t c) {
    const uint64_t bytes = uint64_t(b) << 32 | a;
    uint32_t r = 0;
    for (int i = 0; i < 4; ++i) {
      const uint32_t select = c >> (4 * i);
      uint32_t byte = static_cast<uint32_t>(bytes >> (8 * (select & 7))) & 0xff;
      if ((select & 8) != 0) byte = (byte & 0x80) != 0 ? 0xff : 0;
      r |= byte << (8 * i);
    }
    return r;
  }
};
// Modes of prmt that move by the low bits of c.
uint32_t permute_mode(uint32_t a, uint32_t b, uint32_t c, uint32_t mode) {
  static const uint16_t selectors[6][4] = {
      {0x3210, 0x4321, 0x5432, 0x6543}, {0x5670, 0x6701, 0x7012, 0x0123},
      {0x0000, 0x1111, 0x2222, 0x3333}, {0x3210, 0x3211, 0x3222, 0x3333},
      {0x0000, 0x1110, 0x2210, 0x3210}, {0x1010, 0x3232, 0x1010, 0x3232}};
  return Permute::apply(a, b, selectors[mode][c & 3]);
}
void permute_by_mode(Warp& w, const Instr& in, uint32_t mask) {
  for_lanes(mask, [&](int l) {
    w.at<uint32_t>(in.r[0])[l] =
        permute_mode(w.at<uint32_t>(in.r[1])[l], w.at<uint32_t>(in.r[2])[l],
                     w.at<uint32_t>(in.r[3])[l], in.mode);
  });
}
void lookup3(Warp& w, const Instr& in, uint32_t mask) {
  for_lanes(mask, [&](int l) {
    const uint32_t a = w.at<uint32_t>(in.r[1])[l], b = w.at<uint32_t>(in.r[2])[l],
                   c = w.at<uint32_t>(in.r[3])[l];
    uint32_t r = 0;
    for (int i = 0; i < 8; ++i) {
      if ((in.mode >> i & 1) == 0) continue;
      r |= ((i & 4) != 0 ? a : ~a) & ((i & 2) != 0 ? b : ~b) & ((i & 1) != 0 ? c : ~c);
    }
    w.at<uint32_t>(in.r[0])[l] = r;
  });
}

template <int kOp>  // 0 and, 1 or, 2 xor, 3 not
void predicate_logic(Warp& w, const Instr& in, uint32_t mask) {
  const uint32_t a = w.predicate(in.r[1]);
  const uint32_t b = kOp == 3 ? 0 : w.predicate(in.r[2]);
  set_predicate(w, in.r[0], mask, kOp == 0 ? a & b : kOp == 1 ? a | b : kOp == 2 ? a ^ b : ~a);
}

void operands(Decoder& d, Type t, int sources, Handler run) {
  d.expect(sources + 1);
  d.dst(0, t);
  for (int i = 1; i <= sources; ++i) d.src(i, t);
  d.out.run = run;
}

template <template <class> class Op, int kPredicateOp>
void decode_logic(Decoder& d) {
  const Type t = d.take_type({Type::kPred, Type::kB16, Type::kB32, Type::kB64});
  if (t == Type::kPred && kPredicateOp < 2)
    d.out.track = kPredicateOp == 0 ? Track::kAnd : Track::kOr;
  operands(d, t, 2,
           t == Type::kPred  ? &predicate_logic<kPredicateOp>
           : t == Type::kB16 ? binary_of<uint16_t, Op<uint16_t>>
           : t == Type::kB32 ? binary_of<uint32_t, Op<uint32_t>>
                             : binary_of<uint64_t, Op<uint64_t>>);
}

void decode_not(Decoder& d) {
  const Type t = d.take_type({Type::kPred, Type::kB16, Type::kB32, Type::kB64});
  operands(d, t, 1,
           t == Type::kPred  ? &predicate_logic<3>
           : t == Type::kB16 ? unary_of<uint16_t, Not<uint16_t>>
           : t == Type::kB32 ? unary_of<uint32_t, Not<uint32_t>>
                             : unary_of<uint64_t, Not<uint64_t>>);
}

void decode_cnot(Decoder& d) {
  const Type t = d.take_type({Type::kB16, Type::kB32, Type::kB64});
  operands(d, t, 1,
           t == Type::kB16   ? unary_of<uint16_t, LogicalNot<uint16_t>>
           : t == Type::kB32 ? unary_of<uint32_t, LogicalNot<uint32_t>>
                             : unary_of<uint64_t, LogicalNot<uint64_t>>);
}

template <class T, template <class> class Op>
constexpr Handler shift_of = &binary<T, T, uint32_t, Op<T>>;

void decode_shift(Decoder& d, bool left) {
  const Type t = left ? d.take_type({Type::kB16, Type::kB32, Type::kB64})
                      : d.take_type({Type::kB16, Type::kB32, Type::kB64, Type::kU16, Type::kU32,
                                     Type::kU64, Type::kS16, Type::kS32, Type::kS64});
  d.expect(3);
  d.dst(0, t);
  d.src(1, t);
  d.src(2, Type::kU32);
  const bool is_signed = t == Type::kS16 || t == Type::kS32 || t == Type::kS64;
  const int size = bytes_of(t);
  if (left) {
    d.out.run = size == 2   ? shift_of<uint16_t, ShiftLeft>
                : size == 4 ? shift_of<uint32_t, ShiftLeft>
                            : shift_of<uint64_t, ShiftLeft>;
  } else if (is_signed) {
    d.out.run = size == 2   ? shift_of<int16_t, ShiftRight>
                : size == 4 ? shift_of<int32_t, ShiftRight>
                            : shift_of<int64_t, ShiftRight>;
  } else {
    d.out.run = size == 2   ? shift_of<uint16_t, ShiftRight>
                : size == 4 ? shift_of<uint32_t, ShiftRight>
                            : shift_of<uint64_t, ShiftRight>;
  }
}

void decode_funnel(Decoder& d) {
  const bool left = d.take_one_of({"l", "r"}) == 0;
  const bool clamp = d.take_one_of({"clamp", "wrap"}) == 0;
  const Type t = d.take_type({Type::kB32});
  operands(d, t, 3,
           left ? (clamp ? ternary_of<uint32_t, FunnelLeft<true>>
                         : ternary_of<uint32_t, FunnelLeft<false>>)
                : (clamp ? ternary_of<uint32_t, FunnelRight<true>>
                         : ternary_of<uint32_t, FunnelRight<false>>));
}

template <class U, bool kSigned>
constexpr Handler bfe_of = &ternary<U, U, uint32_t, uint32_t, ExtractField<U, kSigned>>;

void decode_bfe(Decoder& d) {
  const Type t = d.take_type({Type::kU32, Type::kS32, Type::kU64, Type::kS64});
  d.expect(4);
  d.dst(0, t);
  d.src(1, t);
  d.src(2, Type::kU32);
  d.src(3, Type::kU32);
  d.out.run = t == Type::kU32   ? bfe_of<uint32_t, false>
              : t == Type::kS32 ? bfe_of<uint32_t, true>
              : t == Type::kU64 ? bfe_of<uint64_t, false>
                                : bfe_of<uint64_t, true>;
}

void decode_bfi(Decoder& d) {
  const Type t = d.take_type({Type::kB32, Type::kB64});
  d.expect(5);
  d.dst(0, t);
  d.src(1, t);
  d.src(2, t);
  d.src(3, Type::kU32);
  d.src(4, Type::kU32);
  d.out.run = t == Type::kB32 ? &bfi<uint32_t> : &bfi<uint64_t>;
  d.out.track = Track::kPart;
}

template <class U>
Handler find_top(bool is_signed, bool shift) {
  if (is_signed)
    return shift ? &unary<uint32_t, U, FindTop<U, true, true>>
                 : &unary<uint32_t, U, FindTop<U, true, false>>;
  return shift ? &unary<uint32_t, U, FindTop<U, false, true>>
               : &unary<uint32_t, U, FindTop<U, false, false>>;
}

void decode_bfind(Decoder& d) {
  const bool shift = d.take("shiftamt");
  const Type t = d.take_type({Type::kU32, Type::kS32, Type::kU64, Type::kS64});
  d.expect(2);
  d.dst(0, Type::kU32);
  d.src(1, t);
  const bool is_signed = t == Type::kS32 || t == Type::kS64;
  d.out.run = bytes_of(t) == 4 ? find_top<uint32_t>(is_signed, shift)
                               : find_top<uint64_t>(is_signed, shift);
}

void decode_to_count(Decoder& d, Handler narrow, Handler wide) {
  const Type t = d.take_type({Type::kB32, Type::kB64});
  d.expect(2);
  d.dst(0, Type::kU32);
  d.src(1, t);
  d.out.run = t == Type::kB32 ? narrow : wide;
}

void decode_prmt(Decoder& d) {
  const Type t = d.take_type({Type::kB32});
  const int mode = d.take_optional({"f4e", "b4e", "rc8", "ecl", "ecr", "rc16"});
  operands(d, t, 3, mode < 0 ? ternary_of<uint32_t, Permute> : &permute_by_mode);
  if (mode >= 0) d.out.mode = static_cast<uint32_t>(mode);
  d.out.track = Track::kPart;
}

void decode_lop3(Decoder& d) {
  const Type t = d.take_type({Type::kB32});
  d.expect(5);
  d.dst(0, t);
  for (int i = 1; i <= 3; ++i) d.src(i, t);
  d.out.mode = d.integer(4);
  if (d.out.mode > 255) d.fail("the table must be below 256");
  d.out.run = &lookup3;
}

}  // namespace

void add_bit_opcodes(OpcodeTable* table) {
  (*table)["and"] = decode_logic<And, 0>;
  (*table)["or"] = decode_logic<Or, 1>;
  (*table)["xor"] = decode_logic<Xor, 2>;
  (*table)["not"] = decode_not;
  (*table)["cnot"] = decode_cnot;
  (*table)["shl"] = [](Decoder& d) { decode_shift(d, true); };
  (*table)["shr"] = [](Decoder& d) { decode_shift(d, false); };
  (*table)["shf"] = decode_funnel;
  (*table)["bfe"] = decode_bfe;
  (*table)["bfi"] = decode_bfi;
  (*table)["bfind"] = decode_bfind;
  (*table)["prmt"] = decode_prmt;
  (*table)["lop3"] = decode_lop3;
  (*table)["popc"] = [](Decoder& d) {
    decode_to_count(d, &unary<uint32_t, uint32_t, PopCount<uint32_t>>,
                    &unary<uint32_t, uint64_t, PopCount<uint64_t>>);
  };
  (*table)["clz"] = [](Decoder& d) {
    decode_to_count(d, &unary<uint32_t, uint32_t, CountLeading<uint32_t>>,
                    &unary<uint32_t, uint64_t, CountLeading<uint64_t>>);
  };
  (*table)["brev"] = [](Decoder& d) {
    const Type t = d.take_type({Type::kB32, Type::kB64});
    operands(d, t, 1,
             t == Type::kB32 ? unary_of<uint32_t, Reverse<uint32_t>>
                             : unary_of<uint64_t, Reverse<uint64_t>>);
  };
}

}  // namespace emulator
}  // namespace llmkern
