#include "bindings.h"

namespace llmkern {

void bind_elementwise(py::module_& m) {
  m.def("dropout", [](int dtype, int64_t rows, int64_t cols, TensorData x, int64_t x_stride,
                      TensorData y, int64_t y_stride, uint32_t threshold, TensorData seed) {
    const DropoutArgs a{static_cast<DType>(dtype),
                        rows,
                        cols,
                        pointer(x),
                        x_stride,
                        pointer(y),
                        y_stride,
                        threshold,
                        pointer<const int64_t>(seed)};
    py::gil_scoped_release release;
    table().dropout(a);
  });
  m.def("activation_fwd", [](int dtype, int activation, int64_t rows, int64_t cols, TensorData x,
                             int64_t x_stride, TensorData y, int64_t y_stride) {
    const ActivationFwdArgs a{static_cast<DType>(dtype),
                              static_cast<Activation>(activation),
                              rows,
                              cols,
                              pointer(x),
                              x_stride,
                              pointer(y),
                              y_stride};
    py::gil_scoped_release release;
    table().activation_fwd(a);
  });
  m.def("activation_bwd", [](int dtype, int activation, int64_t rows, int64_t cols, TensorData x,
                             int64_t x_stride, TensorData dy, int64_t dy_stride, TensorData dx) {
    const ActivationBwdArgs a{static_cast<DType>(dtype),
                              static_cast<Activation>(activation),
                              rows,
                              cols,
                              pointer(x),
                              x_stride,
                              pointer(dy),
                              dy_stride,
                              pointer(dx)};
    py::gil_scoped_release release;
    table().activation_bwd(a);
  });
}

}  // namespace llmkern
