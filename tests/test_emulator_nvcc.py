"""CUDA C++ through nvcc's PTX on the emulator: what compilers other than Triton emit."""

import shutil
import subprocess

import pytest
import torch
from emulator_ptx import HEADER

from llmkern.emulator import EmulatorError, Program

SOURCE = r"""
#include <cuda_fp16.h>
#include <mma.h>
#include <cassert>
#include <cstdio>
using namespace nvcuda;

template <int kTile>
__device__ void tiled(const float* a, const float* b, float* c, int n) {
  __shared__ float sa[kTile][kTile + 1], sb[kTile][kTile];
  const int row = blockIdx.y * kTile + threadIdx.y, column = blockIdx.x * kTile + threadIdx.x;
  float sum = 0;
  for (int k = 0; k < n; k += kTile) {
    const bool in_a = row < n && k + threadIdx.x < n, in_b = column < n && k + threadIdx.y < n;
    sa[threadIdx.y][threadIdx.x] = in_a ? a[row * n + k + threadIdx.x] : 0.0f;
    sb[threadIdx.y][threadIdx.x] = in_b ? b[(k + threadIdx.y) * n + column] : 0.0f;
    __syncthreads();
    for (int i = 0; i < kTile; ++i) sum += sa[threadIdx.y][i] * sb[i][threadIdx.x];
#ifndef BUG
    __syncthreads();
#endif
  }
  if (row < n && column < n) c[row * n + column] = sum;
}
extern "C" __global__ void matmul(const float* a, const float* b, float* c, int n) {
  tiled<16>(a, b, c, n);
}

extern "C" __global__ void tensor_cores(const half* a, const half* b, float* c, int k) {
  wmma::fragment<wmma::matrix_a, 16, 16, 16, half, wmma::row_major> fa;
  wmma::fragment<wmma::matrix_b, 16, 16, 16, half, wmma::row_major> fb;
  wmma::fragment<wmma::accumulator, 16, 16, 16, float> fc;
  wmma::fill_fragment(fc, 1.0f);
  for (int i = 0; i < k; i += 16) {
    wmma::load_matrix_sync(fa, a + i, k);
    wmma::load_matrix_sync(fb, b + i * 16, 16);
    wmma::mma_sync(fc, fa, fb, fc);
  }
  wmma::store_matrix_sync(c, fc, 16, wmma::mem_row_major);
}

struct Pair { int n; float scale; };
extern "C" __global__ void reduce(const float* x, float* out, Pair p) {
  extern __shared__ float partial[];
  float sum = 0;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < p.n; i += gridDim.x * blockDim.x) {
    sum += x[i] * p.scale;
  }
  for (int step = 16; step > 0; step /= 2) sum += __shfl_down_sync(0xffffffffu, sum, step);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x < blockDim.x / 32) sum = partial[threadIdx.x];
  if (threadIdx.x == 0) {
    for (int i = 1; i < blockDim.x / 32; ++i) sum += partial[i];
    atomicAdd(out, sum);
  }
}

extern "C" __global__ void branchy(const int* x, long long* out, int n) {
  const int i = threadIdx.x;
  if (i >= n) return;
  int scratch[8];
  for (int j = 0; j < 8; ++j) scratch[j] = x[(i + j) % n];
  long long sum = 0;
  for (int j = 0; j < x[i] % 7; ++j) {
    switch (x[i] % 5) {
      case 0: sum += scratch[j % 8]; break;
      case 1: sum -= scratch[(j + x[i]) % 8]; continue;
      case 2: sum ^= 5; break;
      case 3: sum = sum * 3 + __popc(j); break;
      default: sum += (long long)x[i] * x[i] / (j + 1);
    }
    if (sum > 100000) break;
  }
  out[i] = sum;
}

extern "C" __global__ void asserting(const int* x) {
  if (threadIdx.x == 5) printf("%d\n", x[0]);
  assert(x[threadIdx.x] != 7);
}

extern "C" __global__ void halves(const half2* x, half2* y, float* z) {
  const half2 v = x[threadIdx.x];
  y[threadIdx.x] = __hfma2(v, v, __hmax2(__hneg2(v), v));
  z[threadIdx.x] = tanhf(__low2float(v)) + expf(-fabsf(__high2float(v))) + __hgt(v.x, v.y);
}
"""


