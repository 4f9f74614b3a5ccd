#include <pybind11/stl.h>

#include <tuple>

#include "bindings.h"

namespace llmkern {
namespace {

// (dtype, m, n, k, a strides (m, k), b strides (n, k), up strides (n, k), gated)
using Shape = std::tuple<int, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                         int64_t, int64_t, bool>;

GemmShape shape_of(const Shape& t) {
  return {static_cast<DType>(std::get<0>(t)),
          std::get<1>(t),
          std::get<2>(t),
          std::get<3>(t),
          {std::get<4>(t), std::get<5>(t)},
          {{std::get<6>(t), std::get<7>(t)}, {std::get<8>(t), std::get<9>(t)}},
          std::get<10>(t)};
}

// (activation, bias, up bias, preact, up preact, residual, residual stride, drop threshold, seed,
// y, y stride)
using Epilogue = std::tuple<int, TensorData, TensorData, TensorData, TensorData, TensorData,
                            int64_t, uint32_t, TensorData, TensorData, int64_t>;

LinearEpilogue epilogue_of(const Epilogue& t) {
  return {static_cast<Activation>(std::get<0>(t)),
          {pointer(std::get<1>(t)), pointer(std::get<2>(t))},
          {pointer(std::get<3>(t)), pointer(std::get<4>(t))},
          pointer(std::get<5>(t)),
          std::get<6>(t),
          std::get<7>(t),
          pointer<const int64_t>(std::get<8>(t)),
          pointer(std::get<9>(t)),
          std::get<10>(t)};
}

void product(const py::tuple& place, const Shape& shape, TensorData a, TensorData b, TensorData up,
             const Epilogue& epilogue, bool tf32, TensorData scratch) {
  gemm({shape_of(shape),
        pointer(a),
        {pointer(b), pointer(up)},
        epilogue_of(epilogue),
        pointer(scratch)},
       tf32, place_of(place));
}

void backward(const py::tuple& place, int dtype, int64_t rows, int64_t cols, int activation,
              TensorData dy, int64_t dy_stride, TensorData preact, TensorData up_preact,
              uint32_t drop_threshold, TensorData seed, TensorData g, TensorData gu,
              TensorData dbias, TensorData dup_bias, TensorData scratch) {
  linear_bwd({static_cast<DType>(dtype),
              rows,
              cols,
              static_cast<Activation>(activation),
              pointer(dy),
              dy_stride,
              {pointer(preact), pointer(up_preact)},
              drop_threshold,
              pointer<const int64_t>(seed),
              {pointer(g), pointer(gu)},
              {pointer(dbias), pointer(dup_bias)},
              pointer(scratch)},
             place_of(place));
}

}  // namespace

void bind_linear(py::module_& m) {
  m.def("gemm", &product);
  m.def(
      "gemm_scratch",
      [](int dtype, int64_t rows, int64_t cols, int64_t k, bool gated, bool tf32) {
        return gemm_scratch(static_cast<DType>(dtype), rows, cols, k, gated, tf32);
      },
      "Floats of scratch that a product takes.");
  m.def("linear_bwd", &backward);
  m.def(
      "linear_bwd_scratch",
      [](int dtype, int64_t rows, int64_t cols) {
        return linear_bwd_scratch(static_cast<DType>(dtype), rows, cols);
      },
      "Floats of scratch that a bias gradient takes.");
}

}  // namespace llmkern
