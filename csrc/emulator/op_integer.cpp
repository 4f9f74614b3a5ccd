// Integer arithmetic: add sub mul mad div rem min max abs neg sad, the .cc forms, dp4a, 24-bit.
#include <limits>
#include <type_traits>

#include "decode.h"
#include "lanes.h"

namespace llmkern {
namespace emulator {
namespace {

template <class T>
using Unsigned = typename std::make_unsigned<T>::type;
template <class T>
struct WiderOf;
template <>
struct WiderOf<int16_t> {
  using type = int32_t;
};
template <>
struct WiderOf<uint16_t> {
  using type = uint32_t;
};
template <>
struct WiderOf<int32_t> {
  using type = int64_t;
};
template <>
struct WiderOf<uint32_t> {
  using type = uint64_t;
};
template <>
struct WiderOf<int64_t> {
  using type = __int128;
};
template <>
struct WiderOf<uint64_t> {
  using type = unsigned __int128;
};
template <class T>
using Wider = typename WiderOf<T>::type;

template <class T>
struct Add {
  static T apply(T a, T b) { return static_cast<T>(Unsigned<T>(a) + Unsigned<T>(b)); }
};
template <class T>
struct Sub {
  static T apply(T a, T b) { return static_cast<T>(Unsigned<T>(a) - Unsigned<T>(b)); }
};
template <class T>
struct MulLow {
  static T apply(T a, T b) { return static_cast<T>(uint64_t(Unsigned<T>(a)) * Unsigned<T>(b)); }
};
template <>
struct MulLow<int32_t> {
  static int32_t apply(int32_t a, int32_t b) { return int32_t(uint32_t(a) * uint32_t(b)); }
};
template <>
struct MulLow<uint32_t> {
  static uint32_t apply(uint32_t a, uint32_t b) { return a * b; }
};
template <class T>
struct MulHigh {
  static T apply(T a, T b) { return static_cast<T>((Wider<T>(a) * b) >> (8 * sizeof(T))); }
};
template <class T>
struct MulWide {
  static Wider<T> apply(T a, T b) { return Wider<T>(a) * Wider<T>(b); }
};
template <class T>
struct MadLow {
  static T apply(T a, T b, T c) { return Add<T>::apply(MulLow<T>::apply(a, b), c); }
};
template <class T>
struct MadHigh {
  static T apply(T a, T b, T c) { return Add<T>::apply(MulHigh<T>::apply(a, b), c); }
};
template <class T>
struct MadWide {
  static Wider<T> apply(T a, T b, Wider<T> c) {
    return Add<Wider<T>>::apply(MulWide<T>::apply(a, b), c);
  }
};
// Division by zero gives all ones on the hardware; the smallest value by -1 wraps.
template <class T>
struct Div {
  static T apply(T a, T b) {
    if (b == 0) return static_cast<T>(~T{0});
    if (std::is_signed<T>::value && b == static_cast<T>(-1)) return Sub<T>::apply(0, a);
    return static_cast<T>(a / b);
  }
};
template <class T>
struct Rem {
  static T apply(T a, T b) {
    if (b == 0) return a;
    if (std::is_signed<T>::value && b == static_cast<T>(-1)) return 0;
    return static_cast<T>(a % b);
  }
};
template <class T>
struct Min {
  static T apply(T a, T b) { return a < b ? a : b; }
};
template <class T>
struct Max {
  static T apply(T a, T b) { return a > b ? a : b; }
};
template <class T>
struct Abs {
  static T apply(T a) { return a < 0 ? Sub<T>::apply(0, a) : a; }
};
template <class T>
struct Neg {
  static T apply(T a) { return Sub<T>::apply(0, a); }
};
template <class T>
struct Sad {
  static T apply(T a, T b, T c) {
    return Add<T>::apply(c, a < b ? Sub<T>::apply(b, a) : Sub<T>::apply(a, b));
  }
};
struct AddSaturating {
  static int32_t apply(int32_t a, int32_t b) {
    const int64_t sum = int64_t{a} + b;
    return static_cast<int32_t>(std::min<int64_t>(std::max<int64_t>(sum, INT32_MIN), INT32_MAX));
  }
};
struct SubSaturating {
  static int32_t apply(int32_t a, int32_t b) {
    const int64_t difference = int64_t{a} - b;
    return static_cast<int32_t>(
        std::min<int64_t>(std::max<int64_t>(difference, INT32_MIN), INT32_MAX));
  }
};
struct Mul24Signed {
  static int32_t apply(int32_t a, int32_t b) {
    return MulLow<int32_t>::apply(int32_t(uint32_t(a) << 8) >> 8, int32_t(uint32_t(b) << 8) >> 8);
  }
};
struct Mul24Unsigned {
  static uint32_t apply(uint32_t a, uint32_t b) { return (a & 0xffffff) * (b & 0xffffff); }
};
template <class A, class B>
struct Dot4 {
  static int32_t apply(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t sum = c;
    for (int i = 0; i < 4; ++i)
      sum += uint32_t(int32_t(A(a >> (8 * i))) * int32_t(B(b >> (8 * i))));
    return static_cast<int32_t>(sum);
  }
};

Type integer_type(Decoder& d) {
  return d.take_type({Type::kU16, Type::kS16, Type::kU32, Type::kS32, Type::kU64, Type::kS64});
}

// The handler of Op for an integer type.
template <template <class> class Op>
Handler pick_binary(Type t) {
  switch (t) {
    case Type::kU16:
      return binary_of<uint16_t, Op<uint16_t>>;
    case Type::kS16:
      return binary_of<int16_t, Op<int16_t>>;
    case Type::kU32:
      return binary_of<uint32_t, Op<uint32_t>>;
    case Type::kS32:
      return binary_of<int32_t, Op<int32_t>>;
    case Type::kU64:
      return binary_of<uint64_t, Op<uint64_t>>;
    default:
      return binary_of<int64_t, Op<int64_t>>;
  }
}
template <template <class> class Op>
Handler pick_ternary(Type t) {
  switch (t) {
    case Type::kU16:
      return ternary_of<uint16_t, Op<uint16_t>>;
    case Type::kS16:
      return ternary_of<int16_t, Op<int16_t>>;
    case Type::kU32:
      return ternary_of<uint32_t, Op<uint32_t>>;
    case Type::kS32:
      return ternary_of<int32_t, Op<int32_t>>;
    case Type::kU64:
      return ternary_of<uint64_t, Op<uint64_t>>;
    default:
      return ternary_of<int64_t, Op<int64_t>>;
  }
}
template <template <class> class Op>
Handler pick_unary(Type t) {
  if (t == Type::kS16) return unary_of<int16_t, Op<int16_t>>;
  return t == Type::kS32 ? unary_of<int32_t, Op<int32_t>> : unary_of<int64_t, Op<int64_t>>;
}
template <class T>
Handler wide_mul() {
  return &binary<Wider<T>, T, T, MulWide<T>>;
}
template <class T>
Handler wide_mad() {
  return &ternary<Wider<T>, T, T, Wider<T>, MadWide<T>>;
}

Type wider_type(Decoder& d, Type t) {
  switch (t) {
    case Type::kU16:
      return Type::kU32;
    case Type::kS16:
      return Type::kS32;
    case Type::kU32:
      return Type::kU64;
    case Type::kS32:
      return Type::kS64;
    default:
      d.fail(".wide needs a 16- or 32-bit type");
  }
}

void finish(Decoder& d, Type result, Type operand, int sources, Handler run) {
  d.expect(sources + 1);
  d.dst(0, result);
  for (int i = 1; i <= sources; ++i) d.src(i, operand);
  d.out.type = operand;
  d.out.run = run;
}

// Extended precision: the carry of a lane lives in Warp::carry.
template <class T, int kSources, bool kSubtract, bool kHigh, bool kMultiply>
void with_carry(Warp& w, const Instr& in, uint32_t mask) {
  const bool use = (in.mode & 1) != 0, set = (in.mode & 2) != 0;
  for_lanes(mask, [&](int l) {
    T a = w.at<T>(in.r[1])[l], b = w.at<T>(in.r[2])[l];
    if (kMultiply) {
      a = kHigh ? MulHigh<T>::apply(a, b) : MulLow<T>::apply(a, b);
      b = w.at<T>(in.r[3])[l];
    }
    using U = Unsigned<T>;
    const unsigned carry_in = use ? w.carry >> l & 1 : 0;
    const auto ua = static_cast<unsigned __int128>(U(a));
    const auto ub = static_cast<unsigned __int128>(U(b));
    const unsigned __int128 sum = kSubtract ? ua - ub - carry_in : ua + ub + carry_in;
    w.at<T>(in.r[0])[l] = static_cast<T>(sum);
    if (set) {
      const uint32_t out = static_cast<uint32_t>(sum >> (8 * sizeof(T))) & 1;
      w.carry = (w.carry & ~(1u << l)) | (out << l);
    }
  });
}

template <bool kSubtract>
void decode_carry(Decoder& d, bool use, bool set) {
  const Type t = d.take_type({Type::kU32, Type::kS32, Type::kU64, Type::kS64});
  const Handler run = bytes_of(t) == 4 ? &with_carry<uint32_t, 2, kSubtract, false, false>
                                       : &with_carry<uint64_t, 2, kSubtract, false, false>;
  finish(d, t, t, 2, run);
  d.out.mode = (use ? 1 : 0) | (set ? 2 : 0);
}

template <class S, class U>
Handler mad_carry(bool high, bool is_signed) {
  if (!high) return &with_carry<U, 3, false, false, true>;
  return is_signed ? &with_carry<S, 3, false, true, true> : &with_carry<U, 3, false, true, true>;
}

void decode_mad_carry(Decoder& d, bool high, bool use, bool set) {
  const Type t = d.take_type({Type::kU32, Type::kS32, Type::kU64, Type::kS64});
  const bool is_signed = t == Type::kS32 || t == Type::kS64;
  const Handler run = bytes_of(t) == 4 ? mad_carry<int32_t, uint32_t>(high, is_signed)
                                       : mad_carry<int64_t, uint64_t>(high, is_signed);
  finish(d, t, t, 3, run);
  d.out.mode = (use ? 1 : 0) | (set ? 2 : 0);
}

void decode_dp4a(Decoder& d) {
  const bool a = d.take_type({Type::kU32, Type::kS32}) == Type::kS32;
  const bool b = d.take_type({Type::kU32, Type::kS32}) == Type::kS32;
  using I = int8_t;
  using U = uint8_t;
  const Handler run = a ? (b ? &ternary<int32_t, uint32_t, uint32_t, uint32_t, Dot4<I, I>>
                             : &ternary<int32_t, uint32_t, uint32_t, uint32_t, Dot4<I, U>>)
                        : (b ? &ternary<int32_t, uint32_t, uint32_t, uint32_t, Dot4<U, I>>
                             : &ternary<int32_t, uint32_t, uint32_t, uint32_t, Dot4<U, U>>);
  finish(d, Type::kS32, Type::kS32, 3, run);
}

}  // namespace

void decode_integer_add(Decoder& d) {
  if (d.take("cc")) return decode_carry<false>(d, false, true);
  if (d.take("sat"))
    return finish(d, d.take_type({Type::kS32}), Type::kS32, 2, binary_of<int32_t, AddSaturating>);
  const Type t = integer_type(d);
  finish(d, t, t, 2, pick_binary<Add>(t));
}

void decode_integer_sub(Decoder& d) {
  if (d.take("cc")) return decode_carry<true>(d, false, true);
  if (d.take("sat"))
    return finish(d, d.take_type({Type::kS32}), Type::kS32, 2, binary_of<int32_t, SubSaturating>);
  const Type t = integer_type(d);
  finish(d, t, t, 2, pick_binary<Sub>(t));
}

void decode_integer_mul(Decoder& d) {
  const int part = d.take_one_of({"lo", "hi", "wide"});
  const Type t = integer_type(d);
  if (part == 0) return finish(d, t, t, 2, pick_binary<MulLow>(t));
  if (part == 1) return finish(d, t, t, 2, pick_binary<MulHigh>(t));
  const Handler wide[] = {wide_mul<uint16_t>(), wide_mul<int16_t>(), wide_mul<uint32_t>(),
                          wide_mul<int32_t>()};
  const int i = t == Type::kU16 ? 0 : t == Type::kS16 ? 1 : t == Type::kU32 ? 2 : 3;
  finish(d, wider_type(d, t), t, 2, wide[i]);
}

void decode_integer_mad(Decoder& d) {
  const int part = d.take_one_of({"lo", "hi", "wide"});
  if (d.take("cc")) return decode_mad_carry(d, part == 1, false, true);
  const Type t = integer_type(d);
  if (part == 0) return finish(d, t, t, 3, pick_ternary<MadLow>(t));
  if (part == 1) return finish(d, t, t, 3, pick_ternary<MadHigh>(t));
  const Handler wide[] = {wide_mad<uint16_t>(), wide_mad<int16_t>(), wide_mad<uint32_t>(),
                          wide_mad<int32_t>()};
  const int i = t == Type::kU16 ? 0 : t == Type::kS16 ? 1 : t == Type::kU32 ? 2 : 3;
  const Type wider = wider_type(d, t);
  d.expect(4);
  d.dst(0, wider);
  d.src(1, t);
  d.src(2, t);
  d.src(3, wider);
  d.out.run = wide[i];
}

void decode_integer_div(Decoder& d) {
  const Type t = integer_type(d);
  finish(d, t, t, 2, pick_binary<Div>(t));
}

void decode_integer_min_max(Decoder& d, bool max) {
  const Type t = integer_type(d);
  finish(d, t, t, 2, max ? pick_binary<Max>(t) : pick_binary<Min>(t));
}

void decode_integer_abs_neg(Decoder& d, bool negate) {
  const Type t = d.take_type({Type::kS16, Type::kS32, Type::kS64});
  finish(d, t, t, 1, negate ? pick_unary<Neg>(t) : pick_unary<Abs>(t));
}

void add_integer_opcodes(OpcodeTable* table) {
  (*table)["rem"] = [](Decoder& d) {
    const Type t = integer_type(d);
    finish(d, t, t, 2, pick_binary<Rem>(t));
  };
  (*table)["sad"] = [](Decoder& d) {
    const Type t = integer_type(d);
    finish(d, t, t, 3, pick_ternary<Sad>(t));
  };
  (*table)["addc"] = [](Decoder& d) { decode_carry<false>(d, true, d.take("cc")); };
  (*table)["subc"] = [](Decoder& d) { decode_carry<true>(d, true, d.take("cc")); };
  (*table)["madc"] = [](Decoder& d) {
    const bool high = d.take_one_of({"lo", "hi"}) == 1;
    decode_mad_carry(d, high, true, d.take("cc"));
  };
  (*table)["mul24"] = [](Decoder& d) {
    d.take_one_of({"lo"});
    const Type t = d.take_type({Type::kU32, Type::kS32});
    finish(d, t, t, 2,
           t == Type::kS32 ? binary_of<int32_t, Mul24Signed> : binary_of<uint32_t, Mul24Unsigned>);
  };
  (*table)["dp4a"] = decode_dp4a;
}

}  // namespace emulator
}  // namespace llmkern