@pytest.fixture(scope="module")
def compile_ptx(tmp_path_factory):
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not here")
    folder = tmp_path_factory.mktemp("nvcc")
    source = folder / "kernels.cu"
    source.write_text(SOURCE)

    def compile_(*flags: str) -> Program:
        out = folder / ("kernels" + "".join(flags) + ".ptx")
        command = [nvcc, "-ptx", "-arch=compute_80", "-lineinfo", *flags, source, "-o", out]
        run = subprocess.run(command, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        return Program(out.read_text())

    return compile_


@pytest.fixture(scope="module")
def program(compile_ptx):
    return compile_ptx()


def test_tiled_matmul_and_its_missing_barrier(program, compile_ptx):
    a, b, c = torch.randn(40, 40), torch.randn(40, 40), torch.zeros(40, 40)
    program.launch("matmul", (3, 3), (16, 16), [a, b, c, 40])
    assert torch.allclose(c, a @ b, atol=1e-4)
    with pytest.raises(EmulatorError) as caught:
        compile_ptx("-DBUG").launch("matmul", (3, 3), (16, 16), [a, b, c, 40])
    # Rows of 16 threads: the first to meet may be of one warp or of two.
    assert caught.value.check in ("shared race", "warp race")
    assert "kernels.cu:" in caught.value.source


def test_tensor_cores_by_wmma(program):
    a, b, c = torch.randn(16, 48).half(), torch.randn(48, 16).half(), torch.zeros(16, 16)
    program.launch("tensor_cores", 1, 32, [a, b, c, 48])
    assert torch.allclose(c, a.float() @ b.float() + 1, atol=1e-3)


def test_reduction_with_a_struct_and_dynamic_shared_memory(program):
    x, out = torch.randn(5000), torch.zeros(1)
    pair = (5000).to_bytes(4, "little") + torch.tensor([0.5]).numpy().tobytes()
    program.launch("reduce", 6, 256, [x, out, pair], shared_bytes=32)
    assert torch.allclose(out, x.sum() * 0.5, atol=1e-3)
    with pytest.raises(EmulatorError) as caught:
        program.launch("reduce", 6, 256, [x, out, pair], shared_bytes=16)
    assert caught.value.check == "out of bounds" and "shared memory" in caught.value.message


def branchy(x: list[int]) -> list[int]:
    out = []
    for i, v in enumerate(x):
        scratch = [x[(i + j) % len(x)] for j in range(8)]
        total = 0
        for j in range(v % 7):
            kind = v % 5
            if kind == 0:
                total += scratch[j % 8]
            elif kind == 1:
                total -= scratch[(j + v) % 8]
                continue
            elif kind == 2:
                total ^= 5
            elif kind == 3:
                total = total * 3 + j.bit_count()
            else:
                total += v * v // (j + 1)
            if total > 100000:
                break
        out.append(total)
    return out


def test_branches_local_arrays_and_early_exit(program):
    x = torch.randint(0, 1000, (50,), generator=torch.Generator().manual_seed(1)).int()
    out = torch.full((64,), -1, dtype=torch.int64)
    program.launch("branchy", 1, 64, [x, out, 50])
    assert out.tolist() == branchy(x.tolist()) + [-1] * 14


def test_a_failed_assertion_says_what_it_asserted(program):
    x = torch.zeros(32, dtype=torch.int32)
    program.launch("asserting", 1, 32, [x])
    x[9] = 7
    with pytest.raises(EmulatorError, match=r"x\[threadIdx.x\] != 7") as caught:
        program.launch("asserting", 1, 32, [x])
    assert (caught.value.check, caught.value.lane) == ("assertion", 9)


def test_half_intrinsics(program):
    x = torch.randn(64, 2).half()
    y, z = torch.zeros(64, 2).half(), torch.zeros(64)
    program.launch("halves", 1, 64, [x, y, z])
    wide = x.double()
    assert torch.equal(y, (wide * wide + wide.abs()).half())
    want = wide[:, 0].tanh() + (-wide[:, 1].abs()).exp() + (wide[:, 0] > wide[:, 1])
    assert torch.allclose(z.double(), want, atol=1e-5)


def test_calls_of_unknown_functions_are_refused():
    from llmkern.emulator import PtxError

    text = HEADER + ".visible .entry k() { call.uni somewhere; ret; }"
    with pytest.raises(PtxError, match="calls of 'somewhere'"):
        Program(text)
