// rcp sqrt rsqrt ex2 lg2 sin cos tanh. The .approx forms are computed in double (or by the host's
// libm) and rounded: closer than the hardware's tables, so equal only to a tolerance.
#include <cfenv>
#include <cmath>

#include "families.h"
#include "formats.h"
#include "lanes.h"

namespace llmkern {
namespace emulator {
namespace {

enum Function { kRcp, kSqrt, kRsqrt, kEx2, kLg2, kSin, kCos, kTanh };

template <int kF>
inline float evaluate(float x) {
  switch (kF) {
    case kRcp:
      return 1.0f / x;
    case kSqrt:
      return std::sqrt(x);
    case kRsqrt:
      return static_cast<float>(1.0 / std::sqrt(static_cast<double>(x)));
    case kEx2:
      return std::exp2(x);
    case kLg2:
      return std::log2(x);
    case kSin:
      return std::sin(x);
    case kCos:
      return std::cos(x);
    default:
      return std::tanh(x);
  }
}

template <int kF, bool kFtz>
struct Evaluate {
  static float apply(float x) { return kFtz ? flush(evaluate<kF>(flush(x))) : evaluate<kF>(x); }
};

template <int kF>
struct Evaluate64 {
  static double apply(double x) {
    return kF == kRcp ? 1.0 / x : kF == kSqrt ? std::sqrt(x) : 1.0 / std::sqrt(x);
  }
};

template <int kF, bool kBf16>
struct EvaluateHalf {
  static uint16_t apply(uint16_t v) {
    const float r = evaluate<kF>(kBf16 ? bf16_to_float(v) : half_to_float(v));
    return kBf16 ? float_to_bf16(r) : float_to_half(r);
  }
};
template <int kF, bool kBf16>
struct EvaluatePair {
  static uint32_t apply(uint32_t v) {
    using H = EvaluateHalf<kF, kBf16>;
    return H::apply(static_cast<uint16_t>(v)) | uint32_t{H::apply(static_cast<uint16_t>(v >> 16))}
                                                    << 16;
  }
};

template <int kF>
void directed(Warp& w, const Instr& in, uint32_t mask) {
  const Round round = static_cast<Round>(in.mode & 15);
  const bool ftz = (in.mode & 16) != 0;
  std::fesetround(round == Round::kZero   ? FE_TOWARDZERO
                  : round == Round::kDown ? FE_DOWNWARD
                                          : FE_UPWARD);
  for_lanes(mask, [&](int l) {
    if (in.bytes == 8) {
      volatile double x = w.at<double>(in.r[1])[l];
      w.at<double>(in.r[0])[l] = kF == kRcp ? 1.0 / x : std::sqrt(x);
    } else {
      volatile float x = ftz ? flush(w.at<float>(in.r[1])[l]) : w.at<float>(in.r[1])[l];
      volatile float r = kF == kRcp ? 1.0f / x : std::sqrt(float(x));
      w.at<float>(in.r[0])[l] = ftz ? flush(float(r)) : float(r);
    }
  });
  std::fesetround(FE_TONEAREST);
}

template <int kF>
Handler half_handler(Type t) {
  switch (t) {
    case Type::kF16:
      return unary_of<uint16_t, EvaluateHalf<kF, false>>;
    case Type::kBf16:
      return unary_of<uint16_t, EvaluateHalf<kF, true>>;
    case Type::kF16x2:
      return unary_of<uint32_t, EvaluatePair<kF, false>>;
    default:
      return unary_of<uint32_t, EvaluatePair<kF, true>>;
  }
}

void operands(Decoder& d, Type t, Handler run) {
  d.expect(2);
  d.dst(0, t);
  d.src(1, t);
  d.out.klass = Class::kSpecial;
  d.out.bytes = static_cast<uint8_t>(bytes_of(t));
  d.out.run = run;
}

// rcp and sqrt are also rounded, and f64.
template <int kF>
void decode_rounded(Decoder& d) {
  const bool approx = d.take("approx");
  const int round = approx ? 0 : d.take_one_of({"rn", "rz", "rm", "rp"});
  const bool ftz = d.take("ftz");
  const Type t = d.take_type({Type::kF32, Type::kF64});
  if (t == Type::kF64 && ftz && !approx) d.fail(".ftz is for .f32");
  d.out.mode = static_cast<uint32_t>(round) | (ftz ? 16u : 0u);
  if (round != 0) return operands(d, t, &directed<kF>);
  if (t == Type::kF64) return operands(d, t, unary_of<double, Evaluate64<kF>>);
  operands(d, t, ftz ? unary_of<float, Evaluate<kF, true>> : unary_of<float, Evaluate<kF, false>>);
}

template <int kF>
void decode_approximate(Decoder& d) {
  d.take_one_of({"approx"});
  const bool ftz = d.take("ftz");
  const Type last = last_type(d);
  if (is_half(last)) {
    if (kF != kEx2 && kF != kTanh) d.fail("no half precision form");
    if (ftz != (kF == kEx2 && (last == Type::kBf16 || last == Type::kBf16x2)))
      d.fail(".ftz goes with .bf16 here");
    return operands(d, d.take_type(), half_handler<kF>(last));
  }
  const Type t = kF == kRsqrt ? d.take_type({Type::kF32, Type::kF64}) : d.take_type({Type::kF32});
  if (t == Type::kF64) return operands(d, t, unary_of<double, Evaluate64<kF>>);
  if (kF == kTanh && ftz) d.fail("tanh takes no .ftz");
  operands(d, t, ftz ? unary_of<float, Evaluate<kF, true>> : unary_of<float, Evaluate<kF, false>>);
}

}  // namespace

void add_special_opcodes(OpcodeTable* table) {
  (*table)["rcp"] = decode_rounded<kRcp>;
  (*table)["sqrt"] = decode_rounded<kSqrt>;
  (*table)["rsqrt"] = decode_approximate<kRsqrt>;
  (*table)["ex2"] = decode_approximate<kEx2>;
  (*table)["lg2"] = decode_approximate<kLg2>;
  (*table)["sin"] = decode_approximate<kSin>;
  (*table)["cos"] = decode_approximate<kCos>;
  (*table)["tanh"] = decode_approximate<kTanh>;
}

}  // namespace emulator
}  // namespace llmkern
