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

int64_t scratch_of(const Shape& shape) {
  int64_t bytes = 0;
  table().gemm_scratch({shape_of(shape), &bytes});
  return bytes;
}

}  // namespace

void bind_linear(py::module_& m) {
  m.def("gemm_scratch", &scratch_of, "Bytes of scratch that gemm needs at the current threads.");
  m.def("gemm", [](const Shape& shape, TensorData a, TensorData b, TensorData up,
                   const Epilogue& epilogue, TensorData scratch) {
    const GemmArgs g{shape_of(shape),
                     pointer(a),
                     {pointer(b), pointer(up)},
                     epilogue_of(epilogue),
                     pointer(scratch)};
    py::gil_scoped_release release;
    table().gemm(g);
  });
  m.def("linear_epilogue", [](int dtype, int64_t rows, int64_t cols, TensorData product,
                              TensorData up_product, const Epilogue& epilogue) {
    const LinearEpilogueArgs a{static_cast<DType>(dtype),
                               rows,
                               cols,
                               {pointer(product), pointer(up_product)},
                               epilogue_of(epilogue)};
    py::gil_scoped_release release;
    table().linear_epilogue(a);
  });
  m.def("linear_bwd",
        [](int dtype, int64_t rows, int64_t cols, int activation, TensorData dy, int64_t dy_stride,
           TensorData preact, TensorData up_preact, uint32_t drop_threshold, TensorData seed,
           TensorData g, TensorData gu, TensorData dbias, TensorData dup_bias, TensorData scratch) {
          const LinearBwdArgs a{static_cast<DType>(dtype),
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
                                pointer(scratch)};
          py::gil_scoped_release release;
          table().linear_bwd(a);
        });
  m.attr("LINEAR_BWD_CHUNKS") = kLinearBwdChunks;
}

}  // namespace llmkern
