"""Sources and flags of the C++ parts, for setup.py: the CPU kernels and the emulator.

Flags are those of GCC and clang. Those that one of them lacks are asked for, so that neither warns
of the other's.
"""

import functools
import os
import platform
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CPU = ROOT / "csrc/cpu"
EMULATOR = ROOT / "csrc/emulator"
CUDART = EMULATOR / "cudart"
KERNEL_SOURCES = "attention_bwd attention_fwd elementwise gemm linear norm probe".split()
BF16_SOURCES = ["probe"]  # those with kernels in LLMKERN_CPU_BF16_KERNELS (kernel_list.h)
X86_FLAGS = {
    "avx2": "-mavx2 -mfma -mf16c",
    "avx512": "-mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512vl -mavx512dq",
}
X86_FLAGS["avx512"] += " -mprefer-vector-width=512"
X86_FLAGS["avx512_bf16"] = X86_FLAGS["avx512"] + " -mavx512bf16 -mavx512vnni"

CompiledObject = tuple[str, Path, list[str]]  # (object name, source, flags of its own)


def is_x86() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64")


def sanitized() -> bool:
    return os.environ.get("LLMKERN_SANITIZE") == "1"


def compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "c++"))


@functools.cache
def _accepts(command: tuple[str, ...], flags: tuple[str, ...]) -> bool:
    check = [*command, "-Werror", *flags, "-x", "c++", "-fsyntax-only", "-"]
    try:
        return subprocess.run(check, input=b"", capture_output=True).returncode == 0
    except OSError:
        return False  # no such compiler: the build says so


def where_accepted(*flags: str) -> list[str]:
    """The flags, or none where the compiler does not take them all without a warning."""
    return list(flags) if _accepts(tuple(compiler()), flags) else []


def common_flags() -> list[str]:
    """For every object of every extension, before the object's own."""
    import pybind11

    flags = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-g0", "-Wall", "-Wextra"]
    # GCC warns about the deliberately undefined sources inside its own AVX-512 headers.
    flags += where_accepted("-Wno-maybe-uninitialized", "-Wno-uninitialized")
    flags += ["-fno-math-errno"]
    if sanitized():
        flags += ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g1"]
    if is_x86():
        flags.append("-DLLMKERN_HAVE_X86")
    includes = [
        ROOT / "csrc/include",
        CPU,
        EMULATOR,
        pybind11.get_include(),
        sysconfig.get_path("include"),
    ]
    return flags + [f"-I{path}" for path in includes]


def link_flags() -> list[str]:
    """Of a module of Python's, whose own symbols the interpreter has."""
    flags = ["-bundle", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared"]
    return flags + (["-fsanitize=address,undefined"] if sanitized() else [])


def optimised(*flags: str) -> list[str]:
    """An object's own flags; a sanitizer build is optimised less, CXXFLAGS come last."""
    level = ["-O1"] if sanitized() else []
    return [*flags, *level, *shlex.split(os.environ.get("CXXFLAGS", ""))]


def cpu_objects() -> list[CompiledObject]:
    """Everything in the CPU extension."""
    own = optimised("-O3", "-fno-trapping-math", "-ffp-contract=fast")
    objects = [(p.stem, p, own) for p in sorted(CPU.glob("bindings*.cpp"))]
    objects += [(name, CPU / f"{name}.cpp", own) for name in ("kernel_table", "threads")]
    isas = {"scalar": "", **(X86_FLAGS if is_x86() else {})}
    for isa, flags in isas.items():
        for name in BF16_SOURCES if isa == "avx512_bf16" else KERNEL_SOURCES:
            extra = [*own, f"-DLLMKERN_ISA={isa}", *shlex.split(flags)]
            objects.append((f"{name}.{isa}", CPU / f"{name}.cpp", extra))
    return objects


def emulator_objects() -> list[CompiledObject]:
    """The emulator: IEEE arithmetic as written, lane loops vectorised."""
    own = ["-O2", "-ftree-vectorize", *where_accepted("-fvect-cost-model=dynamic")]
    own += ["-fno-strict-aliasing", "-ffp-contract=off", "-frounding-math", "-pthread"]
    return [(p.stem, p, optimised(*own)) for p in sorted(EMULATOR.glob("*.cpp"))]


def cudart_objects() -> list[CompiledObject]:
    own = optimised("-O2", "-fvisibility=default")
    return [(f"cudart_{p.stem}", p, own) for p in sorted(CUDART.glob("*.cpp"))]


def cudart_link_flags(name: str) -> list[str]:
    return [f"-Wl,-soname,{name}", f"-Wl,--version-script={CUDART / 'exports.map'}"]
