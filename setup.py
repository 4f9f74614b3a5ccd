"""Builds the compiled parts without torch: plain C++ with pybind11, objects in parallel by ninja.

llmkern._C_cpu holds the CPU kernels; its sources are compiled once per instruction set, each into a
namespace of its own, and it picks one at run time. OpenMP is compiled in but not linked: at load,
llmkern.backends.cpu._ext hands the extension the OpenMP runtime that torch has mapped already,
whatever its file is called there. llmkern._C_emulator executes PTX on the CPU; beside it lies the
stand-in for libcudart.so.13 that brings it the launches of libraries built by nvcc.
llmkern._C_cuda and llmkern._C_cuda_emulated hold the CUDA kernels, where there is an nvcc
(tools/cuda_build.py).

Environment: LLMKERN_CUDA, LLMKERN_CUDA_ARCHS, CUDA_HOME (tools/cuda_build.py); LLMKERN_EMULATOR=off
and LLMKERN_CPU=off leave the emulator or the CPU kernels out; CXX, CXXFLAGS;
LLMKERN_SANITIZE=1 builds all but the CUDA part with AddressSanitizer and
UndefinedBehaviorSanitizer.
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
EMULATOR = Path("csrc/emulator")
CUDART = EMULATOR / "cudart"
CUDART_NAME = cuda_build.RUNTIME
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
    """For every object of every extension, before the object's own."""
    import pybind11

    flags = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-g0", "-Wall", "-Wextra"]
    # GCC warns about the deliberately undefined sources inside its own AVX-512 headers.
    flags += ["-Wno-maybe-uninitialized", "-Wno-uninitialized"]
    flags += ["-fno-math-errno"]
    if os.environ.get("LLMKERN_SANITIZE") == "1":
        flags += ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g1"]
    if is_x86():
        flags.append("-DLLMKERN_HAVE_X86")
    includes = [
        ROOT / "csrc/include",
        ROOT / CPU,
        ROOT / EMULATOR,
        pybind11.get_include(),
        sysconfig.get_path("include"),
    ]
    return flags + [f"-I{path}" for path in includes]


def optimised(*flags: str) -> list[str]:
    """An object's own flags; a sanitizer build is optimised less, CXXFLAGS come last."""
    level = ["-O1"] if os.environ.get("LLMKERN_SANITIZE") == "1" else []
    return [*flags, *level, *shlex.split(os.environ.get("CXXFLAGS", ""))]


def cpu_objects() -> list[tuple[str, Path, list[str]]]:
    """(object name, source, extra flags) for everything in the CPU extension."""
    own = optimised("-O3", "-fno-trapping-math", "-ffp-contract=fast")
    objects = [(p.stem, p, own) for p in sorted((ROOT / CPU).glob("bindings*.cpp"))]
    objects += [(name, ROOT / CPU / f"{name}.cpp", own) for name in ("kernel_table", "threads")]
    isas = {"scalar": "", **(X86_FLAGS if is_x86() else {})}
    for isa, flags in isas.items():
        for name in BF16_SOURCES if isa == "avx512_bf16" else KERNEL_SOURCES:
            extra = [*own, f"-DLLMKERN_ISA={isa}", *shlex.split(flags)]
            objects.append((f"{name}.{isa}", ROOT / CPU / f"{name}.cpp", extra))
    return objects


def emulator_objects() -> list[tuple[str, Path, list[str]]]:
    """The emulator: IEEE arithmetic as written, lane loops vectorised."""
    own = ["-O2", "-ftree-vectorize", "-fvect-cost-model=dynamic", "-fno-strict-aliasing"]
    own = optimised(*own, "-ffp-contract=off", "-frounding-math", "-pthread")
    return [(p.stem, p, own) for p in sorted((ROOT / EMULATOR).glob("*.cpp"))]


def cudart_objects() -> list[tuple[str, Path, list[str]]]:
    own = optimised("-O2", "-fvisibility=default")
    return [(f"cudart_{p.stem}", p, own) for p in sorted((ROOT / CUDART).glob("*.cpp"))]


OBJECTS = {}
if os.environ.get("LLMKERN_CPU") != "off":
    OBJECTS["llmkern._C_cpu"] = cpu_objects
if os.environ.get("LLMKERN_EMULATOR") != "off":
    OBJECTS["llmkern._C_emulator"] = emulator_objects
# Not checked here: setup.py also runs to ask what the build requires.
TOOLKIT = cuda_build.wanted()
CUDA_MODULE = "llmkern._C_cuda"
CUDA_EMULATED = "_C_cuda_emulated" + sysconfig.get_config_var("EXT_SUFFIX")


def ninja_path(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def write_ninja(name: str, build_dir: Path, output: Path) -> None:
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
        f"  command = $cxx {shlex.join(link)} $options $in -o $out",
    ]
    if name == CUDA_MODULE:
        emulated = output.with_name(CUDA_EMULATED)
        lines += cuda_build.ninja_lines(ROOT, TOOLKIT, output, emulated, ninja_path)
    else:
        lines += linked(output, OBJECTS[name](), "")
    if name == "llmkern._C_emulator":
        exports = ROOT / CUDART / "exports.map"
        options = f"-Wl,-soname,{CUDART_NAME} -Wl,--version-script={shlex.quote(str(exports))}"
        lines += linked(output.with_name(CUDART_NAME), cudart_objects(), options)
    (build_dir / "build.ninja").write_text("\n".join(lines) + "\n")


def linked(output: Path, objects: list[tuple[str, Path, list[str]]], options: str) -> list[str]:
    """Ninja's lines for one shared library."""
    lines = []
    for stem, source, extra in objects:
        lines.append(f"build {stem}.o: compile {ninja_path(source.resolve())}")
        lines.append(f"  extra = {shlex.join(extra)}")
    names = " ".join(f"{stem}.o" for stem, _, _ in objects)
    lines.append(f"build {ninja_path(output.resolve())}: link {names}")
    lines.append(f"  options = {options}")
    return lines


class NinjaBuildExt(build_ext):
    def beside(self) -> list[Path]:
        """Libraries that come with an extension without being one to setuptools."""
        names = [CUDART_NAME] if "llmkern._C_emulator" in OBJECTS else []
        names += [CUDA_EMULATED] if TOOLKIT else []
        return [Path(self.build_lib) / "llmkern" / name for name in names]

    def copy_extensions_to_source(self) -> None:
        super().copy_extensions_to_source()
        for built in self.beside():
            self.copy_file(str(built), str(ROOT / "llmkern" / built.name))

    def get_outputs(self) -> list[str]:
        return [*super().get_outputs(), *map(str, self.beside())]

    def build_extensions(self) -> None:
        cuda_build.check(TOOLKIT)
        super().build_extensions()

    def build_extension(self, ext: Extension) -> None:
        build_dir = Path(self.build_temp).resolve() / ext.name
        if os.environ.get("LLMKERN_SANITIZE") == "1":
            build_dir = build_dir.with_name(build_dir.name + "-sanitize")
        build_dir.mkdir(parents=True, exist_ok=True)
        output = Path(self.get_ext_fullpath(ext.name))
        output.parent.mkdir(parents=True, exist_ok=True)
        write_ninja(ext.name, build_dir, output)
        # A sanitizer build and a plain one share the output name.
        output.unlink(missing_ok=True)
        subprocess.run([sys.executable, "-m", "ninja", "-C", str(build_dir)], check=True)


setup(
    ext_modules=[
        Extension(name, sources=[]) for name in (*OBJECTS, *([CUDA_MODULE] if TOOLKIT else []))
    ],
    cmdclass={"build_ext": NinjaBuildExt},
)
