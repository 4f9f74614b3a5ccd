#include "bindings.h"

namespace llmkern {

void bind_probe(py::module_& m) {
  m.def("probe_fma", [](int dtype, int64_t iterations, TensorData values) {
    int64_t flops = 0;
    const ProbeFmaArgs a{static_cast<DType>(dtype), iterations, pointer(values), &flops};
    {
      py::gil_scoped_release release;
      table().probe_fma(a);
    }
    return flops;
  });
  m.def("probe_move", [](int move, TensorData src, TensorData dst, int64_t n, int64_t repeats) {
    const ProbeMoveArgs a{static_cast<ProbeMove>(move), pointer<const float>(src),
                          pointer<float>(dst), n, repeats};
    py::gil_scoped_release release;
    table().probe_move(a);
  });
  m.attr("PROBE_VALUES_PER_THREAD") = kProbeChains * kProbeMaxLanes;
}

}  // namespace llmkern
