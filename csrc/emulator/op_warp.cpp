// Exchange between the lanes of a warp: shfl vote match redux activemask elect.
#include "op_warp.h"

#include <algorithm>

#include "decode.h"
#include "lanes.h"

namespace llmkern {
namespace emulator {
namespace {

enum ShuffleMode { kUp, kDown, kButterfly, kIndex };

// Where a lane reads, and whether that is inside its segment.
struct Source {
  int lane;
  bool inside;
};
Source source_of(uint32_t mode, int lane, uint32_t b, uint32_t c) {
  const int bval = static_cast<int>(b & 31), cval = static_cast<int>(c & 31),
            segment = static_cast<int>(c >> 8 & 31);
  const int last = (lane & segment) | (cval & ~segment), first = lane & segment;
  int j = 0;
  bool inside = false;
  switch (mode) {
    case kUp:
      j = lane - bval;
      inside = j >= last;
      break;
    case kDown:
      j = lane + bval;
      inside = j <= last;
      break;
    case kButterfly:
      j = lane ^ bval;
      inside = j <= last;
      break;
    default:
      j = first | (bval & ~segment);
      inside = j <= last;
      break;
  }
  return {inside ? j : lane, inside};
}

void shfl(Warp& w, const Instr& in, uint32_t mask) {
  const int s = in.destinations;
  uint32_t value[kLanes], inside = 0;
  const uint32_t* a = w.at<uint32_t>(in.r[s]);
  const uint32_t *b = w.at<uint32_t>(in.r[s + 1]), *c = w.at<uint32_t>(in.r[s + 2]);
  if (in.imm != 0 && mask == kAllLanes) {  // a constant butterfly over the whole warp
    const auto step = static_cast<int>(in.imm);
    for (int l = 0; l < kLanes; ++l) value[l] = a[l ^ step];
    std::copy(value, value + kLanes, w.at<uint32_t>(in.r[0]));
    return;
  }
  for_lanes(mask, [&](int l) {
    const Source from = source_of(in.mode, l, b[l], c[l]);
    if ((mask >> from.lane & 1) == 0 && (w.alive >> from.lane & 1) != 0 && w.options->collectives) {
      throw Fault{
          "divergent collective",
          "shfl reads lane " + std::to_string(from.lane) + ", which is not in the member mask", l,
          -1};
    }
    value[l] = a[from.lane];
    inside |= uint32_t{from.inside} << l;
  });
  uint32_t* d = w.at<uint32_t>(in.r[0]);
  for_lanes(mask, [&](int l) { d[l] = value[l]; });
  if (in.destinations > 1) set_predicate(w, in.r[1], mask, inside);
}

void decode_shfl(Decoder& d) {
  d.take_one_of({"sync"});
  const int mode = d.take_one_of({"up", "down", "bfly", "idx"});
  d.take_type({Type::kB32});
  d.expect(5);
  Operand first = d.operand(0);
  const std::vector<Operand> second = first.parts;
  first.parts.clear();
  d.dst(first, Type::kB32);
  if (!second.empty()) d.dst(second[0], Type::kPred);
  for (int i = 1; i <= 3; ++i) d.src(i, Type::kB32);
  d.members(4);
  d.out.mode = static_cast<uint32_t>(mode);
  const Operand &step = d.operand(2), &clamp = d.operand(3);
  const bool constant = step.kind == Operand::kInteger && clamp.kind == Operand::kInteger;
  if (mode == kButterfly && second.empty() && constant && clamp.bits == 31 && step.bits < kLanes) {
    d.out.imm = static_cast<int64_t>(step.bits);
  }
  d.out.kind = Kind::kCollective;
  d.out.klass = Class::kExchange;
  d.out.track = Track::kShuffle;
  d.out.run = &shfl;
}

template <int kVote>  // 0 all, 1 any, 2 uni, 3 ballot
void vote(Warp& w, const Instr& in, uint32_t mask) {
  const uint32_t p = in.mode != 0 ? ~w.predicate(in.r[1]) : w.predicate(in.r[1]);
  const uint32_t yes = p & mask;
  if (kVote == 3) {
    for_lanes(mask, [&](int l) { w.at<uint32_t>(in.r[0])[l] = yes; });
    return;
  }
  const bool result = kVote == 0 ? yes == mask : kVote == 1 ? yes != 0 : yes == 0 || yes == mask;
  set_predicate(w, in.r[0], mask, result ? kAllLanes : 0);
}

void decode_vote(Decoder& d) {
  d.take_one_of({"sync"});
  const int what = d.take_one_of({"all", "any", "uni", "ballot"});
  const Type t = what == 3 ? d.take_type({Type::kB32}) : d.take_type({Type::kPred});
  d.expect(3);
  d.dst(0, t);
  Operand p = d.operand(1);
  d.out.mode = p.negated;
  p.negated = false;
  d.src(p, Type::kPred);
  d.members(2);
  d.out.kind = Kind::kCollective;
  d.out.klass = Class::kExchange;
  const Handler votes[] = {&vote<0>, &vote<1>, &vote<2>, &vote<3>};
  d.out.run = votes[what];
}

template <class T, bool kAll>
void match(Warp& w, const Instr& in, uint32_t mask) {
  const T* a = w.at<T>(in.r[in.destinations]);
  uint32_t result[kLanes];
  for_lanes(mask, [&](int l) {
    uint32_t same = 0;
    for_lanes(mask, [&](int o) { same |= uint32_t{a[o] == a[l]} << o; });
    result[l] = kAll ? (same == mask ? mask : 0) : same;
  });
  uint32_t all = 0;
  for_lanes(mask, [&](int l) {
    w.at<uint32_t>(in.r[0])[l] = result[l];
    all |= uint32_t{result[l] == mask} << l;
  });
  if (in.destinations > 1) set_predicate(w, in.r[1], mask, all);
}

void decode_match(Decoder& d) {
  const bool all = d.take_one_of({"any", "all"}) == 1;
  d.take_one_of({"sync"});
  const Type t = d.take_type({Type::kB32, Type::kB64});
  d.expect(3);
  Operand first = d.operand(0);
  const std::vector<Operand> second = first.parts;
  first.parts.clear();
  d.dst(first, Type::kB32);
  if (!second.empty() && !all) d.fail("a predicate comes with .all only");
  if (!second.empty()) d.dst(second[0], Type::kPred);
  d.src(1, t);
  d.members(2);
  d.out.kind = Kind::kCollective;
  d.out.klass = Class::kExchange;
  d.out.run = t == Type::kB32 ? (all ? &match<uint32_t, true> : &match<uint32_t, false>)
                              : (all ? &match<uint64_t, true> : &match<uint64_t, false>);
}

template <class T, int kOp>  // add min max and or xor
void redux(Warp& w, const Instr& in, uint32_t mask) {
  const T* a = w.at<T>(in.r[1]);
  T r = a[__builtin_ctz(mask)];
  for_lanes(mask & (mask - 1), [&](int l) {
    r = kOp == 0   ? static_cast<T>(static_cast<uint32_t>(r) + static_cast<uint32_t>(a[l]))
        : kOp == 1 ? std::min(r, a[l])
        : kOp == 2 ? std::max(r, a[l])
        : kOp == 3 ? r & a[l]
        : kOp == 4 ? r | a[l]
                   : r ^ a[l];
  });
  for_lanes(mask, [&](int l) { w.at<T>(in.r[0])[l] = r; });
}

void decode_redux(Decoder& d) {
  d.take_one_of({"sync"});
  const int op = d.take_one_of({"add", "min", "max", "and", "or", "xor"});
  const Type t = op < 3 ? d.take_type({Type::kU32, Type::kS32}) : d.take_type({Type::kB32});
  d.expect(3);
  d.dst(0, t);
  d.src(1, t);
  d.members(2);
  d.out.kind = Kind::kCollective;
  d.out.klass = Class::kExchange;
  const Handler plain[] = {&redux<uint32_t, 0>, &redux<uint32_t, 1>, &redux<uint32_t, 2>,
                           &redux<uint32_t, 3>, &redux<uint32_t, 4>, &redux<uint32_t, 5>};
  const Handler with_sign[] = {&redux<int32_t, 0>, &redux<int32_t, 1>, &redux<int32_t, 2>};
  d.out.run = t == Type::kS32 ? with_sign[op] : plain[op];
}

void active_mask(Warp& w, const Instr& in, uint32_t mask) {
  for_lanes(mask, [&](int l) { w.at<uint32_t>(in.r[0])[l] = mask; });
}

void decode_activemask(Decoder& d) {
  d.take_type({Type::kB32});
  d.expect(1);
  d.dst(0, Type::kB32);
  d.out.klass = Class::kExchange;
  d.out.run = &active_mask;
}

// The lowest lane of the member mask is the leader.
void elect(Warp& w, const Instr& in, uint32_t mask) {
  const int leader = __builtin_ctz(mask);
  for_lanes(mask, [&](int l) { w.at<uint32_t>(in.r[0])[l] = static_cast<uint32_t>(leader); });
  set_predicate(w, in.r[1], mask, 1u << leader);
}

void decode_elect(Decoder& d) {
  d.take_one_of({"sync"});
  d.expect(2);
  Operand first = d.operand(0);
  if (first.parts.size() != 1) d.fail("the destination must be lane|predicate");
  const Operand second = first.parts[0];
  first.parts.clear();
  d.dst(first, Type::kB32);
  d.dst(second, Type::kPred);
  d.members(1);
  d.out.kind = Kind::kCollective;
  d.out.klass = Class::kExchange;
  d.out.run = &elect;
}

}  // namespace

void shuffle_sources(Warp& w, const Instr& in, uint32_t mask, uint8_t* from) {
  const int s = in.destinations;
  const uint32_t *b = w.at<uint32_t>(in.r[s + 1]), *c = w.at<uint32_t>(in.r[s + 2]);
  for_lanes(mask,
            [&](int l) { from[l] = static_cast<uint8_t>(source_of(in.mode, l, b[l], c[l]).lane); });
}

void add_warp_opcodes(OpcodeTable* table) {
  (*table)["shfl"] = decode_shfl;
  (*table)["vote"] = decode_vote;
  (*table)["match"] = decode_match;
  (*table)["redux"] = decode_redux;
  (*table)["activemask"] = decode_activemask;
  (*table)["elect"] = decode_elect;
}

}  // namespace emulator
}  // namespace llmkern
