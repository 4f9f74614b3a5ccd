// Shared by the binding files, one file an op: bindings_<op>.cpp.
#pragma once

#include <pybind11/pybind11.h>

#include "kernel_table.h"
#include "llmkern/bindings_tensor.h"

namespace llmkern {

namespace py = pybind11;

const KernelTable& table();

void bind_attention(py::module_& m);
void bind_elementwise(py::module_& m);
void bind_linear(py::module_& m);
void bind_norm(py::module_& m);
void bind_probe(py::module_& m);
void bind_threads(py::module_& m);

}  // namespace llmkern
