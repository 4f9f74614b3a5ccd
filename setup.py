"""Builds the compiled parts without torch: plain C++ with pybind11, objects in parallel by ninja.

_C_cpu always; _C_cuda and _C_cuda_emulated where there is an nvcc (tools/cuda_build.py).

Kernel sources are compiled once per instruction set, each into a namespace of its own; the
extension picks one at run time. OpenMP is compiled in but not linked: at load,
llmkern.backends.cpu._ext hands the extension the OpenMP runtime that torch has mapped already,
whatever its file is called there.

Environment: LLMKERN_CUDA, LLMKERN_CUDA_ARCHS, CUDA_HOME (tools/cuda_build.py); CXX, CXXFLAGS;
LLMKERN_SANITIZE=1 builds the CPU part with AddressSanitizer and UndefinedBehaviorSanitizer.
"""

import os
import platform
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT / "tools"))

import cuda_build  # noqa: E402

CPU = Path("csrc/cpu")
KERNEL_SOURCES = "attention_bwd attention_fwd elementwise gemm linear norm probe".split()
BF16_SOURCES = ["probe"]  # those with kernels in LLMKERN_CPU_BF16_KERNELS (kernel_list.h)
X86_FLAGS = {
    "avx2": "-mavx2 -mfma -mf16c",
    "avx512": "-mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512vl -mavx512dq",
}
X86_FLAGS["avx512"] += " -mprefer-vector-width=512"
X86_FLAGS["avx512_bf16"] = X86_FLAGS["avx512"] + " -mavx512bf16 -mavx512vnni"


def is_x86() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64")


def common_flags() -> list[str]:
    import pybind11

    flags = [
        "-std=c++17",
        "-O3",
        "-fPIC",
        "-fvisibility=hidden",
        "-fopenmp",
        "-g0",
        "-Wall",
        "-Wextra",
    ]
    # GCC warns about the deliberately undefined sources inside its own AVX-512 headers.
    flags += ["-Wno-maybe-uninitialized", "-Wno-uninitialized"]
    flags += ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]
    if os.environ.get("LLMKERN_SANITIZE") == "1":
        flags += ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g1", "-O1"]
    if is_x86():
        flags.append("-DLLMKERN_HAVE_X86")
    includes = [
        ROOT / "csrc/include",
        ROOT / CPU,
        pybind11.get_include(),
        sysconfig.get_path("include"),
    ]
    return flags + [f"-I{path}" for path in includes] + shlex.split(os.environ.get("CXXFLAGS", ""))


def cpu_objects() -> list[tuple[str, Path, list[str]]]:
    """(object name, source, extra flags) for everything in the CPU extension."""
    objects = [(p.stem, p, []) for p in sorted((ROOT / CPU).glob("bindings*.cpp"))]
    objects.append(("kernel_table", ROOT / CPU / "kernel_table.cpp", []))
    isas = {"scalar": "", **(X86_FLAGS if is_x86() else {})}
    for isa, flags in isas.items():
        for name in BF16_SOURCES if isa == "avx512_bf16" else KERNEL_SOURCES:
            extra = [f"-DLLMKERN_ISA={isa}", *shlex.split(flags)]
            objects.append((f"{name}.{isa}", ROOT / CPU / f"{name}.cpp", extra))
    return objects


def ninja_path(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def write_ninja(build_dir: Path, outputs: dict[str, Path], toolkit) -> None:
    cxx = os.environ.get("CXX", "c++")
    link = ["-shared"]
    if os.environ.get("LLMKERN_SANITIZE") == "1":
        link.append("-fsanitize=address,undefined")
    lines = [
        "ninja_required_version = 1.5",
        f"cxx = {cxx}",
        f"flags = {shlex.join(common_flags())}",
        "rule compile",
        "  command = $cxx $flags $extra -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = $cxx {shlex.join(link)} $in -o $out",
    ]
    names = []
    for name, source, extra in cpu_objects():
        lines.append(f"build {name}.o: compile {ninja_path(source.resolve())}")
        lines.append(f"  extra = {shlex.join(extra)}")
        names.append(f"{name}.o")
    lines.append(f"build {ninja_path(outputs['llmkern._C_cpu'].resolve())}: link {' '.join(names)}")
    if toolkit is not None:
        product, emulated = (outputs[name] for name in CUDA_MODULES)
        lines += cuda_build.ninja_lines(ROOT, toolkit, product, emulated, ninja_path)
    (build_dir / "build.ninja").write_text("\n".join(lines) + "\n")


class NinjaBuildExt(build_ext):
    """All extensions by one ninja file, so that objects of all of them compile side by side."""

    def build_extensions(self) -> None:
        cuda_build.check(TOOLKIT)
        sanitize = os.environ.get("LLMKERN_SANITIZE") == "1"
        build_dir = Path(self.build_temp).resolve()
        build_dir /= "llmkern-sanitize" if sanitize else "llmkern"
        build_dir.mkdir(parents=True, exist_ok=True)
        outputs = {ext.name: Path(self.get_ext_fullpath(ext.name)) for ext in self.extensions}
        for output in outputs.values():
            output.parent.mkdir(parents=True, exist_ok=True)
            # A sanitizer build and a plain one share the output name.
            output.unlink(missing_ok=True)
        write_ninja(build_dir, outputs, TOOLKIT)
        subprocess.run([sys.executable, "-m", "ninja", "-C", str(build_dir)], check=True)


CUDA_MODULES = ("llmkern._C_cuda", "llmkern._C_cuda_emulated")
# Not checked here: setup.py also runs to ask what the build requires.
TOOLKIT = cuda_build.wanted()

setup(
    ext_modules=[
        Extension(name, sources=[])
        for name in ("llmkern._C_cpu", *(CUDA_MODULES if TOOLKIT else ()))
    ],
    cmdclass={"build_ext": NinjaBuildExt},
)
