#include <type_traits>

#include "bindings.h"
#include "threads.h"

namespace llmkern {
namespace {

PyObject* new_thread_hook = nullptr;

// Kernels run with the interpreter given away or not.
void call_hook() {
  py::gil_scoped_acquire acquire;
  py::reinterpret_borrow<py::object>(new_thread_hook)();
}

}  // namespace

void bind_threads(py::module_& m) {
  m.def(
      "use_threads",
      [](const py::dict& entries, py::object in_new_thread) {
        const auto at = [&](auto& entry, const char* name) {
          if (!entries.contains(name)) return;
          entry = reinterpret_cast<std::decay_t<decltype(entry)>>(entries[name].cast<uintptr_t>());
        };
        ThreadRuntime r{};
        at(r.omp_in_parallel, "omp_in_parallel");
        at(r.omp_get_max_threads, "omp_get_max_threads");
        at(r.omp_get_thread_num, "omp_get_thread_num");
        at(r.omp_get_num_threads, "omp_get_num_threads");
        at(r.GOMP_parallel, "GOMP_parallel");
        at(r.kmpc_fork_call, "__kmpc_fork_call");
        at(r.kmpc_push_num_threads, "__kmpc_push_num_threads");
        at(r.kmpc_global_thread_num, "__kmpc_global_thread_num");
        Py_XDECREF(new_thread_hook);
        new_thread_hook = in_new_thread.release().ptr();
        r.in_new_thread = &call_hook;
        use_threads(r);
      },
      "Addresses of an OpenMP runtime's entry points by name, none for one thread; and a function "
      "to be called once in each thread that runs kernels.");
  m.def("max_threads", &max_threads, "Threads that a kernel called here may use.");
}

}  // namespace llmkern
