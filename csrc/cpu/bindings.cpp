// Python sees the kernels as functions of tensors, sizes and strides. No torch header here or
// below: one build serves every torch. All checking is done above, in llmkern/ops.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "bindings.h"
#include "kernel_table.h"

namespace llmkern {
namespace {

constexpr int kMaxTables = 8;
const KernelTable* current_table = nullptr;

py::list isa_names() {
  const KernelTable* tables[kMaxTables];
  const int n = usable_tables(tables, kMaxTables);
  py::list names;
  for (int i = 0; i < n; ++i) names.append(tables[i]->isa);
  return names;
}

void select_isa(const std::string& name) {
  const KernelTable* tables[kMaxTables];
  const int n = usable_tables(tables, kMaxTables);
  for (int i = 0; i < n; ++i) {
    if (name == tables[i]->isa) {
      current_table = tables[i];
      return;
    }
  }
  throw std::invalid_argument("this CPU and build cannot run the instruction set '" + name + "'");
}

}  // namespace

const KernelTable& table() { return *current_table; }

PYBIND11_MODULE(_C_cpu, m) {
  m.def("isa_names", &isa_names,
        "Instruction sets that this build has and this CPU runs, best first.");
  m.def("select_isa", &select_isa, "Use the kernels of one of isa_names().");
  m.def("isa", [] { return table().isa; });
  select_isa(isa_names()[0].cast<std::string>());
  bind_attention(m);
  bind_elementwise(m);
  bind_linear(m);
  bind_norm(m);
  bind_probe(m);
  bind_threads(m);
}

}  // namespace llmkern
