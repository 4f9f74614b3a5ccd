// mma.sync: D = A B + C on fragments spread over the warp.
//
// Lane l is in group g = l / 4 at place t = l % 4. With E elements of A and B in a 32-bit register:
// register r of A holds row g (+ 8 if r is odd, in 16-row shapes) and columns t * E + (0 .. E-1),
// + 4 * E in the second half of the registers; register r of B holds rows t * E + (0 .. E-1) + 4 *
// E * r of column g; C and D hold columns 2t, 2t + 1 of row g, then of row g + 8. Products of the
// 16- and 8-bit and tf32 formats are exact in f32; they are added in f32, k ascending, where the
// hardware adds in an order and width of its own: equal to a tolerance.
#include <cstring>

#include "decode.h"
#include "formats.h"
#include "lanes.h"
#include "shuffle.h"

namespace llmkern {
namespace emulator {
namespace {

constexpr int kN = 8, kMaxM = 16, kMaxK = 32;

struct Tile {  // of integers
  int32_t a[kMaxM][kMaxK];
  int32_t b[kMaxK][kN];
  int32_t c[kMaxM][kN];
};

struct Shape {
  int m, k;
};
Shape shape_of(const Instr& in) {
  return {static_cast<int>(in.mode >> 8 & 0xff), static_cast<int>(in.mode & 0xff)};
}

// Element formats: kCount in a register, one at a time as T.
struct Half {
  static constexpr int kCount = 2;
  static float at(uint32_t v, int i) { return half_to_float(static_cast<uint16_t>(v >> (16 * i))); }
};
struct Bfloat {
  static constexpr int kCount = 2;
  static float at(uint32_t v, int i) { return bits_as<float>(i == 0 ? v << 16 : v & 0xffff0000u); }
};
struct Tf32 {  // the low 13 bits are not looked at
  static constexpr int kCount = 1;
  static float at(uint32_t v, int) { return bits_as<float>(v & 0xffffe000u); }
};
struct Signed8 {
  static constexpr int kCount = 4;
  static int32_t at(uint32_t v, int i) { return static_cast<int8_t>(v >> (8 * i)); }
};
struct Unsigned8 {
  static constexpr int kCount = 4;
  static int32_t at(uint32_t v, int i) { return static_cast<uint8_t>(v >> (8 * i)); }
};
template <int kExponent>
struct Float8 {
  static constexpr int kCount = 4;
  static float at(uint32_t v, int i) {
    return static_cast<float>(decode(v >> (8 * i) & 0xffu, kExponent == 4 ? kE4m3 : kE5m2));
  }
};

template <class F>
void read_a(Warp& w, const uint32_t* r, Shape s, Tile* tile) {
  const int tall = s.m / 8, registers = tall * s.k / (4 * F::kCount);
  for (int i = 0; i < registers; ++i) {
    const uint32_t* v = w.at<uint32_t>(r[i]);
    const int row = i % tall * 8, column = i / tall * 4 * F::kCount;
    for (int g = 0; g < 8; ++g) {
      int32_t* to = tile->a[row + g] + column;
      for (int t = 0; t < 4; ++t) {
        for (int e = 0; e < F::kCount; ++e) to[t * F::kCount + e] = F::at(v[4 * g + t], e);
      }
    }
  }
}

template <class F>
void read_b(Warp& w, const uint32_t* r, Shape s, Tile* tile) {
  const int registers = s.k / (4 * F::kCount);
  for (int i = 0; i < registers; ++i) {
    const uint32_t* v = w.at<uint32_t>(r[i]);
    for (int t = 0; t < 4; ++t) {
      for (int e = 0; e < F::kCount; ++e) {
        int32_t* to = tile->b[(4 * i + t) * F::kCount + e];
        for (int g = 0; g < 8; ++g) to[g] = F::at(v[4 * g + t], e);
      }
    }
  }
}

// Two registers of C interleave to rows: lanes 4g .. 4g + 3 hold the 8 columns of row g.
template <class T>
inline void read_c(Warp& w, const uint32_t* r, Shape s, T (*rows)[kN]) {
  for (int half = 0; half < s.m / 8; ++half) {
    const T *even = w.at<T>(r[2 * half]), *odd = w.at<T>(r[2 * half + 1]);
    T* c = rows[8 * half];
    for (int l = 0; l < kLanes; ++l) {
      c[2 * l] = even[l];
      c[2 * l + 1] = odd[l];
    }
  }
}
template <class T>
inline void write_d(Warp& w, const uint32_t* r, Shape s, const T (*rows)[kN]) {
  for (int half = 0; half < s.m / 8; ++half) {
    T *even = w.at<T>(r[2 * half]), *odd = w.at<T>(r[2 * half + 1]);
    const T* c = rows[8 * half];
    for (int l = 0; l < kLanes; ++l) {
      even[l] = c[2 * l];
      odd[l] = c[2 * l + 1];
    }
  }
}
// C and D of f16: a pair in a register.
void read_c_half(Warp& w, const uint32_t* r, float (*c)[kN]) {
  for (int i = 0; i < 2; ++i) {
    const uint32_t* v = w.at<uint32_t>(r[i]);
    for (int l = 0; l < kLanes; ++l) {
      for (int e = 0; e < 2; ++e) c[i * 8 + l / 4][l % 4 * 2 + e] = Half::at(v[l], e);
    }
  }
}
void write_d_half(Warp& w, const uint32_t* r, const float (*c)[kN]) {
  for (int i = 0; i < 2; ++i) {
    uint32_t* v = w.at<uint32_t>(r[i]);
    for (int l = 0; l < kLanes; ++l) {
      const float* pair = &c[i * 8 + l / 4][l % 4 * 2];
      v[l] = float_to_half(pair[0]) | uint32_t{float_to_half(pair[1])} << 16;
    }
  }
}

using Row = float __attribute__((vector_size(kN * sizeof(float))));
using Words = uint32_t __attribute__((vector_size(8 * sizeof(uint32_t))));

// Lane 4g + t to word g of row t.
inline __attribute__((always_inline)) void transpose(const uint32_t* v, Words* rows) {
  Words r[4];  // lanes of g = 2i, then of g = 2i + 1
  std::memcpy(r, v, sizeof r);
  Words half[4];  // t = 0 and 1 of g < 4 and of the others, then t = 2 and 3
  for (int i = 0; i < 2; ++i) {
    shuffle<0, 8, 1, 9, 4, 12, 5, 13>(r[2 * i], r[2 * i + 1], &half[i]);
    shuffle<2, 10, 3, 11, 6, 14, 7, 15>(r[2 * i], r[2 * i + 1], &half[2 + i]);
  }
  for (int i = 0; i < 2; ++i) {
    const Words &a = half[2 * i], &b = half[2 * i + 1];
    Words row;
    shuffle<0, 1, 8, 9, 4, 5, 12, 13>(a, b, &row);
    shuffle<0, 4, 1, 5, 2, 6, 3, 7>(row, row, &rows[2 * i]);
    shuffle<2, 3, 10, 11, 6, 7, 14, 15>(a, b, &row);
    shuffle<0, 4, 1, 5, 2, 6, 3, 7>(row, row, &rows[2 * i + 1]);
  }
}

// Operands of a 16-row product. A stays in lanes: (row g, column t) of register r, element e, is
// a[r][e][4g + t].
struct Product {
  alignas(64) float a[4][4][kLanes];
  alignas(64) float b[kMaxK][kN];
  alignas(64) float c[kMaxM][kN];
};

// Eight rows at a time: their sums stay in registers. Same operations in the same order on every
// host, no contraction to fma.
template <class F>
inline __attribute__((always_inline)) void multiply(Warp& w, const uint32_t* a, const uint32_t* b,
                                                    Product* p, int columns) {
  for (int i = 0; i < 2 * columns; ++i) {
    const uint32_t* v = w.at<uint32_t>(a[i]);
    for (int e = 0; e < F::kCount; ++e) {
      for (int l = 0; l < kLanes; ++l) p->a[i][e][l] = F::at(v[l], e);
    }
  }
  for (int i = 0; i < columns; ++i) {
    Words rows[4];
    transpose(w.at<uint32_t>(b[i]), rows);
    for (int t = 0; t < 4; ++t) {
      const uint32_t* v = reinterpret_cast<const uint32_t*>(&rows[t]);
#pragma GCC unroll 4
      for (int e = 0; e < F::kCount; ++e) {
        for (int g = 0; g < kN; ++g) p->b[(4 * i + t) * F::kCount + e][g] = F::at(v[g], e);
      }
    }
  }
  for (int half = 0; half < 2; ++half) {
    Row* c = reinterpret_cast<Row*>(p->c[8 * half]);
    Row s0 = c[0], s1 = c[1], s2 = c[2], s3 = c[3], s4 = c[4], s5 = c[5], s6 = c[6], s7 = c[7];
    const Row* row = reinterpret_cast<const Row*>(p->b);
    for (int i = 0; i < columns; ++i) {
      for (int t = 0; t < 4; ++t) {
        for (int e = 0; e < F::kCount; ++e, ++row) {
          const float* v = p->a[2 * i + half][e] + t;
          s0 += v[0] * *row;
          s1 += v[4] * *row;
          s2 += v[8] * *row;
          s3 += v[12] * *row;
          s4 += v[16] * *row;
          s5 += v[20] * *row;
          s6 += v[24] * *row;
          s7 += v[28] * *row;
        }
      }
    }
    c[0] = s0, c[1] = s1, c[2] = s2, c[3] = s3, c[4] = s4, c[5] = s5, c[6] = s6, c[7] = s7;
  }
}

// r: D, A, B, C; imm: registers of D (and C) and of A.
struct Registers {
  const uint32_t *d, *a, *b, *c;
};
Registers registers_of(const Instr& in) {
  const auto n = static_cast<int>(in.imm & 0xff), na = static_cast<int>(in.imm >> 8 & 0xff);
  return {in.r, in.r + n, in.r + n + na, in.r + in.operands - n};
}

template <class F, bool kHalfC>
inline __attribute__((always_inline)) void mma_body(Warp& w, const Instr& in) {
  const Shape s = shape_of(in);
  const Registers r = registers_of(in);
  Product p;
  kHalfC ? read_c_half(w, r.c, p.c) : read_c(w, r.c, s, p.c);
  multiply<F>(w, r.a, r.b, &p, s.k / (4 * F::kCount));
  kHalfC ? write_d_half(w, r.d, p.c) : write_d(w, r.d, s, p.c);
}
template <class F, bool kHalfC>
void mma_plain(Warp& w, const Instr& in, uint32_t) {
  mma_body<F, kHalfC>(w, in);
}
#if defined(__x86_64__)
template <class F, bool kHalfC>
__attribute__((target("avx2"))) void mma_wide(Warp& w, const Instr& in, uint32_t) {
  mma_body<F, kHalfC>(w, in);
}
#endif
template <class F, bool kHalfC = false>
Handler mma_float() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2")) return &mma_wide<F, kHalfC>;
#endif
  return &mma_plain<F, kHalfC>;
}

template <class A, class B>
void mma_integer(Warp& w, const Instr& in, uint32_t) {
  const Shape s = shape_of(in);
  const Registers r = registers_of(in);
  Tile tile;
  read_a<A>(w, r.a, s, &tile);
  read_b<B>(w, r.b, s, &tile);
  read_c(w, r.c, s, tile.c);
  for (int i = 0; i < s.m; ++i) {
    for (int j = 0; j < kN; ++j) {
      int64_t sum = tile.c[i][j];
      for (int k = 0; k < s.k; ++k) sum += tile.a[i][k] * tile.b[k][j];
      if (in.bytes != 0) sum = std::min<int64_t>(std::max<int64_t>(sum, INT32_MIN), INT32_MAX);
      tile.c[i][j] = static_cast<int32_t>(sum);
    }
  }
  write_d(w, r.d, s, tile.c);
}

// m8n8k4 with one double a lane of A and B, two of C.
void mma_double(Warp& w, const Instr& in, uint32_t) {
  const double *a = w.at<double>(in.r[2]), *b = w.at<double>(in.r[3]);
  double d[2][kLanes];
  for (int l = 0; l < kLanes; ++l) {
    for (int e = 0; e < 2; ++e) {
      d[e][l] = w.at<double>(in.r[4 + e])[l];
      for (int k = 0; k < 4; ++k)
        d[e][l] = std::fma(a[l / 4 * 4 + k], b[(l % 4 * 2 + e) * 4 + k], d[e][l]);
    }
  }
  for (int e = 0; e < 2; ++e) std::memcpy(w.at<double>(in.r[e]), d[e], sizeof d[e]);
}

struct Form {
  const char* a;  // types as written
  const char* b;
  const char* result;                       // of D and C
  int count;                                // elements in a register of A and B
  std::vector<std::pair<int, int>> shapes;  // (m, k)
  Handler run;
};

const std::vector<Form>& forms() {
  using S8 = Signed8;
  using U8 = Unsigned8;
  static const std::vector<Form> all = {
      {"bf16", "bf16", "f32", 2, {{16, 16}, {16, 8}}, mma_float<Bfloat>()},
      {"f16", "f16", "f32", 2, {{16, 16}, {16, 8}}, mma_float<Half>()},
      {"f16", "f16", "f16", 2, {{16, 16}, {16, 8}}, mma_float<Half, true>()},
      {"tf32", "tf32", "f32", 1, {{16, 8}, {16, 4}}, mma_float<Tf32>()},
      {"s8", "s8", "s32", 4, {{16, 32}, {16, 16}, {8, 16}}, &mma_integer<S8, S8>},
      {"s8", "u8", "s32", 4, {{16, 32}, {16, 16}, {8, 16}}, &mma_integer<S8, U8>},
      {"u8", "s8", "s32", 4, {{16, 32}, {16, 16}, {8, 16}}, &mma_integer<U8, S8>},
      {"u8", "u8", "s32", 4, {{16, 32}, {16, 16}, {8, 16}}, &mma_integer<U8, U8>},
      {"e4m3", "e4m3", "f32", 4, {{16, 32}}, mma_float<Float8<4>>()},
      {"e5m2", "e5m2", "f32", 4, {{16, 32}}, mma_float<Float8<5>>()},
  };
  return all;
}

Shape take_shape(Decoder& d) {
  static const std::pair<const char*, Shape> shapes[] = {
      {"m16n8k16", {16, 16}}, {"m16n8k8", {16, 8}}, {"m16n8k4", {16, 4}},
      {"m16n8k32", {16, 32}}, {"m8n8k16", {8, 16}}, {"m8n8k4", {8, 4}}};
  for (const auto& entry : shapes) {
    if (d.take(entry.first)) return entry.second;
  }
  d.fail("unknown shape ." + d.peek());
}

void append(Decoder& d, int i, int n, Type t, bool destination) {
  const Operand& o = d.operand(i);
  const std::vector<Operand> one = {o};
  const std::vector<Operand>& parts = o.kind == Operand::kVector ? d.vector(i, n) : one;
  if (static_cast<int>(parts.size()) != n)
    d.fail("operand " + std::to_string(i) + " must be a vector of " + std::to_string(n));
  for (const Operand& part : parts) destination ? d.dst(part, t) : d.src(part, t);
}

void decode_double(Decoder& d) {
  for (int i = 0; i < 4; ++i) d.take_type({Type::kF64});
  d.expect(4);
  append(d, 0, 2, Type::kF64, true);
  append(d, 1, 1, Type::kF64, false);
  append(d, 2, 1, Type::kF64, false);
  append(d, 3, 2, Type::kF64, false);
  d.out.run = &mma_double;
}

void decode_form(Decoder& d, const Form& form, Shape s, bool saturate) {
  d.expect(4);
  const bool half_c = std::string(form.result) == "f16";
  const int registers_d = s.m / (half_c ? 8 : 4), registers_a = s.m / 8 * s.k / (4 * form.count);
  append(d, 0, registers_d, Type::kB32, true);
  append(d, 1, registers_a, Type::kB32, false);
  append(d, 2, s.k / (4 * form.count), Type::kB32, false);
  append(d, 3, registers_d, Type::kB32, false);
  d.out.mode = static_cast<uint32_t>(s.m << 8 | s.k);
  d.out.imm = registers_d | registers_a << 8;
  d.out.bytes = saturate;
  d.out.run = form.run;
}

void decode_mma(Decoder& d) {
  d.take_one_of({"sync"});
  d.take_one_of({"aligned"});
  const Shape s = take_shape(d);
  d.take_one_of({"row"});
  d.take_one_of({"col"});
  d.out.kind = Kind::kAligned;
  d.out.klass = Class::kMatrix;
  if (s.m == 8 && s.k == 4) return decode_double(d);
  const bool saturate = d.take("satfinite");
  if (d.peek() == "f32" || d.peek() == "f16" || d.peek() == "s32") {
    const std::string result = d.peek();
    d.take(result.c_str());
    const std::string a = d.peek();
    d.take(a.c_str());
    const std::string b = d.peek();
    d.take(b.c_str());
    if (!d.take(result.c_str())) d.fail("C and D of different types are not known");
    for (const Form& form : forms()) {
      if (a != form.a || b != form.b || result != form.result) continue;
      for (const auto& shape : form.shapes) {
        if (shape.first != s.m || shape.second != s.k) continue;
        if (saturate && result != "s32") d.fail(".satfinite is for integers");
        return decode_form(d, form, s, saturate);
      }
    }
  }
  d.fail("this shape and these types are not known together");
}

}  // namespace

void add_mma_opcodes(OpcodeTable* table) { (*table)["mma"] = decode_mma; }

}  // namespace emulator
}  // namespace llmkern
