"""Builds the compiled parts without torch: plain C++ with pybind11, objects in parallel by ninja.

llmkern._C_cpu holds the CPU kernels; its sources are compiled once per instruction set, each into a
namespace of its own, and it picks one at run time. No compiler's OpenMP takes part, which would ask
for a runtime of that compiler's: at load the extension is handed the entry points of the runtime
that torch has mapped (csrc/cpu/threads.h), so GCC's and clang's builds run on the same threads.
llmkern._C_emulator executes PTX on the CPU; beside it lies the stand-in for libcudart.so.13 that
brings it the launches of libraries built by nvcc. Sources and flags of these: tools/cpp_build.py.
llmkern._C_cuda and llmkern._C_cuda_emulated hold the CUDA kernels, where there is an nvcc
(tools/cuda_build.py).

Environment: LLMKERN_CUDA, LLMKERN_CUDA_ARCHS, CUDA_HOME (tools/cuda_build.py); LLMKERN_EMULATOR=off
and LLMKERN_CPU=off leave the emulator or the CPU kernels out; CXX (g++ or clang++, with arguments
or a launcher in front), CXXFLAGS; LLMKERN_SANITIZE=1 builds all but the CUDA part with
AddressSanitizer and UndefinedBehaviorSanitizer.
"""

import os
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT / "tools"))

import cpp_build  # noqa: E402
import cuda_build  # noqa: E402

OBJECTS = {}
if os.environ.get("LLMKERN_CPU") != "off":
    OBJECTS["llmkern._C_cpu"] = cpp_build.cpu_objects
if os.environ.get("LLMKERN_EMULATOR") != "off":
    OBJECTS["llmkern._C_emulator"] = cpp_build.emulator_objects
# A library of this name stands in for NVIDIA's where programs for a GPU are ELF files.
CUDART_NAME = cuda_build.RUNTIME if sys.platform == "linux" else None
# Not checked here: setup.py also runs to ask what the build requires.
TOOLKIT = cuda_build.wanted()
CUDA_MODULE = "llmkern._C_cuda"
CUDA_EMULATED = "_C_cuda_emulated" + sysconfig.get_config_var("EXT_SUFFIX")


def ninja_path(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def write_ninja(name: str, build_dir: Path, output: Path) -> None:
    lines = [
        "ninja_required_version = 1.5",
        f"cxx = {shlex.join(cpp_build.compiler())}",
        f"flags = {shlex.join(cpp_build.common_flags())}",
        "rule compile",
        "  command = $cxx $flags $extra -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = $cxx {shlex.join(cpp_build.link_flags())} $options $in -o $out",
    ]
    if name == CUDA_MODULE:
        emulated = output.with_name(CUDA_EMULATED)
        lines += cuda_build.ninja_lines(ROOT, TOOLKIT, output, emulated, ninja_path)
    else:
        lines += linked(output, OBJECTS[name](), "")
    if name == "llmkern._C_emulator" and CUDART_NAME:
        options = shlex.join(cpp_build.cudart_link_flags(CUDART_NAME))
        lines += linked(output.with_name(CUDART_NAME), cpp_build.cudart_objects(), options)
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
        names = [CUDART_NAME] if CUDART_NAME and "llmkern._C_emulator" in OBJECTS else []
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
