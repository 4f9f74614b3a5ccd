"""Libraries built by nvcc: their launches, copies and variables reach the emulator."""

import ctypes
import shutil
import subprocess

import pytest
import torch

from llmkern import emulator

SOURCE = r"""
#include <cuda_runtime.h>
__constant__ float factor;
__device__ float table[4];
struct Rows { const float* in; float* out; int n; };
template <class T> __global__ void scale(const T* x, T* y, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i] = x[i] * factor + table[i % 4];
}
__global__ void reverse(Rows r) {
  extern __shared__ float s[];
  s[threadIdx.x] = r.in[threadIdx.x];
  __syncthreads();
  r.out[threadIdx.x] = s[r.n - 1 - threadIdx.x];
}
__global__ void racy(const float* x, float* y) {
  __shared__ float s[64];
  s[threadIdx.x] = 0;
  __syncthreads();
  s[threadIdx.x] = x[threadIdx.x];
  y[threadIdx.x] = s[63 - threadIdx.x];
}
extern "C" int run_scale(const float* x, float* y, int n, float f) {
  float t[4] = {0, 1, 2, 3};
  cudaMemcpyToSymbol(factor, &f, sizeof f);
  cudaMemcpyToSymbol(table, t, sizeof t);
  scale<float><<<(n + 127) / 128, 128>>>(x, y, n);
  return (int)cudaGetLastError();
}
extern "C" int run_reverse(const float* x, float* y, int n, int shared) {
  cudaFuncSetAttribute(reverse, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  reverse<<<1, n, shared>>>(Rows{x, y, n});
  return (int)cudaGetLastError();
}
extern "C" int run_copy(const float* host, float* back, int n, int wrong) {
  float *a, *b;
  cudaMalloc(&a, n * sizeof(float));
  cudaMalloc(&b, n * sizeof(float));
  cudaMemcpy(a, host, n * sizeof(float), cudaMemcpyHostToDevice);
  scale<float><<<(n + 127) / 128, 128>>>(a, b, n + wrong);
  cudaMemcpy(back, b, n * sizeof(float), cudaMemcpyDeviceToHost);
  cudaFree(a);
  cudaFree(b);
  return (int)cudaGetLastError();
}
extern "C" int run_racy(const float* x, float* y) {
  racy<<<1, 64>>>(x, y);
  return (int)cudaGetLastError();
}
extern "C" const char* text(int error) { return cudaGetErrorString((cudaError_t)error); }
"""

INSUFFICIENT_DRIVER, LAUNCH_FAILURE = 35, 719


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not on PATH")
    folder = tmp_path_factory.mktemp("cuda")
    source, built = folder / "kernels.cu", folder / "libkernels.so"
    source.write_text(SOURCE)
    options = "-shared -Xcompiler -fPIC --cudart=shared --compress-mode=none -lineinfo"
    arch = "arch=compute_80,code=[sm_80,compute_80]"
    subprocess.run([nvcc, *options.split(), "-gencode", arch, source, "-o", built], check=True)
    loaded = emulator.load_library(built)
    loaded.text.restype = ctypes.c_char_p
    return loaded


def _at(tensor):
    return ctypes.c_void_p(tensor.data_ptr())


def test_templates_constants_and_device_variables(library):
    x, y = torch.randn(300), torch.zeros(300)
    with emulator.device("sm_80") as dev:
        dev.register(x)
        dev.register(y)
        assert library.run_scale(_at(x), _at(y), 300, ctypes.c_float(2.0)) == 0
        assert dev.counters().launches == 1
    torch.testing.assert_close(y, x * 2 + torch.arange(300) % 4)


def test_structs_by_value_and_dynamic_shared_memory_above_48_kib(library):
    x, y = torch.randn(256), torch.zeros(256)
    with emulator.device("sm_80") as dev:
        dev.register(x)
        dev.register(y)
        assert library.run_reverse(_at(x), _at(y), 256, 100_000) == 0
    assert torch.equal(y, x.flip(0))


def test_more_shared_memory_than_the_architecture_has_is_refused(library):
    x, y = torch.randn(256), torch.zeros(256)
    with emulator.device("sm_86") as dev:
        dev.register(x)
        dev.register(y)
        error = library.run_reverse(_at(x), _at(y), 256, 120_000)
        assert error != 0 and b"dynamic shared memory" in library.text(error)
    assert not y.any()


def test_memory_of_cuda_malloc_is_checked(library):
    host, back = torch.randn(100), torch.zeros(100)
    with emulator.device("sm_80"):
        assert library.run_copy(_at(host), _at(back), 100, 0) == 0
    with pytest.raises(emulator.EmulatorError, match="out of bounds"):
        with emulator.device("sm_80"):
            assert library.run_copy(_at(host), _at(back), 100, 1) == LAUNCH_FAILURE


def test_a_race_names_kernel_source_line_and_reaches_python(library):
    x, y = torch.randn(64), torch.zeros(64)
    with emulator.device("sm_80") as dev:
        dev.register(x)
        dev.register(y)
        assert library.run_racy(_at(x), _at(y)) == LAUNCH_FAILURE
        assert b"race" in library.text(LAUNCH_FAILURE)
        with pytest.raises(emulator.EmulatorError) as caught:
            dev.raise_failure()
    assert caught.value.check == "shared race" and "kernels.cu:" in caught.value.source
    assert "racy" in caught.value.kernel


def test_tensors_that_were_not_registered_are_out_of_bounds(library):
    x, y = torch.randn(64), torch.zeros(64)
    with pytest.raises(emulator.EmulatorError, match="out of bounds"):
        with emulator.device("sm_80"):
            library.run_scale(_at(x), _at(y), 64, ctypes.c_float(1.0))


def test_without_a_device_a_launch_fails_as_without_a_driver(library):
    x = torch.zeros(64)
    assert library.run_racy(_at(x), _at(x)) == INSUFFICIENT_DRIVER
    assert b"no emulated device" in library.text(INSUFFICIENT_DRIVER)
