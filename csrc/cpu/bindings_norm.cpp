#include "bindings.h"

namespace llmkern {
namespace {

NormShape with_seed(NormShape s, TensorData seed) {
  s.seed = pointer<const int64_t>(seed);
  return s;
}

// A call of a microsecond: giving the interpreter away and taking it back would show.
bool brief(const NormShape& s) { return s.rows * s.cols <= 4096; }

// Statistics are [mean, rstd] x rows, or [rstd] x rows for RMSNorm: where each starts. None where
// there are none.
struct Statistics {
  void *mean = nullptr, *rstd = nullptr;
  Statistics(const NormShape& s, TensorData tensor) {
    if (!tensor) return;
    const int64_t bytes = s.rows * (s.dtype == DType::kFloat64 ? 8 : 4);
    mean = s.rms ? nullptr : pointer(tensor);
    rstd = pointer(s.rms ? tensor.address : tensor.address + static_cast<uintptr_t>(bytes));
  }
};

}  // namespace

void bind_norm(py::module_& m) {
  // Made once for a spec by backends/cpu/norm.py: a tuple would be taken apart at each call.
  py::class_<NormShape>(m, "NormShape")
      .def(py::init([](int dtype, int x_dtype, int weight_dtype, int64_t rows, int64_t cols,
                       double eps, bool rms, bool unit_offset, uint32_t drop_threshold) {
        return NormShape{static_cast<DType>(dtype),
                         static_cast<DType>(x_dtype),
                         static_cast<DType>(weight_dtype),
                         rows,
                         cols,
                         eps,
                         rms,
                         unit_offset,
                         drop_threshold,
                         nullptr};
      }));
  m.def("norm_fwd", [](const NormShape& shape, TensorData seed, TensorData x, int64_t x_stride,
                       TensorData residual, int64_t residual_stride, TensorData weight,
                       TensorData bias, TensorData z, TensorData y, TensorData statistics) {
    const NormShape s = with_seed(shape, seed);
    const Statistics stats(s, statistics);
    const NormFwdArgs a{s,
                        pointer(x),
                        x_stride,
                        pointer(residual),
                        residual_stride,
                        pointer(weight),
                        pointer(bias),
                        pointer(z),
                        pointer(y),
                        stats.mean,
                        stats.rstd};
    if (brief(s)) return table().norm_fwd(a);
    py::gil_scoped_release release;
    table().norm_fwd(a);
  });
  m.def("norm_bwd", [](const NormShape& shape, TensorData seed, TensorData z, int64_t z_stride,
                       TensorData weight, TensorData statistics, TensorData dy, int64_t dy_stride,
                       TensorData dz, TensorData dx, TensorData dresidual, TensorData dweight,
                       TensorData dbias, TensorData scratch) {
    const NormShape s = with_seed(shape, seed);
    const Statistics stats(s, statistics);
    const NormBwdArgs a{s,
                        pointer(z),
                        z_stride,
                        pointer(weight),
                        stats.mean,
                        stats.rstd,
                        pointer(dy),
                        dy_stride,
                        pointer(dz),
                        pointer(dx),
                        pointer(dresidual),
                        pointer(dweight),
                        pointer(dbias),
                        pointer(scratch)};
    if (brief(s)) return table().norm_bwd(a);
    py::gil_scoped_release release;
    table().norm_bwd(a);
  });
  m.def(
      "norm_bwd_scratch",
      [](int64_t rows, int64_t cols) { return 2 * cols * norm_bwd_chunks(rows); },
      "Compute-type values of scratch that a weight or bias gradient takes.");
}

}  // namespace llmkern
