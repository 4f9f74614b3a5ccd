"""Device functions, printf, assertions and trap in the emulator."""

import shutil
import subprocess

import pytest
import torch
from emulator_ptx import HEADER, kernel, launch

from llmkern import emulator
from llmkern.emulator import EmulatorError, Program, PtxError, device

FUNCTIONS = """
.func (.param .b32 result) collatz(.param .b32 x);

.func (.param .b32 result) twice(.param .b32 x)
{
  .reg .b32 %r<4>;
  ld.param.u32 %r1, [x];
  shl.b32 %r2, %r1, 1;
  st.param.b32 [result], %r2;
  ret;
}

// x / 2, or 3 x + 1
.func (.param .b32 result) collatz(.param .b32 x)
{
  .reg .pred %p<2>;
  .reg .b32 %r<6>;
  ld.param.u32 %r1, [x];
  and.b32 %r2, %r1, 1;
  setp.ne.u32 %p1, %r2, 0;
  @%p1 bra ODD;
  shr.u32 %r3, %r1, 1;
  st.param.b32 [result], %r3;
  ret;
ODD:
  {
    .param .b32 passed;
    .param .b32 got;
    st.param.b32 [passed], %r1;
    call.uni (got), twice, (passed);
    ld.param.b32 %r4, [got];
  }
  add.s32 %r4, %r4, %r1;
  add.s32 %r4, %r4, 1;
  st.param.b32 [result], %r4;
  ret;
}

.func store(.param .b64 to, .param .b32 x)
{
  .reg .b32 %r<2>;
  .reg .b64 %d<2>;
  ld.param.u64 %d1, [to];
  ld.param.u32 %r1, [x];
  st.global.u32 [%d1], %r1;
}
"""

CALLS = """
  .reg .b64 %own<2>;
  mov.u32 %r1, %r40;
  mov.u32 %r2, 0;
AGAIN:
  {
    .param .b32 a; .param .b32 b;
    st.param.b32 [a], %r1;
    call.uni (b), collatz, (a);
    ld.param.b32 %r1, [b];
  }
  add.s32 %r2, %r2, 1;
  setp.lt.u32 %p1, %r2, 3;
  @%p1 bra AGAIN;
  shfl.sync.idx.b32 %r3, %r1, 0, 31, -1;
  mad.wide.u32 %own1, %r40, 4, %d40;
  setp.ne.u32 %p2, %r40, 5;
  {
    .param .b64 to; .param .b32 x;
    st.param.b64 [to], %own1;
    st.param.b32 [x], %r1;
    @%p2 call store, (to, x);
  }
"""


def test_functions_branch_call_each_other_and_come_back_together():
    def collatz(x: int) -> int:
        return 3 * x + 1 if x % 2 else x // 2

    out = torch.full((32,), -1, dtype=torch.int32)
    launch(kernel(CALLS, 1, module=FUNCTIONS), out)
    want = [collatz(collatz(collatz(i))) for i in range(32)]
    want[5] = -1  # its call was guarded
    assert out.tolist() == want


def test_checks_see_through_calls():
    ptx = kernel(CALLS, 1, module=FUNCTIONS)
    with pytest.raises(EmulatorError) as caught:
        launch(ptx, torch.zeros(20, dtype=torch.int32))
    assert caught.value.check == "out of bounds" and caught.value.lane == 20
    assert caught.value.line == ptx[: ptx.index("st.global.u32 [%d1], %r1;")].count("\n") + 1


@pytest.mark.parametrize(
    "wrong, message",
    [
        ("call somewhere;", "calls of 'somewhere'"),
        ("call twice;", "expected 1 parameters, got 0"),
        ("{ .param .b64 a; .param .b32 b; call (b), twice, (a); }", "no parameter of 4 bytes"),
        ("{ .param .b32 a; .param .b32 b; call.some (b), twice, (a); }", "unknown modifier"),
        ("{ .param .b32 a; .param .b32 b; call (b), endless, (a); }", "calls itself"),
    ],
)
def test_calls_that_cannot_be_opened_are_refused_with_their_line(wrong, message):
    endless = FUNCTIONS.replace("twice, (passed)", "endless, (passed)").replace(
        "collatz", "endless"
    )
    ptx = kernel(
        "  // here\n  " + wrong, 0, module=FUNCTIONS + endless[endless.index("// x / 2") :]
    )
    with pytest.raises(PtxError, match=message):
        Program(ptx)


