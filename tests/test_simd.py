"""The CPU kernels and the vectors that they are written on, instruction set by instruction set.

Each program under tests/simd is compiled for an instruction set and run; it compares the results
with plain scalar arithmetic and prints what differs. AVX-512 runs natively where the CPU has it,
and otherwise through SIMDe, which implements the intrinsics in plain C.
"""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROGRAMS = sorted(path.stem for path in (ROOT / "tests/simd").glob("check_*.cpp"))
AVX2 = "-mavx2 -mfma -mf16c"
AVX512 = "-mavx512f -mavx512bw -mavx512vl -mavx512dq"
VARIANTS = {
    "scalar": "-DLLMKERN_ISA=scalar",
    "avx2": f"-DLLMKERN_ISA=avx2 {AVX2}",
    "avx512": f"-DLLMKERN_ISA=avx512 {AVX2} {AVX512}",
    "avx512-simde": f"-DLLMKERN_ISA=avx512 {AVX2} -include {ROOT}/tests/simd/simde_avx512.h",
}
CPU_FLAGS = {
    "avx2": {"avx2", "fma", "f16c"},
    "avx512": {"avx512f", "avx512bw", "avx512vl", "avx512dq"},
}


def _cpu_flags() -> set[str]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return {flag for line in lines if line.startswith("flags") for flag in line.split()}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("program", PROGRAMS)
def test_matches_scalar_arithmetic(program, variant, tmp_path):
    missing = CPU_FLAGS.get(variant, set()) - _cpu_flags()
    if missing:
        pytest.skip(f"this CPU lacks {', '.join(sorted(missing))}")
    if variant == "avx512-simde":
        if CPU_FLAGS["avx2"] - _cpu_flags():
            pytest.skip("SIMDe runs on AVX2, which this CPU lacks")
        if not Path("/usr/include/simde").exists():
            pytest.skip("SIMDe is not installed (libsimde-dev)")
    binary = tmp_path / program
    flags = "-std=c++17 -O1 -fno-math-errno -fno-trapping-math -ffp-contract=fast"
    flags += " -fno-exceptions"  # GCC 12 crashes on SIMDe's code with them
    if (program, variant) == ("check_gemm", "scalar"):
        flags += " -O0"  # an optimised tile of scalar vectors takes a minute to compile
    compiler = os.environ.get("CXX", "c++")
    command = [compiler, *flags.split(), *VARIANTS[variant].split()]
    command += [f"-I{ROOT / 'csrc/include'}", f"-I{ROOT / 'csrc/cpu'}"]
    command += [str(ROOT / f"tests/simd/{program}.cpp"), "-o", str(binary)]
    subprocess.run(command, check=True)
    result = subprocess.run([binary], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
