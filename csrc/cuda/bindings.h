// Shared by the binding files, one file an op: bindings_<op>.cpp.
#pragma once

#include <pybind11/pybind11.h>

#include "kernels.h"
#include "llmkern/bindings_tensor.h"

namespace llmkern {

namespace py = pybind11;

// (device index, stream handle)
inline Place place_of(const py::tuple& t) {
  return {t[0].cast<int>(), pointer(t[1].cast<uintptr_t>())};
}

void bind_attention(py::module_& m);
void bind_linear(py::module_& m);
void bind_norm(py::module_& m);

}  // namespace llmkern
