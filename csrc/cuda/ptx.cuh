// All inline PTX, one instruction a function, named after it. sm_80 and newer.
#pragma once

#include <cstdint>

namespace llmkern::ptx {

// An address of global memory; converted once, where pointers would be at each use.
__device__ inline uint64_t global_address(const void* p) {
  return static_cast<uint64_t>(__cvta_generic_to_global(p));
}

// No instruction: the value is computed here once, and not again inside the loop that uses it.
__device__ inline void keep(uint32_t& value) { asm volatile("" : "+r"(value)); }
__device__ inline void keep(int& value) { asm volatile("" : "+r"(value)); }
__device__ inline void keep(uint64_t& value) { asm volatile("" : "+l"(value)); }

// Constant offsets are part of the instruction: addresses that differ by a constant cost one
// register and no arithmetic.

// 16 bytes, of which the first src_bytes come from global memory and the rest are zero. Both
// addresses are multiples of 16.
template <int kSharedOffset = 0, int kGlobalOffset = 0>
__device__ inline void cp_async_cg_16(uint32_t shared, uint64_t global, uint32_t src_bytes) {
  asm volatile("cp.async.cg.shared.global [%0 + %3], [%1 + %4], 16, %2;" ::"r"(shared), "l"(global),
               "r"(src_bytes), "n"(kSharedOffset), "n"(kGlobalOffset)
               : "memory");
}

// All 16 bytes.
template <int kSharedOffset = 0, int kGlobalOffset = 0>
__device__ inline void cp_async_cg_16(uint32_t shared, uint64_t global) {
  asm volatile("cp.async.cg.shared.global [%0 + %2], [%1 + %3], 16;" ::"r"(shared), "l"(global),
               "n"(kSharedOffset), "n"(kGlobalOffset)
               : "memory");
}

__device__ inline void cp_async_commit_group() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most N of the last groups are still under way.
template <int N>
__device__ inline void cp_async_wait_group() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// 16 bytes, all of them there; the address is a multiple of 16.
template <int kOffset = 0>
__device__ inline void ld_global_v4(uint32_t (&r)[4], uint64_t global) {
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4 + %5];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "l"(global), "n"(kOffset)
               : "memory");
}

template <int kOffset = 0>
__device__ inline void ld_global_v4(float (&v)[4], uint64_t global) {
  asm volatile("ld.global.v4.f32 {%0, %1, %2, %3}, [%4 + %5];"
               : "=f"(v[0]), "=f"(v[1]), "=f"(v[2]), "=f"(v[3])
               : "l"(global), "n"(kOffset)
               : "memory");
}

template <int kOffset = 0>
__device__ inline void st_global_v4(uint64_t global, const float (&v)[4]) {
  asm volatile("st.global.v4.f32 [%0 + %1], {%2, %3, %4, %5};" ::"l"(global), "n"(kOffset),
               "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3])
               : "memory");
}

template <int kOffset = 0>
__device__ inline void st_global_v4(uint64_t global, const uint32_t (&r)[4]) {
  asm volatile("st.global.v4.u32 [%0 + %1], {%2, %3, %4, %5};" ::"l"(global), "n"(kOffset),
               "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}

__device__ inline uint32_t ld_global(uint64_t global) {
  uint32_t value;
  asm volatile("ld.global.u32 %0, [%1];" : "=r"(value) : "l"(global) : "memory");
  return value;
}

template <int kOffset = 0>
__device__ inline void ld_shared_v4(uint32_t (&r)[4], uint32_t shared) {
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4 + %5];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared), "n"(kOffset)
               : "memory");
}

template <int kOffset = 0>
__device__ inline void ld_shared_v4(float (&v)[4], uint32_t shared) {
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4 + %5];"
               : "=f"(v[0]), "=f"(v[1]), "=f"(v[2]), "=f"(v[3])
               : "r"(shared), "n"(kOffset)
               : "memory");
}

