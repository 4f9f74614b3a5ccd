// Python sees the launchers as functions of tensors, sizes, strides and a place. No torch
// header here or below. All checking is done above, in llmkern/ops; a failed launch is a
// RuntimeError that names the kernel. Compiled once for each module name (tools/cuda_build.py).
#include "bindings.h"

namespace llmkern {

#define LLMKERN_DEFINE_MODULE(name, m) PYBIND11_MODULE(name, m)

LLMKERN_DEFINE_MODULE(LLMKERN_MODULE, m) {
  m.def("require_kernels", [](const py::tuple& place) { require_kernels(place_of(place)); });
  bind_attention(m);
  bind_linear(m);
  bind_norm(m);
}

}  // namespace llmkern
