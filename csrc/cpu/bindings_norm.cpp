#include "bindings.h"

namespace llmkern {
namespace {

NormShape shape_of(int dtype, int weight_dtype, int64_t rows, int64_t cols, double eps, bool rms,
                   bool unit_offset, uint32_t drop_threshold, uintptr_t seed) {
  return {static_cast<DType>(dtype),
          static_cast<DType>(weight_dtype),
          rows,
          cols,
          eps,
          rms,
          unit_offset,
          drop_threshold,
          drop_threshold < 65536 ? 65536.0f / static_cast<float>(65536 - drop_threshold) : 0.0f,
          pointer<const int64_t>(seed)};
}

}  // namespace

void bind_norm(py::module_& m) {
  m.def("norm_fwd", [](int dtype, int weight_dtype, int64_t rows, int64_t cols, double eps,
                       bool rms, bool unit_offset, uint32_t drop_threshold, uintptr_t seed,
                       uintptr_t x, int64_t x_stride, uintptr_t residual, int64_t residual_stride,
                       uintptr_t weight, uintptr_t bias, uintptr_t z, uintptr_t y, uintptr_t mean,
                       uintptr_t rstd) {
    const NormFwdArgs a{
        shape_of(dtype, weight_dtype, rows, cols, eps, rms, unit_offset, drop_threshold, seed),
        pointer(x),
        x_stride,
        pointer(residual),
        residual_stride,
        pointer(weight),
        pointer(bias),
        pointer(z),
        pointer(y),
        pointer(mean),
        pointer(rstd)};
    py::gil_scoped_release release;
    table().norm_fwd(a);
  });
  m.def("norm_bwd", [](int dtype, int weight_dtype, int64_t rows, int64_t cols, double eps,
                       bool rms, bool unit_offset, uint32_t drop_threshold, uintptr_t seed,
                       uintptr_t z, int64_t z_stride, uintptr_t weight, uintptr_t mean,
                       uintptr_t rstd, uintptr_t dy, int64_t dy_stride, uintptr_t dz, uintptr_t dx,
                       uintptr_t dresidual, uintptr_t dweight, uintptr_t dbias, uintptr_t scratch) {
    const NormBwdArgs a{
        shape_of(dtype, weight_dtype, rows, cols, eps, rms, unit_offset, drop_threshold, seed),
        pointer(z),
        z_stride,
        pointer(weight),
        pointer(mean),
        pointer(rstd),
        pointer(dy),
        dy_stride,
        pointer(dz),
        pointer(dx),
        pointer(dresidual),
        pointer(dweight),
        pointer(dbias),
        pointer(scratch)};
    py::gil_scoped_release release;
    table().norm_bwd(a);
  });
  m.attr("NORM_BWD_CHUNKS") = kNormBwdChunks;
}

}  // namespace llmkern
