#include <pybind11/stl.h>

#include <array>

#include "bindings.h"

namespace llmkern {
namespace {

// (dtype, B, H, G, S, T, D, Dv, scale, shift, left, right, drop_threshold, seed)
AttentionShape shape_of(const py::tuple& t) {
  const auto size = [&](size_t i) { return t[i].cast<int64_t>(); };
  AttentionShape s{};
  s.dtype = static_cast<DType>(t[0].cast<int>());
  s.batch = size(1);
  s.heads = size(2);
  s.kv_heads = size(3);
  s.q_len = size(4);
  s.kv_len = size(5);
  s.head_dim = size(6);
  s.value_dim = size(7);
  s.scale = t[8].cast<double>();
  s.shift = size(9);
  s.left = size(10);
  s.right = size(11);
  s.drop_threshold = t[12].cast<uint32_t>();
  s.seed = pointer<const int64_t>(t[13].cast<TensorData>());
  return s;
}

// A tensor and its strides (batch, head, row), at i and i + 1 of a tuple.
template <class P>
void tensor_at(const py::tuple& t, size_t i, P*& data, int64_t (&stride)[3]) {
  data = pointer<P>(t[i].cast<TensorData>());
  const auto strides = t[i + 1].cast<std::array<int64_t, 3>>();
  for (size_t n = 0; n < 3; ++n) stride[n] = strides[n];
}

// (q, strides, k, strides, v, strides, key_mask)
AttentionInputs inputs_of(const py::tuple& t) {
  AttentionInputs in{};
  tensor_at(t, 0, in.q, in.q_stride);
  tensor_at(t, 2, in.k, in.k_stride);
  tensor_at(t, 4, in.v, in.v_stride);
  in.key_mask = pointer<const uint8_t>(t[6].cast<TensorData>());
  return in;
}

void forward(const py::tuple& place, const py::tuple& shape, const py::tuple& inputs,
             const py::tuple& out, TensorData lse) {
  AttentionFwdArgs a{};
  a.shape = shape_of(shape);
  a.in = inputs_of(inputs);
  tensor_at(out, 0, a.out, a.out_stride);
  a.lse = pointer(lse);
  attention_fwd(a, place_of(place));
}

// tensors: out and dout; gradients: dq, dk, dv, None where not wanted.
void backward(const py::tuple& place, const py::tuple& shape, const py::tuple& inputs,
              const py::tuple& tensors, TensorData lse, TensorData dlse, const py::tuple& gradients,
              TensorData scratch) {
  AttentionBwdArgs a{};
  a.shape = shape_of(shape);
  a.in = inputs_of(inputs);
  tensor_at(tensors, 0, a.out, a.out_stride);
  tensor_at(tensors, 2, a.dout, a.dout_stride);
  a.lse = pointer(lse);
  a.dlse = pointer(dlse);
  tensor_at(gradients, 0, a.dq, a.dq_stride);
  tensor_at(gradients, 2, a.dk, a.dk_stride);
  tensor_at(gradients, 4, a.dv, a.dv_stride);
  a.scratch = pointer(scratch);
  attention_bwd(a, place_of(place));
}

}  // namespace

void bind_attention(py::module_& m) {
  m.def("attention_fwd", &forward);
  m.def("attention_bwd", &backward);
  m.def("attention_bwd_scratch", [](const py::tuple& shape, bool dq, bool dk, bool dv) {
    return attention_bwd_scratch(shape_of(shape), dq, dk, dv);
  });
}

}  // namespace llmkern
