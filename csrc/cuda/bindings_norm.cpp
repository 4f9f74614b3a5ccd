#include "bindings.h"

namespace llmkern {
namespace {

// (dtype, x_dtype, weight_dtype, rows, cols, eps, rms, unit_offset, drop_threshold), made once for
// a spec by backends/cuda/norm.py.
NormShape shape_of(const py::tuple& t, TensorData seed) {
  return {static_cast<DType>(t[0].cast<int>()),
          static_cast<DType>(t[1].cast<int>()),
          static_cast<DType>(t[2].cast<int>()),
          t[3].cast<int64_t>(),
          t[4].cast<int64_t>(),
          t[5].cast<double>(),
          t[6].cast<bool>(),
          t[7].cast<bool>(),
          t[8].cast<uint32_t>(),
          pointer<const int64_t>(seed)};
}

// Statistics are [mean, rstd] x rows, or [rstd] x rows for RMSNorm: where each starts.
struct Statistics {
  void *mean = nullptr, *rstd = nullptr;
  Statistics(const NormShape& s, TensorData tensor) {
    if (!tensor) return;
    mean = s.rms ? nullptr : pointer(tensor);
    rstd = pointer(s.rms ? tensor.address
                         : tensor.address + static_cast<uintptr_t>(s.rows) * sizeof(float));
  }
};

void forward(const py::tuple& place, const py::tuple& shape, TensorData seed, TensorData x,
             int64_t x_stride, TensorData residual, int64_t residual_stride, TensorData weight,
             TensorData bias, TensorData z, TensorData y, TensorData statistics) {
  const NormShape s = shape_of(shape, seed);
  const Statistics stats(s, statistics);
  norm_fwd({s, pointer(x), x_stride, pointer(residual), residual_stride, pointer(weight),
            pointer(bias), pointer(z), pointer(y), stats.mean, stats.rstd},
           place_of(place));
}

void backward(const py::tuple& place, const py::tuple& shape, TensorData seed, TensorData z,
              int64_t z_stride, TensorData weight, TensorData statistics, TensorData dy,
              int64_t dy_stride, TensorData dz, TensorData dx, TensorData dresidual,
              TensorData dweight, TensorData dbias, TensorData scratch) {
  const NormShape s = shape_of(shape, seed);
  const Statistics stats(s, statistics);
  norm_bwd({s, pointer(z), z_stride, pointer(weight), stats.mean, stats.rstd, pointer(dy),
            dy_stride, pointer(dz), pointer(dx), pointer(dresidual), pointer(dweight),
            pointer(dbias), pointer(scratch)},
           place_of(place));
}

}  // namespace

void bind_norm(py::module_& m) {
  m.def("norm_fwd", &forward);
  m.def("norm_bwd", &backward);
  m.def("norm_bwd_scratch", &norm_bwd_scratch,
        "Floats of scratch that a weight or bias gradient takes.");
}

}  // namespace llmkern