template <int kOffset = 0>
__device__ inline void st_shared_v4(uint32_t shared, const uint32_t (&r)[4]) {
  asm volatile("st.shared.v4.u32 [%0 + %1], {%2, %3, %4, %5};" ::"r"(shared), "n"(kOffset),
               "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}

// Lanes 8i .. 8i + 7 give the addresses of the eight 16-byte rows of matrix i; lane l receives of
// each matrix columns 2 (l % 4), +1 of row l / 4.
template <int kOffset = 0>
__device__ inline void ldmatrix_x4(uint32_t (&r)[4], uint32_t shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4 + %5];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared), "n"(kOffset)
               : "memory");
}

// The same of each matrix transposed: rows 2 (l % 4), +1 of column l / 4.
template <int kOffset = 0>
__device__ inline void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4 + %5];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared), "n"(kOffset)
               : "memory");
}

// d += a b: a 16 x 16 row major, b 16 x 8 column major, d 16 x 8. Lane l = 4 g + t holds
// d (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1).
__device__ inline void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                         uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%10, %11, %12, %13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(d[0]), "f"(d[1]),
        "f"(d[2]), "f"(d[3]));
}

__device__ inline void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                        uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%10, %11, %12, %13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(d[0]), "f"(d[1]),
        "f"(d[2]), "f"(d[3]));
}

// d += a b: a 16 x 8, b 8 x 8, of floats rounded to TF32.
__device__ inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                        uint32_t b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%10, %11, %12, %13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(d[0]), "f"(d[1]),
        "f"(d[2]), "f"(d[3]));
}

// To nearest, ties away from zero: 10 bits of mantissa stay. From and to a float's bits, as
// ldmatrix gives and mma takes them: a register of bits holds any type, without a move.
__device__ inline uint32_t cvt_rna_tf32_f32(uint32_t bits) {
  uint32_t value;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(value) : "r"(bits));
  return value;
}

// Two floats rounded to nearest even: `high` in the upper half.
__device__ inline uint32_t cvt_rn_bf16x2_f32(float high, float low) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

__device__ inline uint32_t cvt_rn_f16x2_f32(float high, float low) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

__device__ inline float cvt_f32_f16(uint16_t half) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(half));
  return value;
}

// Bits as a float, without the move from an integer register to a float's that a cast takes in PTX.
template <int kBy>
__device__ inline float shl_b32(uint32_t bits) {
  float value;
  asm("shl.b32 %0, %1, %2;" : "=f"(value) : "r"(bits), "n"(kBy));
  return value;
}

template <uint32_t kMask>
__device__ inline float and_b32(uint32_t bits) {
  float value;
  asm("and.b32 %0, %1, %2;" : "=f"(value) : "r"(bits), "n"(kMask));
  return value;
}

// What the thread that released the value had stored before is seen by what follows.
__device__ inline uint32_t ld_acquire_gpu_u32(const uint32_t* global) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];"
               : "=r"(value)
               : "l"(global_address(global))
               : "memory");
  return value;
}

// What this thread knows to be stored is seen by who acquires the sum.
__device__ inline void red_release_gpu_add_u32(uint32_t* global, uint32_t value) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(global_address(global)), "r"(value)
               : "memory");
}

// v of lane (own lane ^ kMask); all lanes take part.
template <int kMask>
__device__ inline float shfl_sync_bfly(float v) {
  float other;
  asm volatile("shfl.sync.bfly.b32 %0, %1, %2, 31, -1;" : "=f"(other) : "f"(v), "n"(kMask));
  return other;
}

// 2^x to 2 ulp; 0 for very negative x, -inf included.
__device__ inline float ex2_approx_ftz_f32(float x) {
  float value;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(value) : "f"(x));
  return value;
}

__device__ inline float rcp_approx_ftz_f32(float x) {
  float value;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(value) : "f"(x));
  return value;
}

}  // namespace llmkern::ptx
