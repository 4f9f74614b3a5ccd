// What every kernel file needs: storage types as floats, 16 bytes of them at a time, and dispatch
// over dtypes on the host.
#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

#include "llmkern/dtype.h"
#include "ptx.cuh"

namespace llmkern {

constexpr int kWarp = 32;
constexpr int kPack = 8;  // 16-bit elements in 16 bytes; also what one Philox call decides
// Elements side by side in a thread: 16 bytes of the widest type that a kernel reads or writes once
// an element, so that a warp's accesses fill whole sectors.
template <class... T>
constexpr int kPackOf = (... || (sizeof(T) == 4)) ? 4 : 8;
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
__device__ inline float low_half(uint32_t pair, BFloat16) { return ptx::shl_b32<16>(pair); }
__device__ inline float high_half(uint32_t pair, BFloat16) {
  return ptx::and_b32<0xffff0000u>(pair);
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
template <int N, class T>
__device__ inline void round_to(float (&v)[N], T) {
#pragma unroll
  for (int i = 0; i < N; i += 2) {
    const uint32_t pair = pack_pair(v[i], v[i + 1], T{});
    v[i] = low_half(pair, T{});
    v[i + 1] = high_half(pair, T{});
  }
}
template <int N>
__device__ inline void round_to(float (&)[N], float) {}

// N elements as memory holds them, 8, 16 or 32 bytes; floats as such, since PTX has a move between
// a register of bits and one of a float.
template <class T, int N>
struct Packed {
  static constexpr bool kFloat = std::is_same_v<T, float>;
  static constexpr int kBytes = N * sizeof(T);
  static constexpr int kUnitWords = kBytes == 8 ? 2 : 4, kUnits = kBytes / (4 * kUnitWords);
  using Word = std::conditional_t<kFloat, float, uint32_t>;
  using Unit = std::conditional_t<kFloat, float4, std::conditional_t<kBytes == 8, uint2, uint4>>;
  Word word[kUnits][kUnitWords];

  __device__ void load(const T* from) {
#pragma unroll
    for (int i = 0; i < kUnits; ++i) {
      const Unit unit = reinterpret_cast<const Unit*>(from)[i];
      word[i][0] = unit.x, word[i][1] = unit.y;
      if constexpr (kUnitWords == 4) word[i][2] = unit.z, word[i][3] = unit.w;
    }
  }
  __device__ void store(T* to) const {
#pragma unroll
    for (int i = 0; i < kUnits; ++i) {
      Unit unit;
      unit.x = word[i][0], unit.y = word[i][1];
      if constexpr (kUnitWords == 4) unit.z = word[i][2], unit.w = word[i][3];
      reinterpret_cast<Unit*>(to)[i] = unit;
    }
  }

  // 16 bytes or 32, kOffset bytes after an address.
  template <int kOffset>
  __device__ void load_global(uint64_t from) {
    static_for<kUnits>(
        [&](auto i) { ptx::ld_global_v4<kOffset + i.value * 16>(word[i.value], from); });
  }
  template <int kOffset>
  __device__ void load_shared(uint32_t from) {
    static_for<kUnits>(
        [&](auto i) { ptx::ld_shared_v4<kOffset + i.value * 16>(word[i.value], from); });
  }
  template <int kOffset>
  __device__ void store_global(uint64_t to) const {
    static_for<kUnits>(
        [&](auto i) { ptx::st_global_v4<kOffset + i.value * 16>(to, word[i.value]); });
  }

  __device__ void unpack(float (&v)[N]) const {
#pragma unroll
    for (int i = 0; i < kBytes / 4; ++i) {
      const Word bits = word[i / kUnitWords][i % kUnitWords];
      if constexpr (kFloat) {
        v[i] = bits;
      } else {
        v[2 * i] = low_half(bits, T{}), v[2 * i + 1] = high_half(bits, T{});
      }
    }
  }
  __device__ void pack(const float (&v)[N]) {
#pragma unroll
    for (int i = 0; i < kBytes / 4; ++i) {
      Word& bits = word[i / kUnitWords][i % kUnitWords];
      if constexpr (kFloat) {
        bits = v[i];
      } else {
        bits = pack_pair(v[2 * i], v[2 * i + 1], T{});
      }
    }
  }
};

template <class T, int N>
__device__ inline void load_vector(const T* from, float (&v)[N]) {
  Packed<T, N> raw;
  raw.load(from);
  raw.unpack(v);
}

template <class T, int N>
__device__ inline void store_vector(T* to, const float (&v)[N]) {
  Packed<T, N> raw;
  raw.pack(v);
  raw.store(to);
}

// Sum over the warp, the same in each lane.
__device__ inline float warp_sum(float v) {
  v += ptx::shfl_sync_bfly<16>(v);
  v += ptx::shfl_sync_bfly<8>(v);
  v += ptx::shfl_sync_bfly<4>(v);
  v += ptx::shfl_sync_bfly<2>(v);
  return v + ptx::shfl_sync_bfly<1>(v);
}

// N columns of a row from `col` on; those at or past `cols` read as 0. vector: the address of each
// pack is a multiple of its bytes or of 16, and cols is a multiple of N.
template <class T, int N>
__device__ inline void load_pack(const T* row, int col, int cols, bool vector, float (&v)[N]) {
  if (vector) {
    load_vector(row + col, v);
    return;
  }
#pragma unroll
  for (int i = 0; i < N; ++i) v[i] = col + i < cols ? to_float(row[col + i]) : 0.0f;
}

template <class T, int N>
__device__ inline void store_pack(T* row, int col, int cols, bool vector, const float (&v)[N]) {
  if (vector) {
    store_vector(row + col, v);
    return;
  }
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (col + i < cols) row[col + i] = from_float<T>(v[i]);
  }
}

// As load_pack, of an array whose dtype is known at run time; for what is read once.
template <int N>
__device__ inline void load_pack_as(DType dtype, const void* row, int col, int cols, bool vector,
                                    float (&v)[N]) {
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
inline int64_t pack_of(DType dtype) { return 16 / size_of(dtype); }

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
