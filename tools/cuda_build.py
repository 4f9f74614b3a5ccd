"""Where nvcc is, and the ninja lines of the CUDA extension; used by setup.py and build_backend.py.

LLMKERN_CUDA = auto (default): build llmkern._C_cuda where an nvcc of CUDA 13 is found; off: never;
on: a missing nvcc is an error, and an isolated build (pip install .) fetches one from PyPI first.
LLMKERN_CUDA_ARCHS: targets separated by commas, each sm_XX (machine code for that card) or
compute_XX (PTX, which newer drivers compile for newer cards, and which the emulator runs). Default:
sm_80,compute_80.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

# A whole compiler as wheels: nvcc, its middle end, its headers, the runtime, libcu++.
WHEELS = [
    "nvidia-cuda-nvcc==13.0.*",
    "nvidia-nvvm==13.0.*",
    "nvidia-cuda-crt==13.0.*",
    "nvidia-cuda-runtime==13.0.*",
    "nvidia-cuda-cccl==13.0.*",
]
# The emulator stands in for this one; an nvcc of another version is passed over (before 12.8 it
# lacks --compress-mode).
RUNTIME = "libcudart.so.13"
OLDEST = 80  # bf16 mma and cp.async
DEFAULT_ARCHS = "sm_80,compute_80"
MODES = ("auto", "on", "off")
CUDA = Path("csrc/cuda")
# --compress-mode=none keeps the PTX readable to tools that execute or inspect it.
NVCC_FLAGS = "-std=c++17 -O3 -lineinfo --compress-mode=none -Xcompiler=-fPIC,-fvisibility=hidden"


class Toolkit(NamedTuple):
    nvcc: Path
    lib: Path  # holds libcudart_static.a and RUNTIME


def mode() -> str:
    chosen = os.environ.get("LLMKERN_CUDA", "auto")
    if chosen not in MODES:
        raise SystemExit(f"LLMKERN_CUDA must be one of {', '.join(MODES)}, got {chosen!r}")
    return chosen


def _candidates() -> list[Path]:
    found = [Path(os.environ[name]) / "bin/nvcc" for name in ("CUDA_HOME",) if name in os.environ]
    on_path = shutil.which("nvcc")
    if on_path:
        found.append(Path(on_path))
    # Wheels lie on sys.path, also those that an isolated build got for itself.
    return found + [Path(path) / "nvidia/cu13/bin/nvcc" for path in sys.path]


def _real_root(nvcc: Path) -> Path:
    """The toolkit's folder. nvcc on PATH may be a script that calls the real one: ask it."""
    told = subprocess.run(
        [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True
    )
    top = re.search(r"^#\$ TOP=(.*)$", told.stderr, re.MULTILINE)
    return Path(top.group(1).strip()) if top else nvcc.resolve().parent.parent


def find() -> Toolkit | None:
    """The first nvcc that comes with the runtime, static and shared; None where there is none."""
    for nvcc in _candidates():
        if not (nvcc.is_file() and os.access(nvcc, os.X_OK)):
            continue
        root = _real_root(nvcc).resolve()
        for name in ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib"):
            lib = root / name
            if (lib / "libcudart_static.a").is_file() and (lib / RUNTIME).is_file():
                return Toolkit(nvcc.absolute(), lib)
    return None


def wanted() -> Toolkit | None:
    """The toolkit to build with; None: CUDA is left out."""
    return find() if mode() != "off" else None


def check(toolkit: Toolkit | None) -> None:
    """Stop the build where LLMKERN_CUDA=on cannot be met."""
    if toolkit is None and mode() == "on":
        raise SystemExit(
            "LLMKERN_CUDA=on, but no nvcc of CUDA 13 with its runtime was found in CUDA_HOME, on "
            "PATH or among the installed wheels; install the toolkit or " + " ".join(WHEELS)
        )


def targets() -> list[str]:
    """-gencode arguments of LLMKERN_CUDA_ARCHS."""
    flags = []
    for arch in os.environ.get("LLMKERN_CUDA_ARCHS", DEFAULT_ARCHS).split(","):
        match = re.fullmatch(r"(sm|compute)_(\d+[af]?)", arch.strip())
        if match is None:
            raise SystemExit(f"LLMKERN_CUDA_ARCHS: {arch.strip()!r} is not sm_XX or compute_XX")
        if int(match.group(2).rstrip("af")) < OLDEST:
            raise SystemExit(
                f"LLMKERN_CUDA_ARCHS: the kernels need sm_{OLDEST}, got {arch.strip()}"
            )
        flags.append(f"-gencode=arch=compute_{match.group(2)},code={match.group(0)}")
    return flags


def _argument(flag: str, path: Path) -> str:
    """One word of a command, whatever the path holds: for the shell, then for ninja."""
    return shlex.quote(f"{flag}{path}").replace("$", "$$")


def ninja_lines(
    root: Path,
    toolkit: Toolkit,
    product: Path,
    emulated: Path,
    path: Callable[[Path], str],
) -> list[str]:
    """Kernels by nvcc, bindings by the C++ compiler, and two links of the same objects.

    product: the CUDA runtime inside (static): needs no CUDA files where it runs.
    emulated: libcudart.so.13 left to be provided, so that the runtime calls can be served by
        llmkern's emulator. path: escapes a path for ninja.
    """
    own = _argument("-I", root / CUDA)
    includes = _argument("-I", root / "csrc/include")
    lines = [
        f"nvcc = {_argument('', toolkit.nvcc)}",
        f"nvcc_flags = {NVCC_FLAGS} {' '.join(targets())} {includes} {own}",
        "rule cuda",
        "  command = $nvcc $nvcc_flags -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule cuda_link",
        "  command = $cxx -shared $in $libs -o $out",
    ]
    objects = []
    for source in sorted((root / CUDA).glob("*.cu")):
        objects.append(f"cuda.{source.stem}.o")
        lines.append(f"build {objects[-1]}: cuda {path(source.resolve())}")
    for source in sorted((root / CUDA).glob("bindings_*.cpp")):
        objects.append(f"cuda.{source.stem}.o")
        lines.append(f"build {objects[-1]}: compile {path(source.resolve())}")
        lines.append(f"  extra = -O2 {own}")
    runtimes = {
        product: f"{_argument('-L', toolkit.lib)} -lcudart_static -lrt -lpthread -ldl"
        " -Wl,--exclude-libs,ALL",
        emulated: _argument("", toolkit.lib / RUNTIME),
    }
    for output, libs in runtimes.items():
        name = output.name.split(".")[0]
        module = path((root / CUDA / "bindings.cpp").resolve())
        lines.append(f"build {name}.o: compile {module}")
        lines.append(f"  extra = -O2 -DLLMKERN_MODULE={name} {own}")
        inputs = " ".join([*objects, f"{name}.o"])
        lines.append(f"build {path(output.resolve())}: cuda_link {inputs}")
        lines.append(f"  libs = {libs}")
    return lines
