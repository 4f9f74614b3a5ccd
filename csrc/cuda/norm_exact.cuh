// Rows of whole warps in which every thread has kPacks packs of N columns, 24 or 32 columns in all,
// and all accesses are 16 bytes: the widths of models. Nothing is tested in the loop over rows but
// what the call asks for. A warp's columns stand side by side, so a thread's addresses are one and
// constants.
#pragma once

#include "norm.cuh"

namespace llmkern {

// The first column of a thread that is the lane-th of its row; packs are kWarp packs apart.
template <int kPacks, int N>
__device__ inline int exact_column(int lane) {
  return lane / kWarp * (kPacks * kWarp * N) + lane % kWarp * N;
}

template <int kPacks, int N, class F>
__device__ inline void for_each(float (&v)[kPacks][N], F&& f) {
#pragma unroll
  for (int c = 0; c < kPacks; ++c) {
#pragma unroll
    for (int i = 0; i < N; ++i) f(v[c][i], c, i);
  }
}

// A thread's packs of a row as memory holds them; addresses are of its first column.
template <class T, int kPacks, int N = kPackOf<T>>
struct ExactPacks {
  static constexpr int kStep = kWarp * N * sizeof(T);
  Packed<T, N> packs[kPacks];

  __device__ void load_global(uint64_t from) {
    static_for<kPacks>([&](auto c) { packs[c.value].template load_global<c.value * kStep>(from); });
  }
  __device__ void store_global(uint64_t to) const {
    static_for<kPacks>([&](auto c) { packs[c.value].template store_global<c.value * kStep>(to); });
  }
  __device__ void unpack(float (&v)[kPacks][N]) const {
#pragma unroll
    for (int c = 0; c < kPacks; ++c) packs[c].unpack(v[c]);
  }
  __device__ void pack(const float (&v)[kPacks][N]) {
#pragma unroll
    for (int c = 0; c < kPacks; ++c) packs[c].pack(v[c]);
  }
};

// v = v + what a tensor holds from element `at` on, where there is one.
template <class T, int kPacks, int N>
__device__ inline void add_packs(const void* tensor, int64_t at, float (&v)[kPacks][N]) {
  if (tensor == nullptr) return;
  ExactPacks<T, kPacks, N> raw;
  float more[kPacks][N];
  raw.load_global(ptx::global_address(static_cast<const T*>(tensor) + at));
  raw.unpack(more);
  for_each(v, [&](float& sum, int c, int i) { sum += more[c][i]; });
}

template <class T, int kPacks, int N>
__device__ inline void store_packs(void* tensor, int64_t at, const float (&v)[kPacks][N]) {
  if (tensor == nullptr) return;
  ExactPacks<T, kPacks, N> raw;
  raw.pack(v);
  raw.store_global(ptx::global_address(static_cast<T*>(tensor) + at));
}

// index: of the first element, a multiple of N as the row's length is.
template <int kPacks, int N>
__device__ inline void drop_packs(const Dropout& d, int64_t index, float (&v)[kPacks][N]) {
  if (d.threshold == 0) return;
#pragma unroll
  for (int c = 0; c < kPacks; ++c) drop_aligned_pack(d, index + c * (kWarp * N), v[c]);
}

// Vectors of the row's length in shared memory, from which packs are read 16 bytes a thread. The
// halves of a pack of 32 bytes stand apart, and not in the same banks, so that neighbouring threads
// read neighbouring units of either.
template <class W, int N>
struct Staged {
  static constexpr bool kHalves = sizeof(W) * N == 32;
  static constexpr int kUnits = kHalves ? 2 : 1, kApart = 64;
  uint32_t base;
  int bytes;  // of a vector, with what keeps halves apart

  __device__ explicit Staged(int cols)
      : base(shared_address(shared_bytes) + kReduceBytes),
        bytes(cols * static_cast<int>(sizeof(W)) + (kHalves ? 2 * kApart : 0)) {}

  __device__ void fetch(int which, const void* vector, int cols) {
    const uint64_t from = ptx::global_address(vector);
    const int units = cols * static_cast<int>(sizeof(W)) / 16;
    for (int u = threadIdx.x; u < units; u += kRowThreads) {
      const int at = u / kUnits * 16 + u % kUnits * (bytes / 2);
      ptx::cp_async_cg_16(base + which * bytes + at, from + u * 16);
    }
  }

  template <int kPacks>
  __device__ void load(int which, int first, ExactPacks<W, kPacks, N>& to) const {
    const uint32_t from = base + which * bytes + first / N * 16;
    static_for<kPacks>([&](auto c) {
      static_for<kUnits>([&](auto unit) {
        ptx::ld_shared_v4<c.value * kWarp * 16>(to.packs[c.value].word[unit.value],
                                                from + unit.value * (bytes / 2));
      });
    });
  }
};

// Where groups share a block they share what they read of the weights.
inline size_t staged_bytes(const NormShape& s, int lanes, int vectors) {
  return lanes == kWarp ? vectors * (s.cols * size_of(s.weight_dtype) + 128) : 0;
}

template <class W, int kPacks, int N, int kVectors>
__device__ inline void load_vectors_as(const NormScalars& s, const void* const (&vectors)[kVectors],
                                       int lanes, int first, float (&v)[kVectors][kPacks][N]) {
  Staged<W, N> staged(s.cols);
  if (lanes == kWarp) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (vectors[i] != nullptr) staged.fetch(i, vectors[i], s.cols);
    }
    ptx::cp_async_commit_group();
    ptx::cp_async_wait_group<0>();
    __syncthreads();
  }
  ExactPacks<W, kPacks, N> raw;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    if (vectors[i] == nullptr) {
      for_each(v[i], [&](float& value, int, int) { value = i == 0 ? 1.0f : 0.0f; });
      continue;
    }
    if (lanes == kWarp) {
      staged.load(i, first, raw);
    } else {
      raw.load_global(ptx::global_address(static_cast<const W*>(vectors[i]) + first));
    }
    raw.unpack(v[i]);
  }
}

// A thread's packs of weight, and bias, which are of T or float; a missing weight is 1, a missing
// bias 0. unit_offset: 1 is added to the weight.
template <class T, int kPacks, int N, int kVectors>
__device__ inline void load_vectors(const NormScalars& s, const void* const (&vectors)[kVectors],
                                    int lanes, int first, float (&v)[kVectors][kPacks][N]) {
  if (s.weight_dtype == DType::kFloat32) {
    load_vectors_as<float>(s, vectors, lanes, first, v);
  } else {
    load_vectors_as<T>(s, vectors, lanes, first, v);
  }
  if (s.unit_offset && vectors[0] != nullptr) {
    for_each(v[0], [](float& value, int, int) { value += 1.0f; });
  }
}

// f(integral_constant<int, packs>) of an exact kernel for the call, if there is one; gives whether.
template <class X, class T, class F>
bool dispatch_exact(const NormShape& s, const RowPlan& plan, bool vector, F&& f) {
  if constexpr (std::is_same_v<X, T>) {
    constexpr int N = kPackOf<T>;
    if (!vector || plan.exact == 0) return false;
    plan.exact == 32 ? f(std::integral_constant<int, 32 / N>{})
                     : f(std::integral_constant<int, 24 / N>{});
    return true;
  }
  return false;
}

}  // namespace llmkern
