// ldmatrix and stmatrix: 8x8 matrices of 16-bit elements, a row of 16 bytes at the address of each
// of lanes 8m .. 8m+7. Lane l holds elements (l / 4, 2 * (l % 4) + {0, 1}), or of the transpose.
#include <cstring>

#include "access.h"
#include "decode.h"
#include "lanes.h"
#include "shuffle.h"

namespace llmkern {
namespace emulator {
namespace {

constexpr int kRowBytes = 16;

using Matrix = uint16_t[8][8];

uint32_t row_lanes(const Instr& in) {
  return in.width == 4 ? kAllLanes : (1u << (8 * in.width)) - 1;
}

using Row = uint16_t __attribute__((vector_size(kRowBytes)));

// Rows of the transpose, one after the other: rows i and i + 4 interleaved, three times.
void transpose(const Matrix& matrix, uint32_t* to) {
  Row rows[8], next[8];
  std::memcpy(rows, matrix, sizeof rows);
  for (int step = 0; step < 3; ++step) {
    for (int i = 0; i < 4; ++i) {
      shuffle<0, 8, 1, 9, 2, 10, 3, 11>(rows[i], rows[i + 4], &next[2 * i]);
      shuffle<4, 12, 5, 13, 6, 14, 7, 15>(rows[i], rows[i + 4], &next[2 * i + 1]);
    }
    std::memcpy(rows, next, sizeof rows);
  }
  std::memcpy(to, rows, sizeof rows);
}

template <bool kTranspose>
void ldmatrix(Warp& w, const Instr& in, uint32_t) {
  uint64_t address[kLanes];
  char* from[kLanes];
  effective_addresses(w, in, address);
  resolve_read(w, in, row_lanes(in), in.space, address, kRowBytes, from);
  for (int m = 0; m < in.width; ++m) {
    // Element (i, j) of a matrix as it lies in memory goes to half j % 2 of lane 4i + j / 2: a row
    // is four lanes of the register as they are.
    uint32_t* d = w.at<uint32_t>(in.r[m]);
    Matrix matrix;
    for (int row = 0; row < 8; ++row) {
      void* to = kTranspose ? static_cast<void*>(matrix[row]) : d + 4 * row;
      std::memcpy(to, from[8 * m + row], kRowBytes);
    }
    if (kTranspose) transpose(matrix, d);
  }
}

template <bool kTranspose>
void stmatrix(Warp& w, const Instr& in, uint32_t) {
  uint64_t address[kLanes];
  char* to[kLanes];
  Matrix rows[4];
  for (int m = 0; m < in.width; ++m) {
    const uint32_t* s = w.at<uint32_t>(in.r[m + 1]);
    for (int l = 0; l < kLanes; ++l) {
      const int i = l / 4, j = 2 * (l % 4);
      (kTranspose ? rows[m][j][i] : rows[m][i][j]) = static_cast<uint16_t>(s[l]);
      (kTranspose ? rows[m][j + 1][i] : rows[m][i][j + 1]) = static_cast<uint16_t>(s[l] >> 16);
    }
  }
  effective_addresses(w, in, address);
  const char* data = reinterpret_cast<const char*>(rows);
  resolve_write(w, in, row_lanes(in), in.space, address, kRowBytes, data, kRowBytes, to);
  for (int l = 0; l < 8 * in.width; ++l) std::memcpy(to[l], data + l * kRowBytes, kRowBytes);
}

void decode_either(Decoder& d, bool loads) {
  d.take_one_of({"sync"});
  d.take_one_of({"aligned"});
  d.take_one_of({"m8n8"});
  const int count = 1 << d.take_one_of({"x1", "x2", "x4"});
  const bool transpose = d.take("trans");
  const bool shared = d.take_optional({"shared", "shared::cta"}) >= 0;
  d.take_type({Type::kB16});
  d.expect(2);
  d.out.space = shared ? Space::kShared : Space::kGeneric;
  d.out.width = static_cast<uint8_t>(count);
  d.out.bytes = kRowBytes;
  if (!loads) d.address(0, d.out.space);
  const Operand& registers = d.operand(loads ? 0 : 1);
  const std::vector<Operand> one = {registers};
  const std::vector<Operand>& parts =
      registers.kind == Operand::kVector ? d.vector(loads ? 0 : 1, count) : one;
  if (static_cast<int>(parts.size()) != count) d.fail("a vector of registers is needed");
  for (const Operand& part : parts) loads ? d.dst(part, Type::kB32) : d.src(part, Type::kB32);
  if (loads) d.address(1, d.out.space);
  d.out.kind = Kind::kAligned;
  d.out.klass = loads ? Class::kMatrixLoad : Class::kSharedStore;
  d.out.run = loads ? (transpose ? &ldmatrix<true> : &ldmatrix<false>)
                    : (transpose ? &stmatrix<true> : &stmatrix<false>);
}

}  // namespace

void add_ldmatrix_opcodes(OpcodeTable* table) {
  (*table)["ldmatrix"] = [](Decoder& d) { decode_either(d, true); };
  (*table)["stmatrix"] = [](Decoder& d) { decode_either(d, false); };
}

}  // namespace emulator
}  // namespace llmkern
