// cvt, generically: the source is read as an exact integer or double, rounded once, stored. The
// pairs that kernels are full of have handlers of their own.
#include <algorithm>
#include <cmath>

#include "families.h"
#include "formats.h"
#include "lanes.h"

namespace llmkern {
namespace emulator {
namespace {

enum class Family { kInteger, kFloat, kNone };

Family family(Type t) {
  if (t >= Type::kU8 && t <= Type::kS64) return Family::kInteger;
  const bool is_float =
      t == Type::kF16 || t == Type::kBf16 || t == Type::kTf32 || t == Type::kF32 || t == Type::kF64;
  return is_float ? Family::kFloat : Family::kNone;
}

bool is_signed(Type t) { return t >= Type::kS8 && t <= Type::kS64; }

Format format_of(Type t) {
  switch (t) {
    case Type::kF16:
    case Type::kF16x2:
      return kHalf;
    case Type::kBf16:
    case Type::kBf16x2:
      return kBf16;
    case Type::kTf32:
      return kTf32;
    case Type::kE4m3x2:
      return kE4m3;
    case Type::kE5m2x2:
      return kE5m2;
    default:
      return kFloat;
  }
}

// Instr::mode: source type | round << 8 | flags.
enum : uint32_t {
  kToInteger = 1u << 12,
  kFtz = 1u << 13,
  kSat = 1u << 14,
  kRelu = 1u << 15,
  kSatFinite = 1u << 16
};

__int128 read_integer(Warp& w, uint32_t at, Type t, int register_bytes, int lane) {
  uint64_t raw = register_bytes == 2   ? w.at<uint16_t>(at)[lane]
                 : register_bytes == 4 ? w.at<uint32_t>(at)[lane]
                                       : w.at<uint64_t>(at)[lane];
  const int unused = 64 - 8 * bytes_of(t);
  raw <<= unused;
  return is_signed(t) ? __int128{static_cast<int64_t>(raw) >> unused} : __int128{raw >> unused};
}

double read_float(Warp& w, uint32_t at, Type t, bool ftz, int lane) {
  switch (t) {
    case Type::kF16:
      return half_to_float(w.at<uint16_t>(at)[lane]);
    case Type::kBf16:
      return bf16_to_float(w.at<uint16_t>(at)[lane]);
    case Type::kF64:
      return w.at<double>(at)[lane];
    default:
      return ftz ? flush(w.at<float>(at)[lane]) : w.at<float>(at)[lane];
  }
}

void write_integer(Warp& w, const Instr& in, __int128 v, int lane) {
  const int unused = 64 - 8 * bytes_of(in.type);
  uint64_t bits = static_cast<uint64_t>(v) << unused;
  bits = is_signed(in.type) ? static_cast<uint64_t>(static_cast<int64_t>(bits) >> unused)
                            : bits >> unused;
  if (in.width == 2) w.at<uint16_t>(in.r[0])[lane] = static_cast<uint16_t>(bits);
  if (in.width == 4) w.at<uint32_t>(in.r[0])[lane] = static_cast<uint32_t>(bits);
  if (in.width == 8) w.at<uint64_t>(in.r[0])[lane] = bits;
}

void write_float(Warp& w, const Instr& in, double v, int lane) {
  const Round round = static_cast<Round>(in.mode >> 8 & 7);
  if ((in.mode & kSat) != 0) v = v > 0 ? std::min(v, 1.0) : 0.0;
  if ((in.mode & kRelu) != 0 && !(v > 0) && v == v) v = 0.0;
  if (in.type == Type::kF64) {
    w.at<double>(in.r[0])[lane] = v;
  } else if (in.type == Type::kF32) {
    float r = round == Round::kNearest || v != v ? static_cast<float>(v)
                                                 : bits_as<float>(encode(v, kFloat, round, false));
    if ((in.mode & kFtz) != 0) r = flush(r);
    w.at<float>(in.r[0])[lane] = r;
  } else if (in.type == Type::kTf32) {
    w.at<uint32_t>(in.r[0])[lane] = encode(v, kTf32, round, (in.mode & kSatFinite) != 0) << 13;
  } else {
    w.at<uint16_t>(in.r[0])[lane] =
        static_cast<uint16_t>(encode(v, format_of(in.type), round, (in.mode & kSatFinite) != 0));
  }
}

double round_to_integer(double v, Round round) {
  switch (round) {
    case Round::kZero:
      return std::trunc(v);
    case Round::kDown:
      return std::floor(v);
    case Round::kUp:
      return std::ceil(v);
    default:
      return std::nearbyint(v);
  }
}

__int128 smallest(Type t) {
  return is_signed(t) ? -(__int128{1} << (8 * bytes_of(t) - 1)) : __int128{0};
}
__int128 largest(Type t) { return (__int128{1} << (8 * bytes_of(t) - (is_signed(t) ? 1 : 0))) - 1; }

// An integer as a double that rounds on as the integer would.
double exact(__int128 v) {
  const auto high = static_cast<double>(static_cast<int64_t>(v >> 32)) * 4294967296.0;
  return add_to_odd(high, static_cast<double>(static_cast<uint32_t>(v)));
}

void convert(Warp& w, const Instr& in, uint32_t mask) {
  const Type from = static_cast<Type>(in.mode & 0xff);
  const Round round = static_cast<Round>(in.mode >> 8 & 7);
  const bool to_integer = family(in.type) == Family::kInteger;
  for_lanes(mask, [&](int l) {
    if (family(from) == Family::kInteger) {
      __int128 v = read_integer(w, in.r[1], from, in.bytes, l);
      if (!to_integer && in.type == Type::kF64 && round == Round::kNearest) {
        return write_float(w, in, is_signed(from) ? double(int64_t(v)) : double(uint64_t(v)), l);
      }
      if (!to_integer) return write_float(w, in, exact(v), l);
      if ((in.mode & kSat) != 0) v = std::min(std::max(v, smallest(in.type)), largest(in.type));
      return write_integer(w, in, v, l);
    }
    double v = read_float(w, in.r[1], from, (in.mode & kFtz) != 0, l);
    if (!to_integer) {
      if ((in.mode & kToInteger) != 0) v = round_to_integer(v, round);
      return write_float(w, in, v, l);
    }
    v = round_to_integer(v, round);
    __int128 r = 0;
    if (v == v) {
      const auto low = static_cast<double>(smallest(in.type)),
                 high = static_cast<double>(largest(in.type));
      r = v <= low ? smallest(in.type) : v >= high ? largest(in.type) : static_cast<__int128>(v);
    }
    write_integer(w, in, r, l);
  });
}

// d = {a high, b low}, each f32.
void pack(Warp& w, const Instr& in, uint32_t mask) {
  const Round round = static_cast<Round>(in.mode >> 8 & 7);
  const Format f = format_of(in.type);
  const bool fp8 = in.type == Type::kE4m3x2 || in.type == Type::kE5m2x2;
  const auto one = [&](float v) {
    if ((in.mode & kRelu) != 0 && !(v > 0) && v == v) v = 0;
    return encode(v, f, round, (in.mode & kSatFinite) != 0);
  };
  for_lanes(mask, [&](int l) {
    const uint32_t high = one(w.at<float>(in.r[1])[l]), low = one(w.at<float>(in.r[2])[l]);
    if (fp8) {
      w.at<uint16_t>(in.r[0])[l] = static_cast<uint16_t>(high << 8 | low);
    } else {
      w.at<uint32_t>(in.r[0])[l] = high << 16 | low;
    }
  });
}

template <bool kBf16>
struct PackNearest {
  static uint32_t apply(float a, float b) {
    const uint32_t high = kBf16 ? float_to_bf16(a) : float_to_half(a);
    return high << 16 | (kBf16 ? float_to_bf16(b) : float_to_half(b));
  }
};

// Pairs of 8-bit floats, to and from pairs of f16.
void unpack_fp8(Warp& w, const Instr& in, uint32_t mask) {
  const Format f = format_of(static_cast<Type>(in.mode & 0xff));
  for_lanes(mask, [&](int l) {
    const uint16_t v = w.at<uint16_t>(in.r[1])[l];
    uint32_t r = 0;
    for (int i = 0; i < 2; ++i) {
      double x = decode(v >> (8 * i) & 0xffu, f);
      if ((in.mode & kRelu) != 0 && !(x > 0) && x == x) x = 0;
      r |= encode(x, kHalf, Round::kNearest, false) << (16 * i);
    }
    w.at<uint32_t>(in.r[0])[l] = r;
  });
}
void pack_fp8_from_half(Warp& w, const Instr& in, uint32_t mask) {
  for_lanes(mask, [&](int l) {
    const uint32_t v = w.at<uint32_t>(in.r[1])[l];
    uint32_t r = 0;
    for (int i = 0; i < 2; ++i) {
      float x = half_to_float(static_cast<uint16_t>(v >> (16 * i)));
      if ((in.mode & kRelu) != 0 && !(x > 0) && x == x) x = 0;
      r |= encode(x, format_of(in.type), Round::kNearest, true) << (8 * i);
    }
    w.at<uint16_t>(in.r[0])[l] = static_cast<uint16_t>(r);
  });
}

template <class D, class A>
struct Cast {
  static D apply(A a) { return static_cast<D>(a); }
};
struct FromBf16 {
  static float apply(uint16_t v) { return bf16_to_float(v); }
};
struct FromHalf {
  static float apply(uint16_t v) { return half_to_float(v); }
};
struct ToBf16 {
  static uint16_t apply(float v) { return float_to_bf16(v); }
};
struct ToHalf {
  static uint16_t apply(float v) { return float_to_half(v); }
};
struct ToTf32Away {
  static uint32_t apply(float v) {
    const uint32_t b = bits_as<uint32_t>(v);
    const bool nan = (b & 0x7fffffffu) > 0x7f800000u, inf = (b & 0x7fffffffu) == 0x7f800000u;
    return nan ? 0x7fffffffu : inf ? b : (b + 0x1000u) & 0xffffe000u;
  }
};

// A handler for the plain forms of common pairs, or null.
Handler common(Type to, Type from, uint32_t mode, bool exact_registers) {
  if ((mode & ~0x7ffu) != 0 || !exact_registers) return nullptr;
  const Round round = static_cast<Round>(mode >> 8 & 7);
  const auto is = [&](Type a, Type b) { return to == a && from == b; };
  if (is(Type::kS64, Type::kS32)) return &unary<int64_t, int32_t, Cast<int64_t, int32_t>>;
  if (is(Type::kU64, Type::kU32)) return &unary<uint64_t, uint32_t, Cast<uint64_t, uint32_t>>;
  if (is(Type::kU32, Type::kU64)) return &unary<uint32_t, uint64_t, Cast<uint32_t, uint64_t>>;
  if (is(Type::kU32, Type::kU16)) return &unary<uint32_t, uint16_t, Cast<uint32_t, uint16_t>>;
  if (is(Type::kS32, Type::kS16)) return &unary<int32_t, int16_t, Cast<int32_t, int16_t>>;
  if (is(Type::kU16, Type::kU32)) return &unary<uint16_t, uint32_t, Cast<uint16_t, uint32_t>>;
  if (is(Type::kF32, Type::kBf16)) return &unary<float, uint16_t, FromBf16>;
  if (is(Type::kF32, Type::kF16)) return &unary<float, uint16_t, FromHalf>;
  if (is(Type::kTf32, Type::kF32) && round == Round::kNearestAway)
    return &unary<uint32_t, float, ToTf32Away>;
  if (round != Round::kNearest) return nullptr;
  if (is(Type::kBf16, Type::kF32)) return &unary<uint16_t, float, ToBf16>;
  if (is(Type::kF16, Type::kF32)) return &unary<uint16_t, float, ToHalf>;
  if (is(Type::kF32, Type::kS32)) return &unary<float, int32_t, Cast<float, int32_t>>;
  if (is(Type::kF32, Type::kU32)) return &unary<float, uint32_t, Cast<float, uint32_t>>;
  return nullptr;
}

// Rounding and flags, in the order of the manual; `rounded` tells whether a rounding was given.
bool take_rounding(Decoder& d) {
  uint32_t mode = 0;
  bool rounded = true;
  if (d.take("rna")) {
    mode = static_cast<uint32_t>(Round::kNearestAway) << 8;
  } else {
    const int integer = d.take_optional({"rni", "rzi", "rmi", "rpi"});
    const int fraction = integer >= 0 ? -1 : d.take_optional({"rn", "rz", "rm", "rp"});
    rounded = integer >= 0 || fraction >= 0;
    if (rounded) mode = static_cast<uint32_t>(std::max(integer, fraction)) << 8;
    if (integer >= 0) mode |= kToInteger;
  }
  // satfinite and relu come in either order.
  for (bool again = true; again;) {
    again = false;
    const std::pair<const char*, uint32_t> flags[] = {
        {"ftz", kFtz}, {"sat", kSat}, {"satfinite", kSatFinite}, {"relu", kRelu}};
    for (const auto& flag : flags) {
      if ((mode & flag.second) == 0 && d.take(flag.first)) {
        mode |= flag.second;
        again = true;
      }
    }
  }
  d.out.mode = mode;
  return rounded;
}

void decode_pack(Decoder& d, Type to) {
  const uint32_t round = d.out.mode >> 8 & 7;
  const bool fp8 = to == Type::kE4m3x2 || to == Type::kE5m2x2;
  if (round > 1 || (d.out.mode & (kToInteger | kFtz | kSat)) != 0)
    d.fail("rounding or modifier is not known for pairs");
  if (fp8 && (d.out.mode & kSatFinite) == 0) d.fail("8-bit floats need .satfinite");
  const Type from = d.take_type({Type::kF32, Type::kF16x2, Type::kE4m3x2, Type::kE5m2x2});
  d.out.type = to;
  d.out.mode |= static_cast<uint32_t>(from);
  if (from == Type::kF32) {
    d.expect(3);
    d.dst(0, to);
    d.src(1, from);
    d.src(2, from);
    const bool plain = round == 0 && (d.out.mode & ~0x7ffu) == 0 && !fp8;
    d.out.run = !plain                ? &pack
                : to == Type::kBf16x2 ? &binary<uint32_t, float, float, PackNearest<true>>
                                      : &binary<uint32_t, float, float, PackNearest<false>>;
    return;
  }
  const bool widen = to == Type::kF16x2 && from != Type::kF16x2;
  if (!widen && !(fp8 && from == Type::kF16x2)) d.fail("this pair of types is not known");
  d.expect(2);
  d.dst(0, to);
  d.src(1, from);
  d.out.run = widen ? &unpack_fp8 : &pack_fp8_from_half;
}

// A rounding must be there exactly where bits can be lost.
void check_rounding(Decoder& d, Type to, Type from, bool rounded) {
  const bool integer_rounding = (d.out.mode & kToInteger) != 0;
  const bool to_int = family(to) == Family::kInteger, from_int = family(from) == Family::kInteger;
  if (from_int && to_int && rounded) d.fail("no rounding between integers");
  if (to_int && !from_int && !integer_rounding)
    d.fail("float to integer needs .rni .rzi .rmi or .rpi");
  if (from_int && !to_int && (!rounded || integer_rounding))
    d.fail("integer to float needs .rn .rz .rm or .rp");
  if (from_int || to_int) return;
  const bool narrows = bytes_of(to) < bytes_of(from) || to == Type::kTf32 ||
                       (to == Type::kBf16 && from == Type::kF16) ||
                       (to == Type::kF16 && from == Type::kBf16);
  if (narrows && !rounded) d.fail("a narrowing conversion needs a rounding modifier");
  if (integer_rounding && to != from) d.fail("integer rounding is for the same float type");
  const bool away = (d.out.mode >> 8 & 7) == static_cast<uint32_t>(Round::kNearestAway);
  if (away && to != Type::kTf32) d.fail(".rna is for .tf32");
}

void decode_cvt(Decoder& d) {
  d.out.klass = Class::kConvert;
  const bool rounded = take_rounding(d);
  const Type to = d.take_type();
  if (to == Type::kF16x2 || to == Type::kBf16x2 || to == Type::kE4m3x2 || to == Type::kE5m2x2) {
    if (!rounded) d.fail("a rounding modifier is missing");
    return decode_pack(d, to);
  }
  const Type from = d.take_type();
  if (family(to) == Family::kNone || family(from) == Family::kNone || from == Type::kTf32)
    d.fail("this pair of types is not known");
  if (to == Type::kTf32 && from != Type::kF32) d.fail(".tf32 is made of .f32");
  if ((d.out.mode & kFtz) != 0 && to != Type::kF32 && from != Type::kF32)
    d.fail(".ftz is for .f32");
  if ((d.out.mode & (kRelu | kSatFinite)) != 0 && to != Type::kF16 && to != Type::kBf16 &&
      to != Type::kTf32)
    d.fail(".relu and .satfinite are not for this type");
  check_rounding(d, to, from, rounded);
  d.expect(2);
  d.out.type = to;
  d.out.mode |= static_cast<uint32_t>(from);
  if (family(to) == Family::kInteger) {
    d.wide_dst(d.operand(0), to);
  } else {
    d.dst(0, to);
  }
  if (family(from) == Family::kInteger) {
    d.wide_src(d.operand(1), from);
  } else {
    d.src(1, from);
  }
  const int to_bytes = std::max(2, bytes_of(to)), from_bytes = std::max(2, bytes_of(from));
  const int have_to = d.size_of_register(d.operand(0)),
            have_from = d.size_of_register(d.operand(1));
  d.out.width = static_cast<uint8_t>(have_to == 0 ? to_bytes : have_to);
  d.out.bytes = static_cast<uint8_t>(have_from == 0 ? from_bytes : have_from);
  const bool exact_registers = d.out.width == bytes_of(to) && d.out.bytes == bytes_of(from);
  const Handler fast = common(to, from, d.out.mode, exact_registers);
  d.out.run = fast != nullptr ? fast : &convert;
}

}  // namespace

void add_convert_opcodes(OpcodeTable* table) { (*table)["cvt"] = decode_cvt; }

}  // namespace emulator
}  // namespace llmkern
