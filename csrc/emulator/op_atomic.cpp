// atom and red. Lanes go one after the other, in lane order; CTAs of a kernel with global atomics
// run one after the other too, so results do not depend on the host's threads.
#include <algorithm>
#include <cstring>

#include "access.h"
#include "formats.h"
#include "lanes.h"
#include "modifiers.h"

namespace llmkern {
namespace emulator {
namespace {

enum Op { kAdd, kMin, kMax, kAnd, kOr, kXor, kExch, kCas, kInc, kDec };

template <class T, int kOp>
T updated(T old, T b, T c) {
  switch (kOp) {
    case kAdd:
      return static_cast<T>(old + b);
    case kMin:
      return std::min(old, b);
    case kMax:
      return std::max(old, b);
    case kExch:
      return b;
    case kCas:
      return old == b ? c : old;
    case kInc:
      return old >= b ? T{0} : static_cast<T>(old + 1);
    default:
      return old == 0 || old > b ? b : static_cast<T>(old - 1);
  }
}

template <class T, int kOp>
struct Integer {
  static T apply(T old, T b, T c) {
    return kOp == kAnd   ? old & b
           : kOp == kOr  ? old | b
           : kOp == kXor ? old ^ b
                         : updated<T, kOp>(old, b, c);
  }
};
template <class T>
struct FloatAdd {
  static T apply(T old, T b, T) { return old + b; }
};
// .f32 atomics flush subnormals in global memory.
struct FlushingAdd {
  static float apply(float old, float b, float) { return flush(flush(old) + flush(b)); }
};
template <bool kBf16>
struct HalfAdd {
  static uint16_t apply(uint16_t old, uint16_t b, uint16_t) {
    return kBf16 ? float_to_bf16(bf16_to_float(old) + bf16_to_float(b))
                 : float_to_half(half_to_float(old) + half_to_float(b));
  }
};
template <bool kBf16>
struct PairAdd {
  static uint32_t apply(uint32_t old, uint32_t b, uint32_t) {
    using H = HalfAdd<kBf16>;
    return H::apply(static_cast<uint16_t>(old), static_cast<uint16_t>(b), 0) |
           uint32_t{H::apply(static_cast<uint16_t>(old >> 16), static_cast<uint16_t>(b >> 16), 0)}
               << 16;
  }
};

// r: [old,] address, b[, c].
template <class T, class F>
void atomic(Warp& w, const Instr& in, uint32_t mask) {
  uint64_t address[kLanes];
  char* at[kLanes];
  effective_addresses(w, in, address);
  resolve_atomic(w, in, mask, in.space, address, static_cast<int>(sizeof(T)), at);
  const T* b = w.at<T>(in.r[in.address + 1]);
  const T* c = in.width > 1 ? w.at<T>(in.r[in.address + 2]) : b;
  T old[kLanes];
  for_lanes(mask, [&](int l) {
    std::memcpy(&old[l], at[l], sizeof(T));
    const T now = F::apply(old[l], b[l], c[l]);
    std::memcpy(at[l], &now, sizeof(T));
  });
  if (in.destinations == 0) return;
  for_lanes(mask, [&](int l) { w.at<T>(in.r[0])[l] = old[l]; });
}

template <class T, int kOp>
constexpr Handler integer = &atomic<T, Integer<T, kOp>>;

Handler pick_add(Decoder& d, Type* t) {
  const bool noftz = d.take("noftz");
  *t = noftz ? d.take_type({Type::kF16, Type::kF16x2, Type::kBf16, Type::kBf16x2})
             : d.take_type({Type::kU32, Type::kS32, Type::kU64, Type::kF32, Type::kF64});
  switch (*t) {
    case Type::kF16:
      return &atomic<uint16_t, HalfAdd<false>>;
    case Type::kBf16:
      return &atomic<uint16_t, HalfAdd<true>>;
    case Type::kF16x2:
      return &atomic<uint32_t, PairAdd<false>>;
    case Type::kBf16x2:
      return &atomic<uint32_t, PairAdd<true>>;
    case Type::kF32:
      return d.out.space == Space::kShared ? &atomic<float, FloatAdd<float>>
                                           : &atomic<float, FlushingAdd>;
    case Type::kF64:
      return &atomic<double, FloatAdd<double>>;
    case Type::kU64:
      return integer<uint64_t, kAdd>;
    default:
      return integer<uint32_t, kAdd>;
  }
}

template <int kOp>
Handler pick_order(Decoder& d, Type* t) {
  *t = d.take_type({Type::kU32, Type::kS32, Type::kU64, Type::kS64});
  switch (*t) {
    case Type::kU32:
      return integer<uint32_t, kOp>;
    case Type::kS32:
      return integer<int32_t, kOp>;
    case Type::kU64:
      return integer<uint64_t, kOp>;
    default:
      return integer<int64_t, kOp>;
  }
}

template <int kOp>
Handler pick_bits(Decoder& d, Type* t) {
  *t = d.take_type({Type::kB32, Type::kB64});
  return *t == Type::kB32 ? integer<uint32_t, kOp> : integer<uint64_t, kOp>;
}

Handler pick(Decoder& d, int op, Type* t) {
  switch (op) {
    case kAdd:
      return pick_add(d, t);
    case kMin:
      return pick_order<kMin>(d, t);
    case kMax:
      return pick_order<kMax>(d, t);
    case kAnd:
      return pick_bits<kAnd>(d, t);
    case kOr:
      return pick_bits<kOr>(d, t);
    case kXor:
      return pick_bits<kXor>(d, t);
    case kExch:
      return pick_bits<kExch>(d, t);
    case kCas:
      *t = d.take_type({Type::kB16, Type::kB32, Type::kB64});
      return *t == Type::kB16   ? integer<uint16_t, kCas>
             : *t == Type::kB32 ? integer<uint32_t, kCas>
                                : integer<uint64_t, kCas>;
    default:
      *t = d.take_type({Type::kU32});
      return op == kInc ? integer<uint32_t, kInc> : integer<uint32_t, kDec>;
  }
}

void decode(Decoder& d, bool returns) {
  const MemoryModifiers m = take_memory_modifiers(d);
  if (m.space != Space::kGlobal && m.space != Space::kShared && m.space != Space::kGeneric)
    d.fail("atomics are for global and shared memory");
  d.out.space = m.space;
  const int op =
      d.take_one_of({"add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec"});
  if (!returns && (op == kExch || op == kCas)) d.fail("red has no exch and cas");
  const bool hint = m.cache_hint || d.take("L2::cache_hint");
  Type t;
  const Handler run = pick(d, op, &t);
  const int sources = op == kCas ? 3 : 2;
  d.expect(sources + returns, sources + returns + hint);
  if (returns) d.dst(0, t);
  d.address(returns, m.space);
  for (int i = 1; i < sources; ++i) d.src(i + returns, t);
  d.out.width = static_cast<uint8_t>(sources - 1);
  d.out.bytes = static_cast<uint8_t>(bytes_of(t));
  d.out.klass = Class::kAtomic;
  // Without a word on order it is relaxed, but what it returns counts as acquired: global_order.h.
  d.out.order = static_cast<uint8_t>(m.order != 0 ? kStrong | m.order
                                     : returns    ? kStrong | kAcquires
                                                  : kStrong);
  d.out.run = run;
  d.builder->kernel->compares |= op == kCas && m.space != Space::kShared;
  if (m.space != Space::kShared) d.builder->kernel->has_global_atomics = true;
}

}  // namespace

void add_atomic_opcodes(OpcodeTable* table) {
  (*table)["atom"] = [](Decoder& d) { decode(d, true); };
  (*table)["red"] = [](Decoder& d) { decode(d, false); };
}

}  // namespace emulator
}  // namespace llmkern
