// mov (registers, vectors, clocks), cvta, isspacep, and what moves nothing: prefetch, membar,
// fence, nanosleep, discard.
#include <cstring>

#include "decode.h"
#include "lanes.h"

namespace llmkern {
namespace emulator {
namespace {

template <class T>
struct Same {
  static T apply(T a) { return a; }
};

void move_predicate(Warp& w, const Instr& in, uint32_t mask) {
  set_predicate(w, in.r[0], mask, w.predicate(in.r[1]));
}

struct Wide {
  uint64_t low, high;
};

Handler mover(int bytes) {
  switch (bytes) {
    case 2:
      return unary_of<uint16_t, Same<uint16_t>>;
    case 4:
      return unary_of<uint32_t, Same<uint32_t>>;
    case 8:
      return unary_of<uint64_t, Same<uint64_t>>;
    default:
      return unary_of<Wide, Same<Wide>>;
  }
}

// in.bytes of a part, in.width parts; r: whole first or last.
template <bool kPack>
void reshape(Warp& w, const Instr& in, uint32_t mask) {
  const size_t part = in.bytes, whole = part * in.width;
  for (int i = 0; i < in.width; ++i) {
    char* whole_at = w.at<char>(kPack ? in.r[0] : in.r[in.width]) + part * static_cast<size_t>(i);
    char* part_at = w.at<char>(in.r[kPack ? i + 1 : i]);
    for_lanes(mask, [&](int l) {
      char* a = whole_at + whole * static_cast<size_t>(l);
      char* b = part_at + part * static_cast<size_t>(l);
      std::memcpy(kPack ? a : b, kPack ? b : a, part);
    });
  }
}

void pack_halves(Warp& w, const Instr& in, uint32_t mask) {
  uint32_t* d = w.at<uint32_t>(in.r[0]);
  const uint16_t *a = w.at<uint16_t>(in.r[1]), *b = w.at<uint16_t>(in.r[2]);
  if (mask != kAllLanes) return reshape<true>(w, in, mask);
LLMKERN_LANES_APART
  for (int l = 0; l < kLanes; ++l) d[l] = a[l] | uint32_t{b[l]} << 16;
}

void unpack_halves(Warp& w, const Instr& in, uint32_t mask) {
  uint16_t *a = w.at<uint16_t>(in.r[0]), *b = w.at<uint16_t>(in.r[1]);
  const uint32_t* s = w.at<uint32_t>(in.r[2]);
  if (mask != kAllLanes) return reshape<false>(w, in, mask);
LLMKERN_LANES_APART
  for (int l = 0; l < kLanes; ++l) {
    a[l] = static_cast<uint16_t>(s[l]);
    b[l] = static_cast<uint16_t>(s[l] >> 16);
  }
}

// Time is the number of instructions that the warp has run.
void read_clock(Warp& w, const Instr& in, uint32_t mask) {
  for_lanes(mask, [&](int l) {
    if (in.bytes == 8) {
      w.at<uint64_t>(in.r[0])[l] = w.steps;
    } else {
      w.at<uint32_t>(in.r[0])[l] = static_cast<uint32_t>(w.steps);
    }
  });
}

Type part_type(int bytes) {
  return bytes == 2 ? Type::kB16 : bytes == 4 ? Type::kB32 : bytes == 8 ? Type::kB64 : Type::kNone;
}

void decode_reshape(Decoder& d, Type t) {
  const bool pack = d.operand(1).kind == Operand::kVector;
  if (pack && d.operand(0).kind == Operand::kVector) d.fail("both sides are vectors");
  const std::vector<Operand>& parts = d.operand(pack ? 1 : 0).parts;
  const int n = static_cast<int>(parts.size());
  if (n != 2 && n != 4) d.fail("vectors have 2 or 4 elements");
  const Type element = part_type(bytes_of(t) / n);
  if (element == Type::kNone) d.fail("elements of this size are not known");
  d.out.width = static_cast<uint8_t>(n);
  d.out.bytes = static_cast<uint8_t>(bytes_of(element));
  d.out.track = Track::kPart;
  if (pack) d.dst(0, t);
  for (const Operand& part : parts) pack ? d.src(part, element) : d.dst(part, element);
  if (!pack) d.src(1, t);
  const bool halves = n == 2 && d.out.bytes == 2;
  d.out.run =
      pack ? (halves ? &pack_halves : &reshape<true>) : (halves ? &unpack_halves : &reshape<false>);
}

void decode_mov(Decoder& d) {
  d.out.klass = Class::kMove;
  const Type t = d.take_type();
  if (t != Type::kPred && bytes_of(t) < 2) d.fail("type is not known here");
  d.expect(2);
  if (d.operand(0).kind == Operand::kVector || d.operand(1).kind == Operand::kVector)
    return decode_reshape(d, t);
  d.dst(0, t);
  const std::string& name = d.operand(1).name;
  if (name == "%clock" || name == "%clock64" || name == "%globaltimer" || name == "%clock_hi" ||
      name == "%globaltimer_lo") {
    if ((bytes_of(t) == 8) != (name == "%clock64" || name == "%globaltimer"))
      d.fail("wrong size for " + name);
    d.out.bytes = static_cast<uint8_t>(bytes_of(t));
    d.out.run = &read_clock;
    return;
  }
  d.src(1, t);
  d.out.run = t == Type::kPred ? &move_predicate : mover(bytes_of(t));
}

// imm: the window of the space, 0 for global.
template <bool kToSpace>
void convert_address(Warp& w, const Instr& in, uint32_t mask) {
  const auto window = static_cast<uint64_t>(in.imm);
  for_lanes(mask, [&](int l) {
    uint64_t a = in.wide_address ? w.at<uint64_t>(in.r[1])[l] : w.at<uint32_t>(in.r[1])[l];
    if (kToSpace && window != 0) {
      if ((a & kWindowMask) != window)
        throw Fault{"bad address", "cvta.to of an address of another space", l, -1};
      a &= ~kWindowMask;
    } else if (!kToSpace) {
      a |= window;
    }
    if (in.wide_address) {
      w.at<uint64_t>(in.r[0])[l] = a;
    } else {
      w.at<uint32_t>(in.r[0])[l] = static_cast<uint32_t>(a);
    }
  });
}

uint64_t window_of(int space) { return space == 1 ? kSharedWindow : space == 2 ? kLocalWindow : 0; }

void decode_cvta(Decoder& d) {
  d.out.klass = Class::kMove;
  const bool to = d.take("to");
  const int space = d.take_one_of({"global", "shared", "local", "const", "param", "shared::cta"});
  const Type t = d.take_type({Type::kU64});
  if (space == 4) d.fail("the param space has no window here");
  d.expect(2);
  d.dst(0, t);
  d.src(1, t);
  d.out.wide_address = true;
  d.out.imm = static_cast<int64_t>(window_of(space == 5 ? 1 : space));
  d.out.run = to ? &convert_address<true> : &convert_address<false>;
}

void is_space(Warp& w, const Instr& in, uint32_t mask) {
  const auto window = static_cast<uint64_t>(in.imm);
  set_predicate(w, in.r[0], mask, lane_mask([&](int l) {
                  const uint64_t a = w.at<uint64_t>(in.r[1])[l] & kWindowMask;
                  return window != 0 ? a == window : a != kSharedWindow && a != kLocalWindow;
                }));
}

void decode_isspacep(Decoder& d) {
  const int space = d.take_one_of({"global", "shared", "local", "shared::cta"});
  d.expect(2);
  d.dst(0, Type::kPred);
  d.src(1, Type::kU64);
  d.out.imm = static_cast<int64_t>(window_of(space == 3 ? 1 : space));
  d.out.klass = Class::kCompare;
  d.out.run = &is_space;
}

void nothing(Warp&, const Instr&, uint32_t) {}

// The memory model is sequentially consistent, so fences move no data; the check of races between
// CTAs wants one before a relaxed access that hands on what was stored.
void fence(Warp& w, const Instr&, uint32_t) {
  if (w.launch->order != nullptr) w.launch->order->fence(w);
}

void decode_membar(Decoder& d) {
  const int scope = d.take_one_of({"cta", "gl", "sys"});
  d.expect(0);
  d.out.klass = Class::kFence;
  d.out.run = scope == 0 ? &nothing : &fence;
}

void decode_fence(Decoder& d) {
  d.take_optional({"sc", "acq_rel"});
  const int scope = d.take_one_of({"cta", "cluster", "gpu", "sys"});
  d.expect(0);
  d.out.klass = Class::kFence;
  d.out.run = scope < 2 ? &nothing : &fence;
}

void decode_nanosleep(Decoder& d) {
  d.take_type({Type::kU32});
  d.expect(1);
  d.src(0, Type::kU32);
  d.out.klass = Class::kControl;
  d.out.run = &nothing;
}

void decode_prefetch(Decoder& d) {
  d.take_optional({"global", "local"});
  d.take_one_of({"L1", "L2"});
  d.expect(1);
  d.address(0, Space::kGeneric);
  d.out.klass = Class::kMove;
  d.out.run = &nothing;
}

}  // namespace

void add_move_opcodes(OpcodeTable* table) {
  (*table)["mov"] = decode_mov;
  (*table)["cvta"] = decode_cvta;
  (*table)["isspacep"] = decode_isspacep;
  (*table)["membar"] = decode_membar;
  (*table)["fence"] = decode_fence;
  (*table)["nanosleep"] = decode_nanosleep;
  (*table)["prefetch"] = decode_prefetch;
}

}  // namespace emulator
}  // namespace llmkern
