// What every kernel file needs: storage types as floats, eight elements at a time (16 bytes of a
// 16-bit type; also what one Philox call decides), and dispatch over dtypes on the host.
#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

#include "llmkern/dtype.h"
#include "ptx.cuh"

namespace llmkern {

constexpr int kWarp = 32;
constexpr int kPack = 8;  // elements
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr float kLog2E = 1.44269504f;

// All shared memory is dynamic: its size is an argument of the launch.
extern __shared__ __align__(128) uint8_t shared_bytes[];

__device__ inline uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

template <class F, int... kIndex>
__device__ inline void static_for(F&& f, std::integer_sequence<int, kIndex...>) {
  (f(std::integral_constant<int, kIndex>{}), ...);
}

// f(0), f(1) .. f(kCount - 1), each as a constant: offsets made of it fit into an instruction.
template <int kCount, class F>
__device__ inline void static_for(F&& f) {
  static_for(f, std::make_integer_sequence<int, kCount>{});
}

// Byte offset of a 16-byte unit in a tile of 16-bit rows of kCols in shared memory: unit u of row r
// stands at u ^ (r % 8), so that eight consecutive rows at one u, which ldmatrix reads at a time,
// lie in eight distinct bank groups.
template <int kCols>
__device__ inline int row_offset(int row, int unit) {
  static_assert(kCols == 64 || kCols == 128, "a row is 8 or 16 units");
  return row * (kCols * 2) + ((unit ^ (row & 7)) * 16);
}

__device__ inline float to_float(float v) { return v; }
__device__ inline float to_float(BFloat16 v) {
  return __uint_as_float(static_cast<uint32_t>(v.bits) << 16);
}
__device__ inline float to_float(Float16 v) { return ptx::cvt_f32_f16(v.bits); }

// The two elements of a 32-bit word, the lower one first.
__device__ inline float low_half(uint32_t pair, BFloat16) { return ptx::shl_b32(pair, 16); }
__device__ inline float high_half(uint32_t pair, BFloat16) {
  return ptx::and_b32(pair, 0xffff0000u);
}
__device__ inline float low_half(uint32_t pair, Float16) {
  return ptx::cvt_f32_f16(static_cast<uint16_t>(pair));
}
__device__ inline float high_half(uint32_t pair, Float16) {
  return ptx::cvt_f32_f16(static_cast<uint16_t>(pair >> 16));
}

__device__ inline uint32_t pack_pair(float low, float high, BFloat16) {
  return ptx::cvt_rn_bf16x2_f32(high, low);
}
__device__ inline uint32_t pack_pair(float low, float high, Float16) {
  return ptx::cvt_rn_f16x2_f32(high, low);
}

template <class T>
__device__ inline T from_float(float v) {
  return T{static_cast<uint16_t>(pack_pair(v, 0.0f, T{}))};
}
template <>
__device__ inline float from_float<float>(float v) {
  return v;
}

// v as its storage type holds it.
template <class T>
__device__ inline void round_to(float (&v)[kPack], T) {
  for (int i = 0; i < kPack; i += 2) {
    const uint32_t pair = pack_pair(v[i], v[i + 1], T{});
    v[i] = low_half(pair, T{});
    v[i + 1] = high_half(pair, T{});
  }
}
__device__ inline void round_to(float (&)[kPack], float) {}

// Eight elements as 16 or 32 bytes hold them.
template <class T>
struct Packed {
  static constexpr int kWords = sizeof(T) * kPack / 16;
  uint32_t word[kWords][4];

  template <int kOffset>
  __device__ void load_global(uint64_t from) {
    static_for<kWords>(
        [&](auto i) { ptx::ld_global_v4<kOffset + i.value * 16>(word[i.value], from); });
  }
  template <int kOffset>
  __device__ void load_shared(uint32_t from) {
    static_for<kWords>(
        [&](auto i) { ptx::ld_shared_v4<kOffset + i.value * 16>(word[i.value], from); });
  }
  template <int kOffset>
  __device__ void store_global(uint64_t to) const {
    static_for<kWords>(
        [&](auto i) { ptx::st_global_v4<kOffset + i.value * 16>(to, word[i.value]); });
  }

