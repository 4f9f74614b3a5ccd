// Dropout decisions against a scalar Philox4x32-7, at aligned and unaligned
// first elements and across the carry of the counter's low word.
#include "check.h"
#include "decisions.h"
#include "simd/dropout.h"

namespace llmkern {
namespace LLMKERN_ISA {
namespace {

// The published 10-round vector for an all-zero counter and key proves the scalar form.
void check_scalar_form() {
  const Words got = scalar_philox({{0, 0, 0, 0}}, 0, 10);
  const uint32_t want[4] = {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8};
  for (int i = 0; i < 4; ++i)
    if (got.w[i] != want[i]) fail("philox4x32-10", i, got.w[i], want[i]);
}

void check_range(int64_t first, int64_t n, uint32_t threshold) {
  constexpr int64_t kMost = 2048;
  const FlatDropout drop{0x123456789abcdef1u, threshold, 1.25f};
  float factor[kMost + 1];
  KeepBits<kMost> bits;
  factor[n] = 77.0f;
  drop.fill(first, n, factor);
  drop.keep(first, n, &bits);
  for (int64_t j = 0; j < n; ++j) {
    const bool want = flat_keeps(static_cast<uint64_t>(first + j), drop.seed, threshold);
    if (factor[j] != (want ? 1.25f : 0.0f)) fail("fill", first + j, factor[j], want);
    const bool bit = bits.mask<MaskF>(j).bits() & 1u;
    const bool bit_d = bits.mask<MaskD>(j).bits() & 1u;
    if (bit != want || bit_d != want) fail("mask", first + j, bit, want);
  }
  if (factor[n] != 77.0f) fail("fill wrote past the end", first + n, factor[n], 77);
}

}  // namespace

int run() {
  check_scalar_form();
  const int64_t carry = int64_t{8} << 32;
  const int64_t firsts[] = {0, 1, 7, 8, 9, 1000003, carry - 1, carry - 17, carry - 640, carry};
  const int64_t lengths[] = {1, 7, 8, kFlatBlock - 1, kFlatBlock, kFlatBlock + 1, 1025, 2048};
  const uint32_t thresholds[] = {1, 6554, 32768, 65535, 65536};
  for (int64_t first : firsts)
    for (int64_t n : lengths)
      for (uint32_t threshold : thresholds) check_range(first, n, threshold);
  if (failures) std::printf("%d failures\n", failures);
  return failures ? 1 : 0;
}

}  // namespace LLMKERN_ISA
}  // namespace llmkern

int main() { return llmkern::LLMKERN_ISA::run(); }
