// f16, bf16 and their pairs: add sub mul fma min max abs neg; f32 += f16 or bf16. Computed in float
// or double and rounded once.
#include <cmath>

#include "families.h"
#include "formats.h"
#include "lanes.h"

namespace llmkern {
namespace emulator {
namespace {

struct F16 {
  static constexpr uint16_t kNan = 0x7fff;
  static float widen(uint16_t v) { return half_to_float(v); }
  static uint16_t narrow(float v) { return float_to_half(v); }
  static uint16_t narrow_odd(double v) {
    return static_cast<uint16_t>(encode(v, kHalf, Round::kNearest, false));
  }
  static uint16_t flush_one(uint16_t v) { return (v & 0x7c00) == 0 ? v & 0x8000 : v; }
};
struct B16 {
  static constexpr uint16_t kNan = 0x7fff;
  static float widen(uint16_t v) { return bf16_to_float(v); }
  static uint16_t narrow(float v) { return float_to_bf16(v); }
  static uint16_t narrow_odd(double v) {
    return static_cast<uint16_t>(encode(v, kBf16, Round::kNearest, false));
  }
  static uint16_t flush_one(uint16_t v) { return v; }
};

// Options of an instruction, in Instr::mode.
enum : uint32_t { kFtz = 1, kSat = 2, kRelu = 4, kNanResult = 8 };

template <class H>
uint16_t extreme(uint16_t a, uint16_t b, bool max, bool nan_result) {
  const float x = H::widen(a), y = H::widen(b);
  if (x != x || y != y) {
    if (nan_result || (x != x && y != y)) return H::kNan;
    return x != x ? b : a;
  }
  if (x == y) return (std::signbit(x) != max) ? a : b;
  return (x < y) != max ? a : b;
}

template <class H, HalfOp kOp>
uint16_t compute(uint16_t a, uint16_t b, uint16_t c, uint32_t mode) {
  if ((mode & kFtz) != 0) {
    a = H::flush_one(a);
    b = H::flush_one(b);
    c = H::flush_one(c);
  }
  uint16_t r = 0;
  switch (kOp) {
    case HalfOp::kAdd:
      r = H::narrow(H::widen(a) + H::widen(b));
      break;
    case HalfOp::kSub:
      r = H::narrow(H::widen(a) - H::widen(b));
      break;
    case HalfOp::kMul:
      r = H::narrow(H::widen(a) * H::widen(b));
      break;
    case HalfOp::kFma:
      r = H::narrow_odd(add_to_odd(double(H::widen(a)) * double(H::widen(b)), H::widen(c)));
      break;
    case HalfOp::kMin:
      r = extreme<H>(a, b, false, (mode & kNanResult) != 0);
      break;
    case HalfOp::kMax:
      r = extreme<H>(a, b, true, (mode & kNanResult) != 0);
      break;
    case HalfOp::kAbs:
      r = a & 0x7fff;
      break;
    case HalfOp::kNeg:
      r = a ^ 0x8000;
      break;
  }
  if ((mode & kFtz) != 0) r = H::flush_one(r);
  if ((mode & (kSat | kRelu)) != 0) {
    const float v = H::widen(r);
    if ((mode & kSat) != 0) r = H::narrow(v > 0 ? (v < 1 ? v : 1.0f) : 0.0f);
    if ((mode & kRelu) != 0 && !(v > 0) && v == v) r = 0;
  }
  return r;
}

template <class H, HalfOp kOp, int kParts>  // 1: 16-bit registers, 2: pairs
void half_lanes(Warp& w, const Instr& in, uint32_t mask) {
  uint16_t* d = w.at<uint16_t>(in.r[0]);
  const uint16_t* a = w.at<uint16_t>(in.r[1]);
  const uint16_t* b = in.operands > 2 ? w.at<uint16_t>(in.r[2]) : a;
  const uint16_t* c = in.operands > 3 ? w.at<uint16_t>(in.r[3]) : a;
  for_lanes(mask, [&](int lane) {
    for (int i = lane * kParts; i < (lane + 1) * kParts; ++i)
      d[i] = compute<H, kOp>(a[i], b[i], c[i], in.mode);
  });
}

template <HalfOp kOp>
Handler pick(Type t) {
  switch (t) {
    case Type::kF16:
      return &half_lanes<F16, kOp, 1>;
    case Type::kF16x2:
      return &half_lanes<F16, kOp, 2>;
    case Type::kBf16:
      return &half_lanes<B16, kOp, 1>;
    default:
      return &half_lanes<B16, kOp, 2>;
  }
}

Handler pick(HalfOp op, Type t) {
  switch (op) {
    case HalfOp::kAdd:
      return pick<HalfOp::kAdd>(t);
    case HalfOp::kSub:
      return pick<HalfOp::kSub>(t);
    case HalfOp::kMul:
      return pick<HalfOp::kMul>(t);
    case HalfOp::kFma:
      return pick<HalfOp::kFma>(t);
    case HalfOp::kMin:
      return pick<HalfOp::kMin>(t);
    case HalfOp::kMax:
      return pick<HalfOp::kMax>(t);
    case HalfOp::kAbs:
      return pick<HalfOp::kAbs>(t);
    default:
      return pick<HalfOp::kNeg>(t);
  }
}

// d = a (+, -) c or a * b + c in f32, with a (and b) of 16 bits.
template <class H, HalfOp kOp>
struct Mixed {
  static float apply(uint16_t a, float c) {
    return kOp == HalfOp::kAdd ? H::widen(a) + c : H::widen(a) - c;
  }
  static float apply(uint16_t a, uint16_t b, float c) {
    return std::fma(H::widen(a), H::widen(b), c);
  }
};

template <class H>
Handler pick_mixed(HalfOp op) {
  if (op == HalfOp::kFma) return &ternary<float, uint16_t, uint16_t, float, Mixed<H, HalfOp::kFma>>;
  return op == HalfOp::kAdd ? &binary<float, uint16_t, float, Mixed<H, HalfOp::kAdd>>
                            : &binary<float, uint16_t, float, Mixed<H, HalfOp::kSub>>;
}

void decode_mixed(Decoder& d, HalfOp op) {
  const Type t = d.take_type({Type::kF16, Type::kBf16});
  const int narrow = op == HalfOp::kFma ? 2 : 1;
  d.expect(narrow + 2);
  d.dst(0, Type::kF32);
  for (int i = 1; i <= narrow; ++i) d.src(i, t);
  d.src(narrow + 1, Type::kF32);
  d.out.klass = Class::kFloat;
  d.out.run = t == Type::kF16 ? pick_mixed<F16>(op) : pick_mixed<B16>(op);
}

}  // namespace

void decode_half(Decoder& d, HalfOp op) {
  const bool arithmetic = op <= HalfOp::kFma;
  if (arithmetic && !d.take("rn") && op == HalfOp::kFma) d.fail("fma needs .rn");
  uint32_t mode = 0;
  const bool noftz = d.take("noftz");
  if (!noftz && d.take("ftz")) mode |= kFtz;
  if (arithmetic && d.take("sat")) mode |= kSat;
  if ((op == HalfOp::kFma) && d.take("relu")) mode |= kRelu;
  if ((op == HalfOp::kMin || op == HalfOp::kMax) && d.take("NaN")) mode |= kNanResult;
  if (op <= HalfOp::kSub || op == HalfOp::kFma) {
    if (mode == 0 && d.take("f32")) return decode_mixed(d, op);
  }
  const Type t = d.take_type({Type::kF16, Type::kF16x2, Type::kBf16, Type::kBf16x2});
  const bool bf16 = t == Type::kBf16 || t == Type::kBf16x2;
  if (bf16 && (mode & (kFtz | kSat)) != 0) d.fail("no .ftz or .sat for bf16");
  const int sources = op == HalfOp::kFma ? 3 : (op == HalfOp::kAbs || op == HalfOp::kNeg) ? 1 : 2;
  d.expect(sources + 1);
  d.dst(0, t);
  for (int i = 1; i <= sources; ++i) d.src(i, t);
  d.out.mode = mode;
  d.out.klass = Class::kFloat;
  d.out.run = pick(op, t);
}

}  // namespace emulator
}  // namespace llmkern