  __device__ void unpack(float (&v)[kPack]) const {
#pragma unroll
    for (int i = 0; i < kPack; ++i) {
      if constexpr (sizeof(T) == sizeof(float)) {
        v[i] = __uint_as_float(word[i / 4][i % 4]);
      } else {
        v[i] = i % 2 == 0 ? low_half(word[0][i / 2], T{}) : high_half(word[0][i / 2], T{});
      }
    }
  }
  __device__ void pack(const float (&v)[kPack]) {
#pragma unroll
    for (int i = 0; i < 4 * kWords; ++i) {
      if constexpr (sizeof(T) == sizeof(float)) {
        word[i / 4][i % 4] = __float_as_uint(v[i]);
      } else {
        word[0][i] = pack_pair(v[2 * i], v[2 * i + 1], T{});
      }
    }
  }
};

template <class T>
__device__ inline void load_vector(const T* from, float (&v)[kPack]) {
  const uint4 raw = *reinterpret_cast<const uint4*>(from);
  const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    v[2 * i] = low_half(words[i], T{});
    v[2 * i + 1] = high_half(words[i], T{});
  }
}
__device__ inline void load_vector(const float* from, float (&v)[kPack]) {
  const float4 a = reinterpret_cast<const float4*>(from)[0];
  const float4 b = reinterpret_cast<const float4*>(from)[1];
  v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w;
  v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
}

template <class T>
__device__ inline void store_vector(T* to, const float (&v)[kPack]) {
  uint4 raw;
  raw.x = pack_pair(v[0], v[1], T{});
  raw.y = pack_pair(v[2], v[3], T{});
  raw.z = pack_pair(v[4], v[5], T{});
  raw.w = pack_pair(v[6], v[7], T{});
  *reinterpret_cast<uint4*>(to) = raw;
}
__device__ inline void store_vector(float* to, const float (&v)[kPack]) {
  reinterpret_cast<float4*>(to)[0] = make_float4(v[0], v[1], v[2], v[3]);
  reinterpret_cast<float4*>(to)[1] = make_float4(v[4], v[5], v[6], v[7]);
}

// Sum over the warp, the same in each lane.
__device__ inline float warp_sum(float v) {
  v += ptx::shfl_sync_bfly<16>(v);
  v += ptx::shfl_sync_bfly<8>(v);
  v += ptx::shfl_sync_bfly<4>(v);
  v += ptx::shfl_sync_bfly<2>(v);
  return v + ptx::shfl_sync_bfly<1>(v);
}

// Eight columns of a row from `col` on; those at or past `cols` read as 0. vector: the address of
// each pack is a multiple of 16 bytes and cols is a multiple of 8.
template <class T>
__device__ inline void load_pack(const T* row, int col, int cols, bool vector, float (&v)[kPack]) {
  if (vector) {
    load_vector(row + col, v);
    return;
  }
#pragma unroll
  for (int i = 0; i < kPack; ++i) v[i] = col + i < cols ? to_float(row[col + i]) : 0.0f;
}

template <class T>
__device__ inline void store_pack(T* row, int col, int cols, bool vector, const float (&v)[kPack]) {
  if (vector) {
    store_vector(row + col, v);
    return;
  }
#pragma unroll
  for (int i = 0; i < kPack; ++i) {
    if (col + i < cols) row[col + i] = from_float<T>(v[i]);
  }
}

// As load_pack, of an array whose dtype is known at run time; for what is read once.
__device__ inline void load_pack_as(DType dtype, const void* row, int col, int cols, bool vector,
                                    float (&v)[kPack]) {
  if (dtype == DType::kFloat32) {
    load_pack(static_cast<const float*>(row), col, cols, vector, v);
  } else if (dtype == DType::kBFloat16) {
    load_pack(static_cast<const BFloat16*>(row), col, cols, vector, v);
  } else {
    load_pack(static_cast<const Float16*>(row), col, cols, vector, v);
  }
}

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int64_t size_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// Whether rows at `p` with this stride can be read 16 bytes at a time; null can.
inline bool is_vector(const void* p, int64_t stride, DType dtype) {
  return p == nullptr ||
         (reinterpret_cast<uintptr_t>(p) % 16 == 0 && stride * size_of(dtype) % 16 == 0);
}

// f(T{}) with the storage type of a 16-bit or float dtype.
template <class F>
void dispatch_dtype(DType dtype, F&& f) {
  if (dtype == DType::kFloat32) return f(float{});
  if (dtype == DType::kBFloat16) return f(BFloat16{});
  f(Float16{});
}

}  // namespace llmkern
