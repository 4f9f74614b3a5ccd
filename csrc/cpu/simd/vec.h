// The vector types that every CPU kernel is written on, one definition per instruction set. A
// kernel source is compiled once per ISA with -DLLMKERN_ISA=<name>; all of it lives in
// llmkern::<name>.
//
//   Vec<float>, Vec<double>   kLanes, Scalar, Mask; zero set1 broadcast load load_n store store_n
//                             + - * /; fma(a,b,c) = a*b+c; fnma = c-a*b; max min (second operand
//                             where either is NaN) sqrt abs neg; lt le eq -> Mask (false on NaN);
//                             select(m, yes, no); keep(m, yes) (else +0); sum(); max_lane()
//   Vec<float> only           load / store of BFloat16 and Float16 (round to nearest even); round;
//                             pow2(n); from_bits / to_bits / from_uint
//   VecU                      as many uint32 as Vec<float> has floats: + - ^ & | shr<n> shl<n>
//                             mul_wide, less and equal -> Mask
//   Mask                      & | ~ any all bits from_bits first(n); MaskF also from_bytes(p)
//
// load_n(p, n) and store_n(p, n) touch exactly the first n lanes (0 <= n <= kLanes); other lanes
// read 0.
#pragma once

#if !defined(LLMKERN_ISA)
#error "compile CPU kernels with -DLLMKERN_ISA=scalar|avx2|avx512|avx512_bf16"
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#include "vec_avx512.h"
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include "vec_avx2.h"
#else
#include "vec_scalar.h"
#endif

namespace llmkern {
namespace LLMKERN_ISA {
using VecF = Vec<float>;
using VecD = Vec<double>;
}  // namespace LLMKERN_ISA
}  // namespace llmkern
