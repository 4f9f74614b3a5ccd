// setp set selp slct.
#include <cmath>

#include "decode.h"
#include "formats.h"
#include "lanes.h"

namespace llmkern {
namespace emulator {
namespace {

enum Comparison { kEq, kNe, kLt, kLe, kGt, kGe, kNum, kNan };
enum BoolOp { kNoBool, kAnd, kOr, kXor };

// kUnordered: true where an operand is NaN.
template <class T, int kCmp, bool kUnordered>
inline bool holds(T a, T b) {
  if (kCmp == kNum) return a == a && b == b;
  if (kCmp == kNan) return a != a || b != b;
  if (kUnordered) {
    switch (kCmp) {
      case kEq:
        return !(a < b) && !(a > b);
      case kNe:
        return a != b;
      case kLt:
        return !(a >= b);
      case kLe:
        return !(a > b);
      case kGt:
        return !(a <= b);
      default:
        return !(a < b);
    }
  }
  switch (kCmp) {
    case kEq:
      return a == b;
    case kNe:
      return a < b || a > b;
    case kLt:
      return a < b;
    case kLe:
      return a <= b;
    case kGt:
      return a > b;
    default:
      return a >= b;
  }
}

using CompareFunction = uint32_t (*)(Warp&, uint32_t a, uint32_t b, bool ftz);

template <class T, int kCmp, bool kUnordered>
uint32_t compare(Warp& w, uint32_t a_at, uint32_t b_at, bool) {
  const T *a = w.at<T>(a_at), *b = w.at<T>(b_at);
  return lane_mask([&](int l) { return holds<T, kCmp, kUnordered>(a[l], b[l]); });
}

template <int kCmp, bool kUnordered>
uint32_t compare_flushed(Warp& w, uint32_t a_at, uint32_t b_at, bool) {
  const float *a = w.at<float>(a_at), *b = w.at<float>(b_at);
  return lane_mask([&](int l) { return holds<float, kCmp, kUnordered>(flush(a[l]), flush(b[l])); });
}

// kPart of kParts halves in each register.
template <bool kBf16, int kParts, int kPart, int kCmp, bool kUnordered>
uint32_t compare_half(Warp& w, uint32_t a_at, uint32_t b_at, bool) {
  const uint16_t *a = w.at<uint16_t>(a_at) + kPart, *b = w.at<uint16_t>(b_at) + kPart;
  const auto widen = [](uint16_t v) { return kBf16 ? bf16_to_float(v) : half_to_float(v); };
  return lane_mask([&](int l) {
    return holds<float, kCmp, kUnordered>(widen(a[l * kParts]), widen(b[l * kParts]));
  });
}

// The comparisons of one kind of operand, by [unordered][comparison].
struct Table {
  CompareFunction f[2][8];
};
template <template <int, bool> class F>
Table make_table() {
  return {{{F<0, false>::f, F<1, false>::f, F<2, false>::f, F<3, false>::f, F<4, false>::f,
            F<5, false>::f, F<6, false>::f, F<7, false>::f},
           {F<0, true>::f, F<1, true>::f, F<2, true>::f, F<3, true>::f, F<4, true>::f,
            F<5, true>::f, F<6, true>::f, F<7, true>::f}}};
}
template <class T>
struct Plain {
  template <int kCmp, bool kU>
  struct F {
    static constexpr CompareFunction f = &compare<T, kCmp, kU>;
  };
};
template <int kCmp, bool kU>
struct Flushed {
  static constexpr CompareFunction f = &compare_flushed<kCmp, kU>;
};
template <bool kBf16, int kParts, int kPart>
struct Half {
  template <int kCmp, bool kU>
  struct F {
    static constexpr CompareFunction f = &compare_half<kBf16, kParts, kPart, kCmp, kU>;
  };
};

CompareFunction choose(Type t, int cmp, bool unordered, bool ftz, int part) {
  const auto pick = [&](const Table& table) { return table.f[unordered][cmp]; };
  switch (t) {
    case Type::kB16:
    case Type::kU16:
      return pick(make_table<Plain<uint16_t>::F>());
    case Type::kS16:
      return pick(make_table<Plain<int16_t>::F>());
    case Type::kB32:
    case Type::kU32:
      return pick(make_table<Plain<uint32_t>::F>());
    case Type::kS32:
      return pick(make_table<Plain<int32_t>::F>());
    case Type::kB64:
    case Type::kU64:
      return pick(make_table<Plain<uint64_t>::F>());
    case Type::kS64:
      return pick(make_table<Plain<int64_t>::F>());
    case Type::kF32:
      return ftz ? pick(make_table<Flushed>()) : pick(make_table<Plain<float>::F>());
    case Type::kF64:
      return pick(make_table<Plain<double>::F>());
    case Type::kF16:
      return pick(make_table<Half<false, 1, 0>::F>());
    case Type::kBf16:
      return pick(make_table<Half<true, 1, 0>::F>());
    case Type::kF16x2:
      return part == 0 ? pick(make_table<Half<false, 2, 0>::F>())
                       : pick(make_table<Half<false, 2, 1>::F>());
    default:
      return part == 0 ? pick(make_table<Half<true, 2, 0>::F>())
                       : pick(make_table<Half<true, 2, 1>::F>());
  }
}

bool is_float(Type t) {
  return t == Type::kF32 || t == Type::kF64 || t == Type::kF16 || t == Type::kF16x2 ||
         t == Type::kBf16 || t == Type::kBf16x2;
}

// What setp and set share. Instr::imm points at it; it lives as long as the process, one for each
// distinct comparison.
struct Compare {
  CompareFunction low = nullptr, high = nullptr;  // high: second half of a pair
  BoolOp combine = kNoBool;
  bool negate_c = false;
};

uint32_t combined(Warp& w, const Compare& c, uint32_t result, uint32_t c_at) {
  if (c.combine == kNoBool) return result;
  const uint32_t p = c.negate_c ? ~w.predicate(c_at) : w.predicate(c_at);
  return c.combine == kAnd ? result & p : c.combine == kOr ? result | p : result ^ p;
}

Compare unpack(const Instr& in) {
  Compare c;
  const Type t = static_cast<Type>(in.mode & 0xff);
  const int cmp = static_cast<int>(in.mode >> 8 & 7);
  const bool unordered = (in.mode >> 11 & 1) != 0, ftz = (in.mode >> 12 & 1) != 0;
  c.low = choose(t, cmp, unordered, ftz, 0);
  if (t == Type::kF16x2 || t == Type::kBf16x2) c.high = choose(t, cmp, unordered, ftz, 1);
  c.combine = static_cast<BoolOp>(in.mode >> 13 & 3);
  c.negate_c = (in.mode >> 15 & 1) != 0;
  return c;
}

// The common case: no second result, no boolean operand. imm is the function.
void setp_plain(Warp& w, const Instr& in, uint32_t mask) {
  const auto f = reinterpret_cast<CompareFunction>(in.imm);
  set_predicate(w, in.r[0], mask, f(w, in.r[1], in.r[2], false));
}

void setp(Warp& w, const Instr& in, uint32_t mask) {
  const Compare c = unpack(in);
  const int a = in.destinations;
  const uint32_t c_at = c.combine == kNoBool ? 0 : in.r[a + 2];
  const uint32_t low = c.low(w, in.r[a], in.r[a + 1], false);
  // The second result: of the high halves, or of the opposite comparison.
  const uint32_t high = c.high != nullptr ? c.high(w, in.r[a], in.r[a + 1], false) : ~low;
  const uint32_t p = combined(w, c, low, c_at), q = combined(w, c, high, c_at);
  set_predicate(w, in.r[0], mask, p);
  if (in.destinations > 1) set_predicate(w, in.r[1], mask, q);
}

void set(Warp& w, const Instr& in, uint32_t mask) {
  const Compare c = unpack(in);
  const uint32_t c_at = c.combine == kNoBool ? 0 : in.r[3];
  const uint32_t low = combined(w, c, c.low(w, in.r[1], in.r[2], false), c_at);
  const uint32_t high =
      c.high == nullptr ? 0 : combined(w, c, c.high(w, in.r[1], in.r[2], false), c_at);
  const bool pair = c.high != nullptr;
  uint32_t one = ~0u;
  if (in.type == Type::kF32) one = 0x3f800000u;
  if (in.type == Type::kF16 || in.type == Type::kF16x2) one = 0x3c003c00u;
  if (in.type == Type::kBf16 || in.type == Type::kBf16x2) one = 0x3f803f80u;
  for_lanes(mask, [&](int l) {
    uint32_t v = (low >> l & 1) != 0 ? one : 0;
    if (pair) v = (v & 0xffffu) | ((high >> l & 1) != 0 ? one & 0xffff0000u : 0);
    if (bytes_of(in.type) == 2) {
      w.at<uint16_t>(in.r[0])[l] = static_cast<uint16_t>(v);
    } else {
      w.at<uint32_t>(in.r[0])[l] = v;
    }
  });
}

// Takes comparison, boolean operator and .ftz into mode.
void take_comparison(Decoder& d) {
  const std::string name = d.peek();
  static const char* names[] = {"eq", "ne", "lt", "le", "gt", "ge", "num", "nan"};
  static const char* unordered[] = {"equ", "neu", "ltu", "leu", "gtu", "geu"};
  static const std::pair<const char*, int> same_as[] = {
      {"lo", kLt}, {"ls", kLe}, {"hi", kGt}, {"hs", kGe}};
  int cmp = -1;
  bool is_unordered = false, needs_unsigned = false;
  for (int i = 0; i < 8; ++i) cmp = name == names[i] ? i : cmp;
  for (int i = 0; i < 6; ++i) {
    if (name == unordered[i]) {
      cmp = i;
      is_unordered = true;
    }
  }
  for (const auto& entry : same_as) {
    if (name == entry.first) {
      cmp = entry.second;
      needs_unsigned = true;
    }
  }
  if (cmp < 0) d.fail("unknown comparison ." + name);
  d.take(name.c_str());
  const int combine = d.take_optional({"and", "or", "xor"}) + 1;
  const bool ftz = d.take("ftz");
  d.out.mode = static_cast<uint32_t>(cmp) << 8 | uint32_t{is_unordered} << 11 |
               uint32_t{ftz} << 12 | static_cast<uint32_t>(combine) << 13 |
               uint32_t{needs_unsigned} << 16;
}

// The operand type, with the rules of the comparison.
Type take_operand_type(Decoder& d) {
  const Type t = d.take_type();
  const int cmp = static_cast<int>(d.out.mode >> 8 & 7);
  const bool bits = t == Type::kB16 || t == Type::kB32 || t == Type::kB64;
  const bool is_unsigned = t == Type::kU16 || t == Type::kU32 || t == Type::kU64;
  const bool is_signed = t == Type::kS16 || t == Type::kS32 || t == Type::kS64;
  if (!bits && !is_unsigned && !is_signed && !is_float(t)) d.fail("type cannot be compared");
  if (bits && cmp > kNe) d.fail("a .b type is only compared by .eq and .ne");
  if (((d.out.mode >> 11 & 1) != 0 || cmp >= kNum) && !is_float(t))
    d.fail("a float comparison of integers");
  if ((d.out.mode >> 12 & 1) != 0 && t != Type::kF32 && t != Type::kF16 && t != Type::kF16x2)
    d.fail(".ftz is for floats");
  if ((d.out.mode >> 16 & 1) != 0 && !is_unsigned)
    d.fail("lo, ls, hi, hs compare unsigned integers");
  // `ne` of floats is false on NaN, of integers there is none.
  d.out.mode |= static_cast<uint32_t>(t);
  return t;
}

void boolean_source(Decoder& d, int i) {
  Operand c = d.operand(i);
  if (c.negated) d.out.mode |= 1u << 15;
  c.negated = false;
  d.src(c, Type::kPred);
}

void decode_setp(Decoder& d) {
  take_comparison(d);
  const Type t = take_operand_type(d);
  const bool combine = (d.out.mode >> 13 & 3) != 0;
  d.expect(combine ? 4 : 3);
  Operand first = d.operand(0);
  const std::vector<Operand> second = first.parts;
  first.parts.clear();
  d.dst(first, Type::kPred);
  if (!second.empty()) d.dst(second[0], Type::kPred);
  d.src(1, t);
  d.src(2, t);
  if (combine) boolean_source(d, 3);
  d.out.klass = Class::kCompare;
  d.out.run = &setp;
  const Compare c = unpack(d.out);
  if (second.empty() && !combine && c.high == nullptr) {
    d.out.imm = reinterpret_cast<int64_t>(c.low);
    d.out.run = &setp_plain;
  }
}

void decode_set(Decoder& d) {
  take_comparison(d);
  const Type result = d.take_type(
      {Type::kU32, Type::kS32, Type::kF32, Type::kF16, Type::kF16x2, Type::kBf16, Type::kBf16x2});
  const Type t = take_operand_type(d);
  const bool combine = (d.out.mode >> 13 & 3) != 0;
  d.expect(combine ? 4 : 3);
  d.dst(0, result);
  d.src(1, t);
  d.src(2, t);
  if (combine) boolean_source(d, 3);
  d.out.type = result;
  d.out.klass = Class::kCompare;
  d.out.run = &set;
}

template <class T>
void selp(Warp& w, const Instr& in, uint32_t mask) {
  T* d = w.at<T>(in.r[0]);
  const T *a = w.at<T>(in.r[1]), *b = w.at<T>(in.r[2]);
  const uint32_t p = w.predicate(in.r[3]);
  if (mask == kAllLanes) {
LLMKERN_LANES_APART
    for (int l = 0; l < kLanes; ++l) d[l] = (p & 1u << l) != 0 ? a[l] : b[l];
  } else {
    for_lanes(mask, [&](int l) { d[l] = (p >> l & 1) != 0 ? a[l] : b[l]; });
  }
}

void decode_selp(Decoder& d) {
  const Type t =
      d.take_type({Type::kB16, Type::kU16, Type::kS16, Type::kB32, Type::kU32, Type::kS32,
                   Type::kF32, Type::kB64, Type::kU64, Type::kS64, Type::kF64});
  d.expect(4);
  d.dst(0, t);
  d.src(1, t);
  d.src(2, t);
  d.src(3, Type::kPred);
  d.out.klass = Class::kMove;
  d.out.track = Track::kSelect;
  d.out.run = bytes_of(t) == 2   ? &selp<uint16_t>
              : bytes_of(t) == 4 ? &selp<uint32_t>
                                 : &selp<uint64_t>;
}

template <class T>
void slct(Warp& w, const Instr& in, uint32_t mask) {
  for_lanes(mask, [&](int l) {
    const bool first = in.mode != 0 ? w.at<float>(in.r[3])[l] >= 0 : w.at<int32_t>(in.r[3])[l] >= 0;
    w.at<T>(in.r[0])[l] = w.at<T>(in.r[first ? 1 : 2])[l];
  });
}

void decode_slct(Decoder& d) {
  d.take("ftz");  // a flushed subnormal is still not below zero
  const Type t = d.take_type();
  if (bytes_of(t) < 2 || t == Type::kPred) d.fail("type is not known here");
  const Type c = d.take_type({Type::kS32, Type::kF32});
  d.expect(4);
  d.dst(0, t);
  d.src(1, t);
  d.src(2, t);
  d.src(3, c);
  d.out.mode = c == Type::kF32;
  d.out.klass = Class::kMove;
  d.out.run = bytes_of(t) == 2   ? &slct<uint16_t>
              : bytes_of(t) == 4 ? &slct<uint32_t>
                                 : &slct<uint64_t>;
}

}  // namespace

void add_compare_opcodes(OpcodeTable* table) {
  (*table)["setp"] = decode_setp;
  (*table)["set"] = decode_set;
  (*table)["selp"] = decode_selp;
  (*table)["slct"] = decode_slct;
}

}  // namespace emulator
}  // namespace llmkern
