// wmma m16n16k16 of f16, with accumulators in f32 or f16. The manual leaves open which lane holds
// what of a fragment; here lane l holds row l % 16 of A (column of B), all of it, so lanes 16 .. 31
// repeat the first ones, and of C and D columns 8 * (l / 16) .. + 7 of row l % 16.
#include <cstring>

#include "access.h"
#include "decode.h"
#include "formats.h"
#include "lanes.h"

namespace llmkern {
namespace emulator {
namespace {

constexpr int kSize = 16, kPairs = 8, kPart = 8;

constexpr uint32_t kColumn = 1, kOfB = 2, kHalf = 4, kHalfResult = 8;  // Instr::mode

// Where element (i, j) of a lane's fragment lies: i the lane's own row (or column), j along it.
uint64_t element(const Instr& in, uint64_t base, uint32_t stride, int i, int j, int bytes) {
  const bool along_rows = ((in.mode & kColumn) != 0) == ((in.mode & kOfB) != 0);
  const int64_t offset = along_rows ? int64_t{i} * stride + j : int64_t{j} * stride + i;
  return base + static_cast<uint64_t>(offset * bytes);
}

// r: registers, address, stride. Each element is an access of its own.
void load_halves(Warp& w, const Instr& in, uint32_t mask) {
  uint64_t base[kLanes], address[kLanes];
  char* from[kLanes];
  effective_addresses(w, in, base);
  const uint32_t* stride = w.at<uint32_t>(in.r[in.address + 1]);
  for (int j = 0; j < kSize; ++j) {
    for (int l = 0; l < kLanes; ++l) address[l] = element(in, base[l], stride[l], l % kSize, j, 2);
    resolve_read(w, in, mask, in.space, address, 2, from);
    for (int l = 0; l < kLanes; ++l)
      std::memcpy(w.at<uint16_t>(in.r[j / 2]) + 2 * l + j % 2, from[l], 2);
  }
}

template <bool kStore>
void accumulators(Warp& w, const Instr& in, uint32_t mask) {
  uint64_t base[kLanes], address[kLanes];
  char* at[kLanes];
  const bool half = (in.mode & kHalf) != 0;
  const int bytes = half ? 2 : 4;
  effective_addresses(w, in, base);
  const uint32_t* stride = w.at<uint32_t>(in.r[in.operands - 1]);
  for (int j = 0; j < kPart; ++j) {
    char* held = w.at<char>(in.r[(kStore ? 1 : 0) + (half ? j / 2 : j)]) + (half ? j % 2 * 2 : 0);
    for (int l = 0; l < kLanes; ++l)
      address[l] = element(in, base[l], stride[l], l % kSize, l / kSize * kPart + j, bytes);
    if (kStore) {
      resolve_write(w, in, mask, in.space, address, bytes, held, 4, at);
    } else {
      resolve_read(w, in, mask, in.space, address, bytes, at);
    }
    for (int l = 0; l < kLanes; ++l) {
      std::memcpy(kStore ? at[l] : held + 4 * l, kStore ? held + 4 * l : at[l],
                  static_cast<size_t>(bytes));
    }
  }
}

float accumulator(Warp& w, const Instr& in, int first, bool half, int l, int j) {
  if (!half) return w.at<float>(in.r[first + j])[l];
  return half_to_float(w.at<uint16_t>(in.r[first + j / 2])[2 * l + j % 2]);
}

void multiply(Warp& w, const Instr& in, uint32_t) {
  const bool half_d = (in.mode & kHalfResult) != 0, half_c = (in.mode & kHalf) != 0;
  const int a = in.destinations, b = a + kPairs, c = b + kPairs;
  float result[kPart][kLanes];
  for (int l = 0; l < kLanes; ++l) {
    for (int j = 0; j < kPart; ++j) {
      const int column = l / kSize * kPart + j;
      float sum = accumulator(w, in, c, half_c, l, j);
      for (int k = 0; k < kSize; ++k) {
        sum += half_to_float(w.at<uint16_t>(in.r[a + k / 2])[2 * l + k % 2]) *
               half_to_float(w.at<uint16_t>(in.r[b + k / 2])[2 * column + k % 2]);
      }
      result[j][l] = sum;
    }
  }
  for (int j = 0; j < kPart; ++j) {
    for (int l = 0; l < kLanes; ++l) {
      if (half_d) {
        w.at<uint16_t>(in.r[j / 2])[2 * l + j % 2] = float_to_half(result[j][l]);
      } else {
        w.at<float>(in.r[j])[l] = result[j][l];
      }
    }
  }
}

void registers(Decoder& d, int i, int n, bool destination) {
  for (const Operand& o : d.vector(i, n)) destination ? d.dst(o, Type::kB32) : d.src(o, Type::kB32);
}

void stride(Decoder& d, int i) {
  if (d.count() > i) return d.src(i, Type::kU32);
  d.append(d.builder->constant(kSize, 4), false);
}

void shape_and_space(Decoder& d) {
  d.take_one_of({"m16n16k16"});
  const int space = d.take_optional({"global", "shared", "shared::cta"});
  d.out.space = space < 0 ? Space::kGeneric : space == 0 ? Space::kGlobal : Space::kShared;
}

void decode_load(Decoder& d) {
  const int what = d.take_one_of({"a", "b", "c"});
  d.take_one_of({"sync"});
  d.take_one_of({"aligned"});
  d.out.mode = d.take_one_of({"row", "col"}) == 1 ? kColumn : 0u;
  shape_and_space(d);
  const Type t = what == 2 ? d.take_type({Type::kF32, Type::kF16}) : d.take_type({Type::kF16});
  d.expect(2, 3);
  const bool half_c = what == 2 && t == Type::kF16;
  registers(d, 0, half_c ? kPairs / 2 : kPairs, true);
  d.address(1, d.out.space);
  stride(d, 2);
  d.out.mode |= (what == 1 ? kOfB : 0u) | (half_c ? kHalf : 0u);
  d.out.klass = d.out.space == Space::kShared ? Class::kSharedLoad : Class::kGlobalLoad;
  d.out.run = what == 2 ? &accumulators<false> : &load_halves;
}

void decode_store(Decoder& d) {
  d.take_one_of({"d"});
  d.take_one_of({"sync"});
  d.take_one_of({"aligned"});
  d.out.mode = d.take_one_of({"row", "col"}) == 1 ? kColumn : 0u;
  shape_and_space(d);
  const Type t = d.take_type({Type::kF32, Type::kF16});
  d.expect(2, 3);
  d.address(0, d.out.space);
  registers(d, 1, t == Type::kF16 ? kPairs / 2 : kPairs, false);
  stride(d, 2);
  d.out.mode |= t == Type::kF16 ? kHalf : 0u;
  d.out.klass = d.out.space == Space::kShared ? Class::kSharedStore : Class::kGlobalStore;
  d.out.run = &accumulators<true>;
}

void decode_multiply(Decoder& d) {
  d.take_one_of({"sync"});
  d.take_one_of({"aligned"});
  d.take_one_of({"row", "col"});  // the layouts went into the loads
  d.take_one_of({"row", "col"});
  d.take_one_of({"m16n16k16"});
  const bool half_d = d.take_type({Type::kF32, Type::kF16}) == Type::kF16;
  const bool half_c = d.take_type({Type::kF32, Type::kF16}) == Type::kF16;
  d.expect(4);
  registers(d, 0, half_d ? kPairs / 2 : kPairs, true);
  registers(d, 1, kPairs, false);
  registers(d, 2, kPairs, false);
  registers(d, 3, half_c ? kPairs / 2 : kPairs, false);
  d.out.mode = (half_d ? kHalfResult : 0u) | (half_c ? kHalf : 0u);
  d.out.klass = Class::kMatrix;
  d.out.run = &multiply;
}

void decode_wmma(Decoder& d) {
  d.out.kind = Kind::kAligned;
  const int what = d.take_one_of({"load", "store", "mma"});
  what == 0 ? decode_load(d) : what == 1 ? decode_store(d) : decode_multiply(d);
}

}  // namespace

void add_wmma_opcodes(OpcodeTable* table) { (*table)["wmma"] = decode_wmma; }

}  // namespace emulator
}  // namespace llmkern
