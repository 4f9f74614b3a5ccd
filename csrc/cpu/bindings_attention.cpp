#include <pybind11/stl.h>

#include <array>

#include "attention_bwd_plan.h"
#include "attention_fwd_plan.h"
#include "bindings.h"
#include "threads.h"

namespace llmkern {
namespace {

using Strides3 = std::array<int64_t, 3>;

// (dtype, B, H, G, S, T, D, Dv, scale, softcap, shift, left, right, drop_threshold, seed)
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
  s.softcap = t[9].cast<double>();
  s.shift = size(10);
  s.left = size(11);
  s.right = size(12);
  s.drop_threshold = t[13].cast<uint32_t>();
  s.drop_scale =
      s.drop_threshold < 65536 ? 65536.0f / static_cast<float>(65536 - s.drop_threshold) : 0.0f;
  s.seed = pointer<const int64_t>(t[14].cast<TensorData>());
  return s;
}

template <size_t N>
void copy_strides(const py::handle& from, int64_t (&to)[N]) {
  const auto strides = from.cast<std::array<int64_t, N>>();
  for (size_t i = 0; i < N; ++i) to[i] = strides[i];
}

// (q, strides, k, strides, v, strides, bias, strides, mask, strides, key_mask, slopes, strides,
// sinks)
AttentionInputs inputs_of(const py::tuple& t) {
  const auto at = [&](size_t i) { return t[i].cast<TensorData>(); };
  AttentionInputs in{};
  in.q = pointer(at(0));
  copy_strides(t[1], in.q_stride);
  in.k = pointer(at(2));
  copy_strides(t[3], in.k_stride);
  in.v = pointer(at(4));
  copy_strides(t[5], in.v_stride);
  in.bias = pointer(at(6));
  copy_strides(t[7], in.bias_stride);
  in.mask = pointer<const uint8_t>(at(8));
  copy_strides(t[9], in.mask_stride);
  in.key_mask = pointer<const uint8_t>(at(10));
  in.slopes = pointer<const float>(at(11));
  copy_strides(t[12], in.slopes_stride);
  in.sinks = pointer<const float>(at(13));
  return in;
}

void forward(const py::tuple& shape, const py::tuple& inputs, TensorData out,
             const Strides3& out_stride, TensorData lse, TensorData scratch) {
  AttentionFwdArgs a{};
  a.shape = shape_of(shape);
  a.in = inputs_of(inputs);
  a.out = pointer(out);
  for (int i = 0; i < 3; ++i) a.out_stride[i] = out_stride[i];
  a.lse = pointer(lse);
  a.scratch = pointer(scratch);
  py::gil_scoped_release release;
  table().attention_fwd(a);
}

// Each of tensors and gradients is a tensor followed by strides: (out, dout) and (dq, dk, dv,
// dbias).
void backward(const py::tuple& shape, const py::tuple& inputs, const py::tuple& tensors,
              TensorData lse, TensorData dlse, const py::tuple& gradients, TensorData dsinks,
              TensorData scratch) {
  AttentionBwdArgs a{};
  a.shape = shape_of(shape);
  a.in = inputs_of(inputs);
  a.out = pointer(tensors[0].cast<TensorData>());
  copy_strides(tensors[1], a.out_stride);
  a.dout = pointer(tensors[2].cast<TensorData>());
  copy_strides(tensors[3], a.dout_stride);
  a.lse = pointer(lse);
  a.dlse = pointer(dlse);
  a.dq = pointer(gradients[0].cast<TensorData>());
  copy_strides(gradients[1], a.dq_stride);
  a.dk = pointer(gradients[2].cast<TensorData>());
  copy_strides(gradients[3], a.dk_stride);
  a.dv = pointer(gradients[4].cast<TensorData>());
  copy_strides(gradients[5], a.dv_stride);
  a.dbias = pointer(gradients[6].cast<TensorData>());
  copy_strides(gradients[7], a.dbias_stride);
  a.dsinks = pointer<float>(dsinks);
  a.scratch = pointer(scratch);
  py::gil_scoped_release release;
  table().attention_bwd(a);
}

}  // namespace

void bind_attention(py::module_& m) {
  m.attr("UNBOUNDED") = kUnbounded;
  m.def("attention_fwd_scratch_bytes", [](const py::tuple& shape) {
    return attention_fwd_scratch_bytes(shape_of(shape), max_threads());
  });
  m.def("attention_fwd", &forward);
  m.def("attention_bwd_scratch_bytes", [](const py::tuple& shape) {
    return attention_bwd_scratch_bytes(shape_of(shape), max_threads());
  });
  m.def("attention_bwd", &backward);
}

}  // namespace llmkern
