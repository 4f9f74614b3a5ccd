// Floating-point formats by bits: f16, bf16, e4m3, e5m2, tf32. No hardware conversions, so results
// are the same on every host.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace llmkern {
namespace emulator {

enum class Round : uint8_t { kNearest, kZero, kDown, kUp, kNearestAway };

template <class To, class From>
inline To bits_as(From v) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To r;
  std::memcpy(&r, &v, sizeof r);
  return r;
}

inline float flush(float v) {
  const uint32_t b = bits_as<uint32_t>(v);
  return bits_as<float>((b & 0x7f800000u) == 0 ? b & 0x80000000u : b);
}
inline double flush(double v) { return v; }

inline float bf16_to_float(uint16_t v) { return bits_as<float>(uint32_t{v} << 16); }

inline uint16_t float_to_bf16(float v) {
  const uint32_t b = bits_as<uint32_t>(v);
  const uint32_t rounded = (b + 0x7fffu + (b >> 16 & 1)) >> 16;
  return static_cast<uint16_t>((b & 0x7fffffffu) > 0x7f800000u ? 0x7fffu : rounded);
}

inline float half_to_float(uint16_t v) {
  // The exponent is rebased by a multiplication, which also makes subnormals right.
  const uint32_t magnitude = uint32_t{v} << 13 & 0x0fffe000u;
  const uint32_t scaled = bits_as<uint32_t>(bits_as<float>(magnitude) * 0x1p112f);
  const uint32_t special = (v & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0u;
  return bits_as<float>(scaled | special | (uint32_t{v} & 0x8000u) << 16);
}

inline uint16_t float_to_half(float v) {
  const uint32_t b = bits_as<uint32_t>(v);
  const uint32_t sign = b >> 16 & 0x8000u, magnitude = b & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return 0x7fff;
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // rounds past 65504
  if (magnitude < 0x38800000u) {  // subnormal: let an addition round
    const float shifted = bits_as<float>(magnitude) + 0.5f;
    return static_cast<uint16_t>(sign | (bits_as<uint32_t>(shifted) - 0x3f000000u));
  }
  const uint32_t rounded = magnitude + 0xfffu + (magnitude >> 13 & 1);
  return static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
}

struct Format {
  int exponent_bits, fraction_bits;
  bool has_infinity;  // e4m3 has none: its largest pattern is NaN
};
constexpr Format kHalf = {5, 10, true}, kBf16 = {8, 7, true}, kTf32 = {8, 10, true},
                 kFloat = {8, 23, true}, kE4m3 = {4, 3, false}, kE5m2 = {5, 2, true};

// The bits of v in a format, rounded once. Saturating: to the largest finite value.
inline uint32_t encode(double v, Format f, Round round, bool saturate) {
  const int bias = (1 << (f.exponent_bits - 1)) - 1;
  const uint32_t sign = std::signbit(v) ? 1u << (f.exponent_bits + f.fraction_bits) : 0;
  const uint32_t top = ((1u << f.exponent_bits) - 1) << f.fraction_bits;
  const uint32_t nan = top | ((1u << f.fraction_bits) - 1);
  const uint32_t largest = f.has_infinity ? top - 1 : nan - 1;
  if (std::isnan(v)) return nan;
  const double magnitude = std::fabs(v);
  if (std::isinf(v)) return sign | (saturate ? largest : f.has_infinity ? top : nan);
  if (magnitude == 0) return sign;
  int exponent;
  std::frexp(magnitude, &exponent);
  const int unit = std::max(exponent - 1, 1 - bias) - f.fraction_bits;
  const double scaled = std::ldexp(magnitude, -unit);  // exact
  double whole = std::floor(scaled);
  const double rest = scaled - whole;
  const bool odd = std::fmod(whole, 2.0) != 0;
  const bool up = round == Round::kNearest       ? rest > 0.5 || (rest == 0.5 && odd)
                  : round == Round::kNearestAway ? rest >= 0.5
                  : round == Round::kUp          ? rest > 0 && sign == 0
                  : round == Round::kDown        ? rest > 0 && sign != 0
                                                 : false;
  whole += up ? 1 : 0;
  // Above the subnormals the hidden bit carries into the exponent by itself.
  const int biased = unit + f.fraction_bits + bias - 1;
  const uint64_t bits =
      (static_cast<uint64_t>(biased) << f.fraction_bits) + static_cast<uint64_t>(whole);
  if (bits <= largest) return sign | static_cast<uint32_t>(bits);
  const bool to_infinity = round == Round::kNearest || round == Round::kNearestAway ||
                           (round == Round::kUp && sign == 0) ||
                           (round == Round::kDown && sign != 0);
  if (saturate || !to_infinity) return sign | largest;
  return sign | (f.has_infinity ? top : nan);
}

inline double decode(uint32_t bits, Format f) {
  const int bias = (1 << (f.exponent_bits - 1)) - 1;
  const uint32_t fraction = bits & ((1u << f.fraction_bits) - 1);
  const int exponent = static_cast<int>(bits >> f.fraction_bits & ((1u << f.exponent_bits) - 1));
  const bool negative = (bits >> (f.exponent_bits + f.fraction_bits) & 1) != 0;
  const bool last = exponent == (1 << f.exponent_bits) - 1;
  double v;
  if (last && f.has_infinity) {
    v = fraction == 0 ? INFINITY : NAN;
  } else if (last && fraction == (1u << f.fraction_bits) - 1) {
    v = NAN;
  } else {
    const uint32_t hidden = exponent == 0 ? 0 : 1u << f.fraction_bits;
    v = std::ldexp(static_cast<double>(fraction + hidden),
                   std::max(exponent, 1) - bias - f.fraction_bits);
  }
  return negative ? -v : v;
}

// a + b in double with the last bit set if anything was lost: rounding that to a format of at most
// 51 bits is rounding the exact sum once.
inline double add_to_odd(double a, double b) {
  const double sum = a + b;
  if (!std::isfinite(sum)) return sum;
  const double from_b = sum - a;
  const double error = (a - (sum - from_b)) + (b - from_b);
  if (error == 0) return sum;
  const auto bits = bits_as<uint64_t>(sum);
  if ((bits & 1) != 0) return sum;
  const bool away = (error > 0) == (sum > 0);
  return bits_as<double>(away ? bits + 1 : bits - 1);
}

}  // namespace emulator
}  // namespace llmkern
