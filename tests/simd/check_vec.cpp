// Every operation of vec.h against scalar arithmetic, lane by lane, on ordinary, huge, tiny,
// infinite and NaN values; loads and stores of n lanes must touch n lanes.
#include "check.h"

namespace llmkern {
namespace LLMKERN_ISA {
namespace {

constexpr int kMost = 64;

// Values that cycle through the interesting ones, different for each `salt`.
template <class S>
void fill(S* x, int n, int salt) {
  const S values[] = {S(1),    S(-2.5), S(0),       S(-0.0),  S(HUGE_VAL), S(-HUGE_VAL), S(NAN),
                      S(1e30), S(-3e5), S(1e-30),   S(7),     S(0.3),      S(-1e-40),    S(65504),
                      S(1e-7), S(-1.5), S(3.14159), S(100.5), S(-99)};
  constexpr int kCount = sizeof(values) / sizeof(S);
  for (int i = 0; i < n; ++i) x[i] = values[(i * 7 + salt * 5) % kCount];
}

template <class S>
bool same(S a, S b) {
  return (std::isnan(a) && std::isnan(b)) || (a == b && std::signbit(a) == std::signbit(b));
}

template <class V, class F, class G>
void lanes(const char* name, const F& f, const G& scalar) {
  using S = typename V::Scalar;
  for (int salt = 0; salt < 40; ++salt) {
    S a[V::kLanes], b[V::kLanes], c[V::kLanes], y[V::kLanes];
    fill(a, V::kLanes, salt);
    fill(b, V::kLanes, salt * 3 + 1);
    fill(c, V::kLanes, salt / 2 + 2);
    f(V::load(a), V::load(b), V::load(c)).store(y);
    for (int i = 0; i < V::kLanes; ++i) {
      const S want = scalar(a[i], b[i], c[i]);
      if (!same(y[i], want)) fail(name, a[i], y[i], want);
    }
  }
}

template <class V, class F, class G>
void mask(const char* name, const F& f, const G& scalar) {
  using S = typename V::Scalar;
  for (int salt = 0; salt < 40; ++salt) {
    S a[V::kLanes], b[V::kLanes];
    fill(a, V::kLanes, salt);
    fill(b, V::kLanes, salt * 3 + 1);
    const auto m = f(V::load(a), V::load(b));
    uint32_t want = 0;
    for (int i = 0; i < V::kLanes; ++i) want |= static_cast<uint32_t>(scalar(a[i], b[i])) << i;
    const uint32_t all = (1u << V::kLanes) - 1u;
    if (m.bits() != want) fail(name, salt, m.bits(), want);
    if (m.any() != (want != 0) || m.all() != (want == all)) fail(name, salt, m.any(), m.all());
    if ((~m).bits() != (~want & all)) fail("~", salt, (~m).bits(), ~want & all);
  }
}

template <class V>
void check_arithmetic() {
  using S = typename V::Scalar;
  lanes<V>(
      "+", [](V a, V b, V) { return a + b; }, [](S a, S b, S) { return a + b; });
  lanes<V>(
      "-", [](V a, V b, V) { return a - b; }, [](S a, S b, S) { return a - b; });
  lanes<V>(
      "*", [](V a, V b, V) { return a * b; }, [](S a, S b, S) { return a * b; });
  lanes<V>(
      "/", [](V a, V b, V) { return a / b; }, [](S a, S b, S) { return a / b; });
  lanes<V>(
      "max", [](V a, V b, V) { return V::max(a, b); }, [](S a, S b, S) { return a > b ? a : b; });
  lanes<V>(
      "min", [](V a, V b, V) { return V::min(a, b); }, [](S a, S b, S) { return a < b ? a : b; });
  lanes<V>(
      "sqrt", [](V a, V, V) { return V::sqrt(a); }, [](S a, S, S) { return std::sqrt(a); });
  lanes<V>(
      "abs", [](V a, V, V) { return V::abs(a); }, [](S a, S, S) { return std::fabs(a); });
  lanes<V>(
      "neg", [](V a, V, V) { return V::neg(a); }, [](S a, S, S) { return -a; });
  lanes<V>(
      "select", [](V a, V b, V c) { return V::select(V::lt(a, b), b, c); },
      [](S a, S b, S c) { return a < b ? b : c; });
  lanes<V>(
      "keep", [](V a, V b, V c) { return V::keep(V::le(a, b), c); },
      [](S a, S b, S c) { return a <= b ? c : S(0); });
  lanes<V>(
      "set1", [](V, V, V) { return V::set1(S(2.5)); }, [](S, S, S) { return S(2.5); });
  lanes<V>(
      "zero", [](V, V, V) { return V::zero(); }, [](S, S, S) { return S(0); });
  mask<V>(
      "lt", [](V a, V b) { return V::lt(a, b); }, [](S a, S b) { return a < b; });
  mask<V>(
      "le", [](V a, V b) { return V::le(a, b); }, [](S a, S b) { return a <= b; });
  mask<V>(
      "eq", [](V a, V b) { return V::eq(a, b); }, [](S a, S b) { return a == b; });
  mask<V>(
      "&", [](V a, V b) { return V::lt(a, b) & V::lt(a, V::zero()); },
      [](S a, S b) { return a < b && a < 0; });
  mask<V>(
      "|", [](V a, V b) { return V::lt(a, b) | V::eq(a, a); },
      [](S a, S b) { return a < b || a == a; });
  // Small integers: fused or not, the result is exact.
  S a[V::kLanes], b[V::kLanes], y[V::kLanes], z[V::kLanes], sum = 0, largest = S(-HUGE_VALF);
  for (int i = 0; i < V::kLanes; ++i) {
    a[i] = S(i + 1);
    b[i] = S(3 * i - 5);
    sum += a[i] * b[i];
    largest = max_of(largest, a[i] * b[i]);
  }
  V::fma(V::load(a), V::load(b), V::set1(7)).store(y);
  V::fnma(V::load(a), V::load(b), V::broadcast(a)).store(z);
  for (int i = 0; i < V::kLanes; ++i) {
    if (y[i] != a[i] * b[i] + 7) fail("fma", i, y[i], a[i] * b[i] + 7);
    if (z[i] != a[0] - a[i] * b[i]) fail("fnma", i, z[i], a[0] - a[i] * b[i]);
  }
  const V product = V::load(a) * V::load(b);
  if (product.sum() != sum) fail("sum", 0, product.sum(), sum);
  if (product.max_lane() != largest) fail("max_lane", 0, product.max_lane(), largest);
}

// load_n and store_n of a storage type, by value and by what they must not touch.
template <class V, class T>
void check_memory(const char* name) {
  using S = typename V::Scalar;
  for (int n = 0; n <= V::kLanes; ++n) {
    T x[V::kLanes], y[V::kLanes + 1];
    S wide[V::kLanes];
    for (int i = 0; i < V::kLanes; ++i) put(x + i, S(0.5) * S(i) - S(3));
    for (int i = 0; i <= V::kLanes; ++i) put(y + i, S(99));
    V::load_n(x, n).store(wide);
    for (int i = 0; i < V::kLanes; ++i) {
      const S want = i < n ? as_float(x[i]) : S(0);
      if (wide[i] != want) fail(name, i, wide[i], want);
    }
    V::load(x).store_n(y, n);
    for (int i = 0; i <= V::kLanes; ++i) {
      const S want = i < n ? as_float(x[i]) : S(99);
      if (as_float(y[i]) != want) fail(name, i, as_float(y[i]), want);
    }
    V::load(x).store(y);
    for (int i = 0; i < V::kLanes; ++i)
      if (as_float(y[i]) != as_float(x[i])) fail(name, i, as_float(y[i]), as_float(x[i]));
    const auto first = V::Mask::first(n).bits();
    if (first != (n == 0 ? 0u : (1u << n) - 1u)) fail("first", n, first, n);
    if (V::Mask::from_bits(first).bits() != first) fail("from_bits", n, first, n);
  }
}

// Vector and scalar conversions agree on every 16-bit pattern, and narrowing on every rounding
// case.
template <class H>
void check_conversions(const char* name) {
  constexpr int kLanes = VecF::kLanes;
  for (uint32_t first = 0; first < 65536; first += kLanes) {
    H h[kLanes], back[kLanes];
    float wide[kLanes];
    for (int i = 0; i < kLanes; ++i) h[i].bits = static_cast<uint16_t>(first + i);
    VecF::load(h).store(wide);
    for (int i = 0; i < kLanes; ++i)
      if (!same(wide[i], to_float(h[i]))) fail(name, first + i, wide[i], to_float(h[i]));
    // Around each representable value: exact, just off it, and half way to the next.
    const uint32_t offsets[] = {0, 1, 0x7fff, 0x8000, 0x8001, 0xfff, 0x1000, 0x1001};
    for (uint32_t offset : offsets) {
      float x[kLanes];
      for (int i = 0; i < kLanes; ++i) x[i] = float_of(bits_of(to_float(h[i])) + offset);
      VecF::load(x).store(back);
      for (int i = 0; i < kLanes; ++i) {
        H want;
        put(&want, x[i]);
        if (back[i].bits != want.bits && !std::isnan(x[i]))
          fail(name, x[i], back[i].bits, want.bits);
        if (std::isnan(x[i]) && !std::isnan(to_float(back[i]))) fail(name, x[i], back[i].bits, 0);
      }
    }
  }
}

void check_integers() {
  constexpr int kLanes = VecU::kLanes;
  uint32_t a[kLanes], b[kLanes], y[kLanes], hi[kLanes];
  for (uint32_t salt = 0; salt < 50; ++salt) {
    for (int i = 0; i < kLanes; ++i) {
      a[i] = 0x9E3779B9u * (salt * 31 + static_cast<uint32_t>(i) + 1);
      b[i] = 0xBB67AE85u * (salt * 17 + static_cast<uint32_t>(i) + 3) ^ (a[i] >> 3);
    }
    const VecU u = VecU::load(a), v = VecU::load(b);
    const auto check = [&](const char* name, VecU got, auto scalar) {
      got.store(y);
      for (int i = 0; i < kLanes; ++i)
        if (y[i] != scalar(a[i], b[i])) fail(name, a[i], y[i], scalar(a[i], b[i]));
    };
    check("u+", u + v, [](uint32_t p, uint32_t q) { return p + q; });
    check("u-", u - v, [](uint32_t p, uint32_t q) { return p - q; });
    check("u^", u ^ v, [](uint32_t p, uint32_t q) { return p ^ q; });
    check("u&", u & v, [](uint32_t p, uint32_t q) { return p & q; });
    check("u|", u | v, [](uint32_t p, uint32_t q) { return p | q; });
    check("shr", u.shr<7>(), [](uint32_t p, uint32_t) { return p >> 7; });
    check("shl", u.shl<23>(), [](uint32_t p, uint32_t) { return p << 23; });
    check("set1", VecU::set1(5), [](uint32_t, uint32_t) { return 5u; });
    VecU low, high;
    VecU::mul_wide(u, v, &low, &high);
    low.store(y);
    high.store(hi);
    for (int i = 0; i < kLanes; ++i) {
      const uint64_t want = static_cast<uint64_t>(a[i]) * b[i];
      const uint64_t got = static_cast<uint64_t>(hi[i]) << 32 | y[i];
      if (got != want) fail("mul_wide", a[i], static_cast<double>(got), static_cast<double>(want));
    }
    const VecU small = u.shr<1>(), other = v.shr<1>();
    uint32_t less = 0, equal = 0;
    for (int i = 0; i < kLanes; ++i) {
      less |= static_cast<uint32_t>(a[i] >> 1 < b[i] >> 1) << i;
      equal |= static_cast<uint32_t>(i % 2 == 0) << i;
    }
    if (VecU::less(small, other).bits() != less) fail("less", salt, 0, less);
    const VecU parity = VecU::iota() & VecU::set1(1);
    if (VecU::equal(parity, VecU::set1(0)).bits() != equal) fail("equal", salt, 0, equal);
  }
}

void check_float_only() {
  lanes<VecF>(
      "round",
      [](VecF a, VecF, VecF) {
        return VecF::round(VecF::min(VecF::set1(1e6f), VecF::max(VecF::set1(-1e6f), a)));
      },
      [](float a, float, float) {
        const float low = -1e6f > a ? -1e6f : a;
        return std::nearbyint(1e6f < low ? 1e6f : low);
      });
  lanes<VecF>(
      "bits", [](VecF a, VecF, VecF) { return VecF::from_bits(a.to_bits()); },
      [](float a, float, float) { return a; });
  for (int n = -126; n <= 127; ++n) {
    float y[VecF::kLanes];
    VecF::pow2(VecF::set1(static_cast<float>(n))).store(y);
    if (y[0] != std::ldexp(1.0f, n)) fail("pow2", n, y[0], std::ldexp(1.0, n));
  }
  alignas(64) float streamed[VecF::kLanes];
  float x[VecF::kLanes];
  VecF::from_uint(VecU::iota()).stream(streamed);
  VecF::from_uint(VecU::iota()).store(x);
  for (int i = 0; i < VecF::kLanes; ++i)
    if (streamed[i] != i || x[i] != i) fail("from_uint", i, x[i], i);
  uint8_t bytes[kMost] = {};
  for (int i = 0; i < VecF::kLanes; ++i)
    bytes[i] = static_cast<uint8_t>(i % 3 == 0 ? 0x80 >> i % 8 : 0);
  uint32_t want = 0;
  for (int i = 0; i < VecF::kLanes; ++i) want |= static_cast<uint32_t>(bytes[i] != 0) << i;
  if (MaskF::from_bytes(bytes).bits() != want) fail("from_bytes", 0, 0, want);
}

}  // namespace

int run() {
  check_arithmetic<VecF>();
  check_arithmetic<VecD>();
  check_memory<VecF, float>("float memory");
  check_memory<VecF, BFloat16>("bfloat16 memory");
  check_memory<VecF, Float16>("float16 memory");
  check_memory<VecD, double>("double memory");
  check_conversions<BFloat16>("bfloat16");
  check_conversions<Float16>("float16");
  check_integers();
  check_float_only();
  if (failures) std::printf("%d failures\n", failures);
  return failures ? 1 : 0;
}

}  // namespace LLMKERN_ISA
}  // namespace llmkern

int main() { return llmkern::LLMKERN_ISA::run(); }
