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

namespace llmkern {
namespace emulator {
namespace {

constexpr int kN = 8, kMaxM = 16, kMaxK = 32;

template <class T>
struct Tile {
  alignas(64) T a[kMaxM][kMaxK];
  alignas(64) T b[kMaxK][kN];
  alignas(64) T c[kMaxM][kN];
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

template <class F, class T>
void read_a(Warp& w, const uint32_t* r, Shape s, Tile<T>* tile) {
  const int tall = s.m / 8, registers = tall * s.k / (4 * F::kCount);
  for (int i = 0; i < registers; ++i) {
    const uint32_t* v = w.at<uint32_t>(r[i]);
    const int row = i % tall * 8, column = i / tall * 4 * F::kCount;
    for (int g = 0; g < 8; ++g) {
      T* to = tile->a[row + g] + column;
      for (int t = 0; t < 4; ++t) {
        for (int e = 0; e < F::kCount; ++e) to[t * F::kCount + e] = F::at(v[4 * g + t], e);
      }
    }
  }
}

template <class F, class T>
void read_b(Warp& w, const uint32_t* r, Shape s, Tile<T>* tile) {
  const int registers = s.k / (4 * F::kCount);
  for (int i = 0; i < registers; ++i) {
    const uint32_t* v = w.at<uint32_t>(r[i]);
    for (int t = 0; t < 4; ++t) {
      for (int e = 0; e < F::kCount; ++e) {
        T* to = tile->b[(4 * i + t) * F::kCount + e];
        for (int g = 0; g < 8; ++g) to[g] = F::at(v[4 * g + t], e);
      }
    }
  }
}

// Two registers of C interleave to rows: lanes 4g .. 4g + 3 hold the 8 columns of row g.
template <class T>
void read_c(Warp& w, const uint32_t* r, Shape s, Tile<T>* tile) {
  for (int half = 0; half < s.m / 8; ++half) {
    const T *even = w.at<T>(r[2 * half]), *odd = w.at<T>(r[2 * half + 1]);
    T* c = tile->c[8 * half];
    for (int l = 0; l < kLanes; ++l) {
      c[2 * l] = even[l];
      c[2 * l + 1] = odd[l];
    }
  }
}
template <class T>
void write_d(Warp& w, const uint32_t* r, Shape s, const Tile<T>& tile) {
  for (int half = 0; half < s.m / 8; ++half) {
    T *even = w.at<T>(r[2 * half]), *odd = w.at<T>(r[2 * half + 1]);
    const T* c = tile.c[8 * half];
    for (int l = 0; l < kLanes; ++l) {
      even[l] = c[2 * l];
      odd[l] = c[2 * l + 1];
    }
  }
}
// C and D of f16: a pair in a register.
void read_c_half(Warp& w, const uint32_t* r, Shape s, Tile<float>* tile) {
  for (int i = 0; i < s.m / 8; ++i) {
    const uint32_t* v = w.at<uint32_t>(r[i]);
    for (int l = 0; l < kLanes; ++l) {
      for (int e = 0; e < 2; ++e) tile->c[i * 8 + l / 4][l % 4 * 2 + e] = Half::at(v[l], e);
    }
  }
}
void write_d_half(Warp& w, const uint32_t* r, Shape s, const Tile<float>& tile) {
  for (int i = 0; i < s.m / 8; ++i) {
    uint32_t* v = w.at<uint32_t>(r[i]);
    for (int l = 0; l < kLanes; ++l) {
      const float* c = &tile.c[i * 8 + l / 4][l % 4 * 2];
      v[l] = float_to_half(c[0]) | uint32_t{float_to_half(c[1])} << 16;
    }
  }
}

// Eight rows at a time: their sums stay in registers. Same operations in the same order on every
// host, no contraction to fma.
using Row = float __attribute__((vector_size(kN * sizeof(float))));

inline __attribute__((always_inline)) void multiply_body(Tile<float>* t, Shape s) {
  for (int top = 0; top < s.m; top += 8) {
    Row sum[8];
    std::memcpy(sum, t->c[top], sizeof sum);
    for (int k = 0; k < s.k; ++k) {
      Row b;
      std::memcpy(&b, t->b[k], sizeof b);
      for (int i = 0; i < 8; ++i) sum[i] += t->a[top + i][k] * b;
    }
    std::memcpy(t->c[top], sum, sizeof sum);
  }
}
#if defined(__x86_64__)
__attribute__((target("avx2"))) void multiply_wide(Tile<float>* t, Shape s) { multiply_body(t, s); }
#endif
void multiply_plain(Tile<float>* t, Shape s) { multiply_body(t, s); }

void multiply(Tile<float>* t, Shape s) {
#if defined(__x86_64__)
  static const auto run = __builtin_cpu_supports("avx2") ? &multiply_wide : &multiply_plain;
#else
  static const auto run = &multiply_plain;
#endif
  run(t, s);
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
void mma_float(Warp& w, const Instr& in, uint32_t) {
  const Shape s = shape_of(in);
  const Registers r = registers_of(in);
  Tile<float> tile;
  read_a<F>(w, r.a, s, &tile);
  read_b<F>(w, r.b, s, &tile);
  kHalfC ? read_c_half(w, r.c, s, &tile) : read_c(w, r.c, s, &tile);
  multiply(&tile, s);
  kHalfC ? write_d_half(w, r.d, s, tile) : write_d(w, r.d, s, tile);
}

template <class A, class B>
void mma_integer(Warp& w, const Instr& in, uint32_t) {
  const Shape s = shape_of(in);
  const Registers r = registers_of(in);
  Tile<int32_t> tile;
  read_a<A>(w, r.a, s, &tile);
  read_b<B>(w, r.b, s, &tile);
  read_c(w, r.c, s, &tile);
  for (int i = 0; i < s.m; ++i) {
    for (int j = 0; j < kN; ++j) {
      int64_t sum = tile.c[i][j];
      for (int k = 0; k < s.k; ++k) sum += tile.a[i][k] * tile.b[k][j];
      if (in.bytes != 0) sum = std::min<int64_t>(std::max<int64_t>(sum, INT32_MIN), INT32_MAX);
      tile.c[i][j] = static_cast<int32_t>(sum);
    }
  }
  write_d(w, r.d, s, tile);
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
      {"bf16", "bf16", "f32", 2, {{16, 16}, {16, 8}}, &mma_float<Bfloat, false>},
      {"f16", "f16", "f32", 2, {{16, 16}, {16, 8}}, &mma_float<Half, false>},
      {"f16", "f16", "f16", 2, {{16, 16}, {16, 8}}, &mma_float<Half, true>},
      {"tf32", "tf32", "f32", 1, {{16, 8}, {16, 4}}, &mma_float<Tf32, false>},
      {"s8", "s8", "s32", 4, {{16, 32}, {16, 16}, {8, 16}}, &mma_integer<S8, S8>},
      {"s8", "u8", "s32", 4, {{16, 32}, {16, 16}, {8, 16}}, &mma_integer<S8, U8>},
      {"u8", "s8", "s32", 4, {{16, 32}, {16, 16}, {8, 16}}, &mma_integer<U8, S8>},
      {"u8", "u8", "s32", 4, {{16, 32}, {16, 16}, {8, 16}}, &mma_integer<U8, U8>},
      {"e4m3", "e4m3", "f32", 4, {{16, 32}}, &mma_float<Float8<4>, false>},
      {"e5m2", "e5m2", "f32", 4, {{16, 32}}, &mma_float<Float8<5>, false>},
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
