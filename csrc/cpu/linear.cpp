// What surrounds the products of a linear layer when another library computes them (forward), and
// the one pass over dy in front of the backward products. Formulas: llmkern/gemm.h.
#include "gemm_epilogue.h"
#include "kernel_list.h"
#include "parallel.h"

namespace llmkern {
namespace LLMKERN_ISA {
namespace {

constexpr int64_t kGrainElements = 16384;  // work that pays for a thread
constexpr int64_t kSumRows = 32;           // rows of a first-level sum of the bias gradient

template <class T>
void epilogue(const LinearEpilogueArgs& a) {
  const T* const product = static_cast<const T*>(a.product[0]);
  const T* const up = static_cast<const T*>(a.product[1]);
  const int64_t grain = max_of<int64_t>(1, kGrainElements / a.cols);
  parallel_ranges(a.rows, grain, [&](int64_t begin, int64_t end) {
    epilogue_block<T>(a.epilogue, up != nullptr, a.cols, product + begin * a.cols,
                      up ? up + begin * a.cols : nullptr, a.cols, begin, end - begin, 0, a.cols);
  });
}

// g (and gu) of one row; sums of its columns are added into sum[part] where not null.
template <class T, Activation kAct>
void backward_row(const LinearBwdArgs& a, int64_t row, Compute<T>* const sum[2]) {
  using V = Vec<Compute<T>>;
  RowDropout drop(a.drop_threshold, a.seed);
  const int64_t at = row * a.cols;
  const T* const dy = static_cast<const T*>(a.dy) + row * a.dy_stride;
  const T* const z = static_cast<const T*>(a.preact[0]) + at;
  const T* const u = a.preact[1] ? static_cast<const T*>(a.preact[1]) + at : nullptr;
  const auto emit = [&](int part, int64_t c, V v, int lanes) {
    if (a.g[part]) store(static_cast<T*>(a.g[part]) + at + c, v, lanes);
    if (sum[part]) store(sum[part] + c, load<V>(sum[part] + c, lanes) + v, lanes);
  };
  for (int64_t begin = 0; begin < a.cols; begin += kStretch) {
    const int64_t length = min_of<int64_t>(kStretch, a.cols - begin);
    drop.draw(at + begin, length);
    for_columns<V::kLanes>(length, [&](int64_t j, int lanes) {
      const int64_t c = begin + j;
      V d = load<V>(dy + c, lanes);
      if (drop.on()) d = drop.apply(j, d);
      if constexpr (kAct != Activation::kNone) {
        const V zc = load<V>(z + c, lanes);
        if (u) {
          emit(1, c, d * activate<kAct>(zc), lanes);
          d = d * load<V>(u + c, lanes);
        }
        d = activate_grad<kAct>(zc, d);
      }
      emit(0, c, d, lanes);
    });
  }
}

// Rows [begin, end): kSumRows rows are summed, then those sums, so that rounding errors grow with
// the root of neither count alone.
template <class T, Activation kAct>
void backward_chunk(const LinearBwdArgs& a, int64_t begin, int64_t end, Compute<T>* outer) {
  using C = Compute<T>;
  const bool any = a.dbias[0] || a.dbias[1];
  C* const inner = outer + 2 * a.cols;
  C* const sum[2] = {a.dbias[0] ? inner : nullptr, a.dbias[1] ? inner + a.cols : nullptr};
  if (any)
    for (int64_t i = 0; i < 4 * a.cols; ++i) outer[i] = 0;
  for (int64_t row = begin; row < end; ++row) {
    backward_row<T, kAct>(a, row, sum);
    if (any && ((row - begin) % kSumRows == kSumRows - 1 || row == end - 1)) {
      for (int64_t i = 0; i < 2 * a.cols; ++i) {
        outer[i] += inner[i];
        inner[i] = 0;
      }
    }
  }
}

template <class T>
void sum_chunks(const LinearBwdArgs& a, int64_t chunks) {
  using C = Compute<T>;
  for (int part = 0; part < 2; ++part) {
    if (!a.dbias[part]) continue;
    T* const out = static_cast<T*>(a.dbias[part]);
    const C* const sums = static_cast<const C*>(a.scratch) + part * a.cols;
    for (int64_t c = 0; c < a.cols; ++c) {
      C total = 0;
      for (int64_t i = 0; i < chunks; ++i) total += sums[i * 4 * a.cols + c];
      put(out + c, total);
    }
  }
}

template <class T>
void backward(const LinearBwdArgs& a) {
  const int64_t chunks = min_of<int64_t>(kLinearBwdChunks, a.rows);
  with_activation(a.activation, [&](auto kind) {
    const auto chunk = [&](int64_t i, int) {
      backward_chunk<T, decltype(kind)::value>(
          a, a.rows * i / chunks, a.rows * (i + 1) / chunks,
          static_cast<Compute<T>*>(a.scratch) + i * 4 * a.cols);
    };
    if (a.rows * a.cols >= kGrainElements) return parallel_for(chunks, chunk);
    for (int64_t i = 0; i < chunks; ++i) chunk(i, 0);
  });
  sum_chunks<T>(a, chunks);
}

}  // namespace

void linear_epilogue(const LinearEpilogueArgs& a) {
  if (a.rows == 0 || a.cols == 0) return;
  switch (a.dtype) {
    case DType::kFloat32:
      return epilogue<float>(a);
    case DType::kBFloat16:
      return epilogue<BFloat16>(a);
    case DType::kFloat16:
      return epilogue<Float16>(a);
    case DType::kFloat64:
      return epilogue<double>(a);
  }
}

void linear_bwd(const LinearBwdArgs& a) {
  if (a.cols == 0) return;
  switch (a.dtype) {
    case DType::kFloat32:
      return backward<float>(a);
    case DType::kBFloat16:
      return backward<BFloat16>(a);
    case DType::kFloat16:
      return backward<Float16>(a);
    case DType::kFloat64:
      return backward<double>(a);
  }
}

}  // namespace LLMKERN_ISA
}  // namespace llmkern
