// f32, f64 and f32x2 arithmetic: add sub mul fma mad div min max abs neg copysign testp. Results
// are IEEE; .ftz flushes inputs and results; div.full and div.approx are exactly rounded here.
#include <cfenv>
#include <cmath>
#include <cstring>

#include "families.h"
#include "formats.h"
#include "lanes.h"

namespace llmkern {
namespace emulator {
namespace {

enum Op { kAdd, kSub, kMul, kDiv, kFma };

template <class T>
inline T saturate(T v) {
  return v > 0 ? (v < 1 ? v : T{1}) : T{0};
}  // NaN gives +0

template <class T, int kOp>
inline T compute(T a, T b) {
  return kOp == kAdd ? a + b : kOp == kSub ? a - b : kOp == kMul ? a * b : a / b;
}

template <class T, int kOp, bool kFtz, bool kSat>
struct Arithmetic {
  static T apply(T a, T b) {
    T r = kFtz ? flush(compute<T, kOp>(flush(a), flush(b))) : compute<T, kOp>(a, b);
    return kSat ? saturate(r) : r;
  }
};

// fma with the host's instruction where it has one; std::fma is a slow but exact call elsewhere.
using FmaLanes = void (*)(float* d, const float* a, const float* b, const float* c);
#if defined(__x86_64__)
// With -frounding-math compilers leave __builtin_fmaf one by one.
__attribute__((target("avx2,fma"))) void fma_native(float* d, const float* a, const float* b,
                                                    const float* c) {
  using Part = float __attribute__((vector_size(32)));
  for (int l = 0; l < kLanes; l += 8) {
    Part x, y, z;
    std::memcpy(&x, a + l, sizeof x);
    std::memcpy(&y, b + l, sizeof y);
    std::memcpy(&z, c + l, sizeof z);
    x = __builtin_ia32_vfmaddps256(x, y, z);
    std::memcpy(d + l, &x, sizeof x);
  }
}
#endif
void fma_portable(float* d, const float* a, const float* b, const float* c) {
  for (int l = 0; l < kLanes; ++l) d[l] = std::fma(a[l], b[l], c[l]);
}
FmaLanes fma_lanes() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return &fma_native;
#endif
  return &fma_portable;
}

template <bool kFtz, bool kSat, bool kRelu>
void fma32(Warp& w, const Instr& in, uint32_t mask) {
  static const FmaLanes run = fma_lanes();
  float* d = w.at<float>(in.r[0]);
  const float* s[3] = {w.at<float>(in.r[1]), w.at<float>(in.r[2]), w.at<float>(in.r[3])};
  if (!kFtz && !kSat && !kRelu && mask == kAllLanes) return run(d, s[0], s[1], s[2]);
  float flushed[3][kLanes], r[kLanes];
  for (int i = 0; i < 3; ++i) {
    for (int l = 0; l < kLanes; ++l) flushed[i][l] = kFtz ? flush(s[i][l]) : s[i][l];
  }
  run(r, flushed[0], flushed[1], flushed[2]);
  for (int l = 0; l < kLanes; ++l) {
    float v = kFtz ? flush(r[l]) : r[l];
    if (kSat) v = saturate(v);
    if (kRelu) v = v < 0 ? 0.0f : v;
    r[l] = v;
  }
  if (mask == kAllLanes) {
    std::memcpy(d, r, sizeof r);
  } else {
    for_lanes(mask, [&](int l) { d[l] = r[l]; });
  }
}

struct Fma64 {
  static double apply(double a, double b, double c) { return std::fma(a, b, c); }
};

// Rounding other than to nearest, through the host's rounding mode. mode: Round | ftz << 4 | sat
// << 5.
template <class T, int kOp>
void directed(Warp& w, const Instr& in, uint32_t mask) {
  const Round round = static_cast<Round>(in.mode & 15);
  const bool ftz = (in.mode & 16) != 0, sat = (in.mode & 32) != 0;
  std::fesetround(round == Round::kZero   ? FE_TOWARDZERO
                  : round == Round::kDown ? FE_DOWNWARD
                                          : FE_UPWARD);
  for_lanes(mask, [&](int l) {
    volatile T a = w.at<T>(in.r[1])[l], b = w.at<T>(in.r[2])[l],
               c = kOp == kFma ? w.at<T>(in.r[3])[l] : T{0};
    if (ftz) {
      a = flush(T(a));
      b = flush(T(b));
      c = flush(T(c));
    }
    volatile T r = kOp == kFma ? std::fma(T(a), T(b), T(c)) : compute<T, kOp>(a, b);
    T out = ftz ? flush(T(r)) : T(r);
    w.at<T>(in.r[0])[l] = sat ? saturate(out) : out;
  });
  std::fesetround(FE_TONEAREST);
}

// Pairs of floats in 64-bit registers.
template <int kOp, bool kFtz>
void pair(Warp& w, const Instr& in, uint32_t mask) {
  float* d = w.at<float>(in.r[0]);
  const float *a = w.at<float>(in.r[1]), *b = w.at<float>(in.r[2]);
  const float* c = kOp == kFma ? w.at<float>(in.r[3]) : a;
  for_lanes(mask, [&](int lane) {
    for (int l = 2 * lane; l < 2 * lane + 2; ++l) {
      const float x = kFtz ? flush(a[l]) : a[l], y = kFtz ? flush(b[l]) : b[l],
                  z = kFtz ? flush(c[l]) : c[l];
      const float r = kOp == kFma ? std::fma(x, y, z) : compute<float, kOp>(x, y);
      d[l] = kFtz ? flush(r) : r;
    }
  });
}

// One NaN gives the other operand unless .NaN asks for NaN; -0 is below +0.
template <class T, bool kMax, bool kNan, bool kFtz>
struct Extreme {
  static T apply(T a, T b) {
    if (kFtz) {
      a = flush(a);
      b = flush(b);
    }
    if (a != a || b != b) {
      const bool nan = kNan || (a != a && b != b);
      return nan ? canonical() : (a != a ? b : a);
    }
    if (a == b) return kMax ? (std::signbit(a) ? b : a) : (std::signbit(a) ? a : b);
    return (a < b) != kMax ? a : b;
  }
  static T canonical() {
    return sizeof(T) == 4 ? T(bits_as<float>(0x7fffffffu)) : std::numeric_limits<T>::quiet_NaN();
  }
  static T apply(T a, T b, T c) { return apply(apply(a, b), c); }
};

template <class T, bool kFtz>
struct Abs {
  static T apply(T a) { return std::fabs(kFtz ? flush(a) : a); }
};
template <class T, bool kFtz>
struct Neg {
  static T apply(T a) { return -(kFtz ? flush(a) : a); }
};
template <class T>
struct CopySign {
  static T apply(T a, T b) { return std::copysign(b, a); }
};

struct Modifiers {
  Round round = Round::kNearest;
  bool explicit_round = false, ftz = false, sat = false;
};

Modifiers take_modifiers(Decoder& d) {
  Modifiers m;
  const int round = d.take_optional({"rn", "rz", "rm", "rp"});
  m.explicit_round = round >= 0;
  if (round > 0) m.round = static_cast<Round>(round);
  m.ftz = d.take("ftz");
  m.sat = d.take("sat");
  return m;
}

void operands(Decoder& d, Type t, int sources, Handler run) {
  d.expect(sources + 1);
  d.dst(0, t);
  for (int i = 1; i <= sources; ++i) d.src(i, t);
  d.out.klass = Class::kFloat;
  d.out.run = run;
}

template <class T, int kOp>
Handler pick(const Modifiers& m) {
  if (m.round != Round::kNearest) return &directed<T, kOp>;
  if (m.ftz)
    return m.sat ? binary_of<T, Arithmetic<T, kOp, true, true>>
                 : binary_of<T, Arithmetic<T, kOp, true, false>>;
  return m.sat ? binary_of<T, Arithmetic<T, kOp, false, true>>
               : binary_of<T, Arithmetic<T, kOp, false, false>>;
}

uint32_t mode_of(const Modifiers& m) {
  return static_cast<uint32_t>(m.round) | (m.ftz ? 16u : 0u) | (m.sat ? 32u : 0u);
}

template <int kOp>
void decode_arithmetic(Decoder& d) {
  const Modifiers m = take_modifiers(d);
  const Type t = d.take_type({Type::kF32, Type::kF64, Type::kF32x2});
  if (t != Type::kF32 && m.sat) d.fail(".sat is for .f32");
  if (t == Type::kF64 && m.ftz) d.fail(".ftz is for .f32");
  d.out.mode = mode_of(m);
  if (t == Type::kF32x2) {
    if (m.round != Round::kNearest) d.fail("only .rn for .f32x2");
    return operands(d, t, 2, m.ftz ? &pair<kOp, true> : &pair<kOp, false>);
  }
  operands(d, t, 2, t == Type::kF32 ? pick<float, kOp>(m) : pick<double, kOp>(m));
}

void decode_fma(Decoder& d) {
  if (is_half(last_type(d))) return decode_half(d, HalfOp::kFma);
  const Modifiers m = take_modifiers(d);
  if (!m.explicit_round) d.fail("a rounding modifier is missing");
  const Type t = d.take_type({Type::kF32, Type::kF64, Type::kF32x2});
  if (t != Type::kF32 && m.sat) d.fail(".sat is for .f32");
  if (t == Type::kF64 && m.ftz) d.fail(".ftz is for .f32");
  d.out.mode = mode_of(m);
  Handler run = nullptr;
  if (t == Type::kF32x2) {
    if (m.round != Round::kNearest) d.fail("only .rn for .f32x2");
    run = m.ftz ? &pair<kFma, true> : &pair<kFma, false>;
  } else if (m.round != Round::kNearest) {
    run = t == Type::kF32 ? &directed<float, kFma> : &directed<double, kFma>;
  } else if (t == Type::kF64) {
    run = ternary_of<double, Fma64>;
  } else {
    run = m.ftz ? (m.sat ? &fma32<true, true, false> : &fma32<true, false, false>)
                : (m.sat ? &fma32<false, true, false> : &fma32<false, false, false>);
  }
  operands(d, t, 3, run);
}

template <class T, bool kMax, bool kNan, bool kFtz>
Handler extreme(bool three) {
  using E = Extreme<T, kMax, kNan, kFtz>;
  return three ? ternary_of<T, E> : binary_of<T, E>;
}

template <bool kMax>
void decode_min_max(Decoder& d) {
  const Type last = last_type(d);
  if (is_half(last)) return decode_half(d, kMax ? HalfOp::kMax : HalfOp::kMin);
  if (last != Type::kF32 && last != Type::kF64) return decode_integer_min_max(d, kMax);
  const bool ftz = d.take("ftz"), nan = d.take("NaN");
  const Type t = d.take_type({Type::kF32, Type::kF64});
  if (t == Type::kF64 && (ftz || nan)) d.fail("no modifiers for .f64");
  const bool three = d.count() == 4;
  if (three && t == Type::kF64) d.fail("three inputs are for .f32");
  operands(d, t, three ? 3 : 2,
           t == Type::kF64 ? extreme<double, kMax, false, false>(false)
           : ftz           ? (nan ? extreme<float, kMax, true, true>(three)
                                  : extreme<float, kMax, false, true>(three))
                           : (nan ? extreme<float, kMax, true, false>(three)
                                  : extreme<float, kMax, false, false>(three)));
}

template <bool kNegate>
void decode_abs_neg(Decoder& d) {
  const Type last = last_type(d);
  if (is_half(last)) return decode_half(d, kNegate ? HalfOp::kNeg : HalfOp::kAbs);
  if (last != Type::kF32 && last != Type::kF64) return decode_integer_abs_neg(d, kNegate);
  const bool ftz = d.take("ftz");
  const Type t = d.take_type({Type::kF32, Type::kF64});
  if (t == Type::kF64) {
    if (ftz) d.fail(".ftz is for .f32");
    return operands(
        d, t, 1,
        kNegate ? unary_of<double, Neg<double, false>> : unary_of<double, Abs<double, false>>);
  }
  const Handler plain =
      kNegate ? unary_of<float, Neg<float, false>> : unary_of<float, Abs<float, false>>;
  const Handler flushing =
      kNegate ? unary_of<float, Neg<float, true>> : unary_of<float, Abs<float, true>>;
  operands(d, t, 1, ftz ? flushing : plain);
}

void decode_div(Decoder& d) {
  const Type last = last_type(d);
  if (last != Type::kF32 && last != Type::kF64) {
    d.out.klass = Class::kSpecial;
    return decode_integer_div(d);
  }
  Modifiers m;
  if (d.take_optional({"full", "approx"}) >= 0) {
    m.ftz = d.take("ftz");
    if (last == Type::kF64) d.fail("only rounded division for .f64");
  } else {
    m = take_modifiers(d);
    if (!m.explicit_round || m.sat) d.fail("div takes .approx, .full or a rounding modifier");
  }
  const Type t = d.take_type({Type::kF32, Type::kF64});
  if (t == Type::kF64 && m.ftz) d.fail(".ftz is for .f32");
  d.out.mode = mode_of(m);
  operands(d, t, 2, t == Type::kF32 ? pick<float, kDiv>(m) : pick<double, kDiv>(m));
  d.out.klass = Class::kSpecial;
}

// add and sub: by the type that ends the opcode.
template <int kOp>
void decode_add_sub(Decoder& d) {
  const Type last = last_type(d);
  if (is_half(last)) return decode_half(d, kOp == kAdd ? HalfOp::kAdd : HalfOp::kSub);
  if (last == Type::kF32 || last == Type::kF64 || last == Type::kF32x2)
    return decode_arithmetic<kOp>(d);
  return kOp == kAdd ? decode_integer_add(d) : decode_integer_sub(d);
}

void decode_mul(Decoder& d) {
  const Type last = last_type(d);
  if (is_half(last)) return decode_half(d, HalfOp::kMul);
  if (last == Type::kF32 || last == Type::kF64 || last == Type::kF32x2)
    return decode_arithmetic<kMul>(d);
  decode_integer_mul(d);
}

void decode_mad(Decoder& d) {
  const Type last = last_type(d);
  if (last == Type::kF32 || last == Type::kF64) return decode_fma(d);
  decode_integer_mad(d);
}

template <int kWhat>  // finite infinite number notanumber normal subnormal
void test_property(Warp& w, const Instr& in, uint32_t mask) {
  const bool wide = in.bytes == 8;
  set_predicate(w, in.r[0], mask, lane_mask([&](int l) {
                  const double v = wide ? w.at<double>(in.r[1])[l] : w.at<float>(in.r[1])[l];
                  const int kind =
                      wide ? std::fpclassify(v) : std::fpclassify(w.at<float>(in.r[1])[l]);
                  return kWhat == 0   ? std::isfinite(v)
                         : kWhat == 1 ? std::isinf(v)
                         : kWhat == 2 ? !std::isnan(v)
                         : kWhat == 3 ? std::isnan(v)
                         : kWhat == 4 ? kind == FP_NORMAL
                                      : kind == FP_SUBNORMAL;
                }));
}

void decode_testp(Decoder& d) {
  const Handler tests[] = {&test_property<0>, &test_property<1>, &test_property<2>,
                           &test_property<3>, &test_property<4>, &test_property<5>};
  const int what =
      d.take_one_of({"finite", "infinite", "number", "notanumber", "normal", "subnormal"});
  const Type t = d.take_type({Type::kF32, Type::kF64});
  d.expect(2);
  d.dst(0, Type::kPred);
  d.src(1, t);
  d.out.bytes = static_cast<uint8_t>(bytes_of(t));
  d.out.klass = Class::kCompare;
  d.out.run = tests[what];
}

}  // namespace

void add_float_opcodes(OpcodeTable* table) {
  (*table)["add"] = decode_add_sub<kAdd>;
  (*table)["sub"] = decode_add_sub<kSub>;
  (*table)["mul"] = decode_mul;
  (*table)["mad"] = decode_mad;
  (*table)["fma"] = decode_fma;
  (*table)["div"] = decode_div;
  (*table)["min"] = decode_min_max<false>;
  (*table)["max"] = decode_min_max<true>;
  (*table)["abs"] = decode_abs_neg<false>;
  (*table)["neg"] = decode_abs_neg<true>;
  (*table)["testp"] = decode_testp;
  (*table)["copysign"] = [](Decoder& d) {
    const Type t = d.take_type({Type::kF32, Type::kF64});
    operands(
        d, t, 2,
        t == Type::kF32 ? binary_of<float, CopySign<float>> : binary_of<double, CopySign<double>>);
  };
}

}  // namespace emulator
}  // namespace llmkern