PRINTF = """
.extern .func (.param .b32 status) vprintf(.param .b64 format, .param .b64 list);
.global .align 1 .b8 format[32] = {37, 100, 32, 37, 46, 50, 102, 32, 37, 108, 108, 120, 10, 0};
"""  # "%d %.2f %llx\n"
PRINTS = """
  .local .align 8 .b8 list[24];
  mov.u64 %d1, list;
  cvta.local.u64 %d2, %d1;
  mov.u32 %r1, %ctaid.x;
  mad.lo.s32 %r2, %r1, 100, %r40;
  st.local.u32 [%d1], %r2;
  mov.f64 %d3, 0d3FF4000000000000;
  st.local.f64 [%d1+8], %d3;
  mov.u64 %d4, 0x123456789abc;
  st.local.u64 [%d1+16], %d4;
  mov.u64 %d5, format;
  cvta.global.u64 %d6, %d5;
  setp.lt.u32 %p1, %r40, 2;
  @!%p1 bra DONE;
  {
    .param .b64 p; .param .b64 q; .param .b32 r;
    st.param.b64 [p], %d6;
    st.param.b64 [q], %d2;
    call.uni (r), vprintf, (p, q);
    ld.param.b32 %r3, [r];
  }
  mad.wide.u32 %d7, %r1, 4, %d40;
  st.global.u32 [%d7], %r3;
DONE:
"""


@pytest.mark.parametrize("threads", [1, 2])
def test_printf_writes_cta_by_cta_and_returns_its_arguments(capsys, threads):
    out = torch.zeros(3, dtype=torch.int32)
    want = "".join(f"{c * 100 + t} 1.25 123456789abc\n" for c in range(3) for t in range(2))
    with device("sm_80", threads=threads) as dev:
        dev.launch(Program(kernel(PRINTS, 1, module=PRINTF)), "k", 3, 32, [out])
        assert dev.printed == want
    assert capsys.readouterr().out == want
    assert out.tolist() == [3, 3, 3]


def test_what_was_printed_before_a_failure_is_shown(capsys):
    with pytest.raises(EmulatorError):
        launch(kernel(PRINTS, 1, module=PRINTF), torch.zeros(1, dtype=torch.int32), grid=3)
    assert capsys.readouterr().out.splitlines() == [
        f"{n} 1.25 123456789abc" for n in (0, 1, 100, 101)
    ]


def test_trap_names_its_line_and_lane():
    body = "setp.eq.u32 %p1, %r40, 7;\n@%p1 trap;"
    with pytest.raises(EmulatorError) as caught:
        launch(kernel(body, 0))
    assert (caught.value.check, caught.value.lane, caught.value.text) == ("trap", 7, "@%p1 trap;")


SOURCE = r"""
#include <cassert>
#include <cstdio>
__device__ __noinline__ float power(float x, int n) {
  if (n == 0) return 1.0f;
  float y = x;
  for (int i = 1; i < n; ++i) y *= x;
  return y;
}
struct Point { float x, y, z; };
__device__ __noinline__ Point scaled(Point p, float s) { return {p.x * s, p.y * s, p.z * s}; }
extern "C" __global__ void calling(const float* x, float* out) {
  const float v = x[threadIdx.x];
  const Point p = scaled({v, 1.0f, power(v, threadIdx.x % 4)}, 2.0f);
  out[threadIdx.x] = p.x + p.y + p.z;
}
extern "C" __global__ void printing(const char* name, int n) {
  if (threadIdx.x == 0)
    printf("[%5.1f|%-4d|%s|%c|%5s|%%|%u|%lld|%*d]\n", 2.25, n, "text", 'c', "ab", 7u, -5ll, 4, 9);
}
extern "C" __global__ void checking(const int* x) { assert(x[threadIdx.x] != 7); }
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not here")
    folder = tmp_path_factory.mktemp("calls")
    (folder / "calls.cu").write_text(SOURCE)
    command = [nvcc, "-ptx", "-arch=compute_80", "-lineinfo", "calls.cu", "-o", "calls.ptx"]
    subprocess.run(command, cwd=folder, check=True)
    return Program((folder / "calls.ptx").read_text())


def test_functions_that_nvcc_does_not_inline(program):
    x, out = torch.randn(64), torch.zeros(64)
    program.launch("calling", 1, 64, [x, out])
    torch.testing.assert_close(out, 2 * (x + 1 + x ** (torch.arange(64) % 4)))


def test_formats_of_printf(program, capsys):
    program.launch("printing", 1, 32, [None, 42])
    assert capsys.readouterr().out == "[  2.2|42  |text|c|   ab|%|7|-5|   9]\n"


def test_assertions_say_what_where_and_in_which_function(program):
    x = torch.arange(32, dtype=torch.int32)
    with pytest.raises(EmulatorError, match=r"x\[threadIdx.x\] != 7") as caught:
        program.launch("checking", 1, 32, [x])
    assert caught.value.check == "assertion" and caught.value.lane == 7
    line = SOURCE[: SOURCE.index("assert(x")].count("\n") + 1
    assert f"calls.cu:{line}: void checking(const int *)" in caught.value.message


def test_module_without_kernels_has_none():
    assert Program(HEADER + FUNCTIONS).kernels() == []
    assert emulator.Program(HEADER).variables() == {}
