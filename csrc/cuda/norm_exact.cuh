// Rows of whole warps in which every thread has kPacks packs and all accesses are 16 bytes: the
// widths of models. Nothing is tested in the loop over rows but what the call asks for. A warp's
// columns stand side by side, so a thread's addresses are one and constants.
#pragma once

#include "norm.cuh"

namespace llmkern {

constexpr int kPackStep = kWarp * kPack;  // columns from a thread's pack to its next

// The first column of a thread that is the lane-th of its row.
template <int kPacks>
__device__ inline int exact_column(int lane) {
  return lane / kWarp * (kPacks * kPackStep) + lane % kWarp * kPack;
}

template <int kPacks, class F>
__device__ inline void for_each(float (&v)[kPacks][kPack], F&& f) {
#pragma unroll
  for (int c = 0; c < kPacks; ++c) {
#pragma unroll
    for (int i = 0; i < kPack; ++i) f(v[c][i], c, i);
  }
}

// A thread's packs of a row as memory holds them; addresses are of its first column.
template <class T, int kPacks>
struct ExactPacks {
  static constexpr int kStep = kPackStep * sizeof(T);
  Packed<T> packs[kPacks];

  __device__ void load_global(uint64_t from) {
    static_for<kPacks>([&](auto c) { packs[c.value].template load_global<c.value * kStep>(from); });
  }
  __device__ void load_shared(uint32_t from) {
    static_for<kPacks>([&](auto c) { packs[c.value].template load_shared<c.value * kStep>(from); });
  }
  __device__ void store_global(uint64_t to) const {
    static_for<kPacks>([&](auto c) { packs[c.value].template store_global<c.value * kStep>(to); });
  }
  __device__ void unpack(float (&v)[kPacks][kPack]) const {
#pragma unroll
    for (int c = 0; c < kPacks; ++c) packs[c].unpack(v[c]);
  }
  __device__ void pack(const float (&v)[kPacks][kPack]) {
#pragma unroll
    for (int c = 0; c < kPacks; ++c) packs[c].pack(v[c]);
  }
};

// v = v + what a tensor holds from element `at` on, where there is one.
template <class T, int kPacks>
__device__ inline void add_packs(const void* tensor, int64_t at, float (&v)[kPacks][kPack]) {
  if (tensor == nullptr) return;
  ExactPacks<T, kPacks> raw;
  float more[kPacks][kPack];
  raw.load_global(ptx::global_address(static_cast<const T*>(tensor) + at));
  raw.unpack(more);
  for_each(v, [&](float& sum, int c, int i) { sum += more[c][i]; });
}

template <class T, int kPacks>
__device__ inline void store_packs(void* tensor, int64_t at, const float (&v)[kPacks][kPack]) {
  if (tensor == nullptr) return;
  ExactPacks<T, kPacks> raw;
  raw.pack(v);
  raw.store_global(ptx::global_address(static_cast<T*>(tensor) + at));
}

template <int kPacks>
__device__ inline void drop_packs(const Dropout& d, int64_t index, float (&v)[kPacks][kPack]) {
  if (d.threshold == 0) return;
#pragma unroll
  for (int c = 0; c < kPacks; ++c) drop_pack(d, index + c * kPackStep, v[c]);
}

// Where groups share a block they share what they read of the weights, in shared memory.
inline size_t staged_bytes(const NormShape& s, int lanes, int vectors) {
  return lanes == kWarp ? vectors * s.cols * size_of(s.weight_dtype) : 0;
}

template <class W, int kPacks, int kVectors>
__device__ inline void load_vectors_as(const NormScalars& s, const void* const (&vectors)[kVectors],
                                       int lanes, int first, float (&v)[kVectors][kPacks][kPack]) {
  const int bytes = s.cols * static_cast<int>(sizeof(W)), own = first * static_cast<int>(sizeof(W));
  const uint32_t staged = shared_address(shared_bytes) + kReduceBytes;
  ExactPacks<W, kPacks> raw;
  if (lanes == kWarp) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (vectors[i] == nullptr) continue;
      const uint64_t from = ptx::global_address(vectors[i]);
      for (int at = threadIdx.x * 16; at < bytes; at += kRowThreads * 16) {
        ptx::cp_async_cg_16(staged + i * bytes + at, from + at);
      }
    }
    ptx::cp_async_commit_group();
    ptx::cp_async_wait_group<0>();
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    if (vectors[i] == nullptr) continue;
    if (lanes == kWarp) {
      raw.load_shared(staged + i * bytes + own);
    } else {
      raw.load_global(ptx::global_address(vectors[i]) + own);
    }
    raw.unpack(v[i]);
  }
}

// A thread's packs of weight, and bias, which are of T or float; a missing weight is 1, a missing
// bias 0. unit_offset: 1 is added to the weight.
template <class T, int kPacks, int kVectors>
__device__ inline void load_vectors(const NormScalars& s, const void* const (&vectors)[kVectors],
                                    int lanes, int first, float (&v)[kVectors][kPacks][kPack]) {
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    for_each(v[i], [&](float& value, int, int) { value = i == 0 ? 1.0f : 0.0f; });
  }
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
    const bool known = s.weight_dtype == s.dtype || s.weight_dtype == DType::kFloat32;
    if (!vector || !known || plan.exact == 0) return false;
    plan.exact == 4 ? f(std::integral_constant<int, 4>{}) : f(std::integral_constant<int, 3>{});
    return true;
  }
  return false;
}

}  // namespace llmkern
