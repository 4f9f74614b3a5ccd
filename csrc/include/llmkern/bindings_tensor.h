// How a binding takes a tensor: as the Python object, with None for "none". Its address is read
// here and not in Python, so the arguments of the call hold the tensor until the call is over. An
// address taken in Python does not: a tracer (torch.compile) that stops between taking it and the
// call drops every local that the rest of the code does not name, and the kernel then writes to
// freed memory.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

namespace llmkern {

struct TensorData {
  uintptr_t address = 0;
  explicit operator bool() const { return address != 0; }
};

template <class T = void>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

template <class T = void>
T* pointer(TensorData tensor) {
  return pointer<T>(tensor.address);
}

}  // namespace llmkern

template <>
struct pybind11::detail::type_caster<llmkern::TensorData> {
  PYBIND11_TYPE_CASTER(llmkern::TensorData, const_name("Tensor | None"));

  bool load(handle source, bool) {
    if (source.is_none()) {
      value.address = 0;
      return true;
    }
    static PyObject* const name = PyUnicode_InternFromString("data_ptr");
    const auto found = reinterpret_steal<object>(PyObject_CallMethodNoArgs(source.ptr(), name));
    if (!found) throw error_already_set();
    value.address = reinterpret_cast<uintptr_t>(PyLong_AsVoidPtr(found.ptr()));
    if (PyErr_Occurred()) throw error_already_set();
    return true;
  }
};
