"""Builds the CPU kernels and the emulator with ASan + UBSan into build/sanitize, runs their tests.

`--emulator` as the first argument: the emulator alone. The sanitizer's runtime is preloaded (Python
itself is not instrumented). Leak checking is off: Python and torch keep memory to the end of the
process by design. Further arguments go to pytest.
"""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TREE = ROOT / "build" / "sanitize"
KERNEL_TESTS = [
    "test_norm.py",
    "test_dropout.py",
    "test_activation.py",
    "test_linear.py",
    "test_linear_cpu.py",
    "test_attention.py",
    "test_attention_masks.py",
    "test_attention_cpu_backward.py",
]

# test_emulator_triton.py would compile for minutes what the others run in seconds.
EMULATOR_TESTS = [
    f"test_emulator_{of}.py"
    for of in "bugs calls checks convert float integer matrix memory nvcc opcodes".split()
    + "parser patterns plugin races tickets warp".split()
]
# The GPU backends' cases would run the emulator for hours; compilers do not need sanitizing.
SELECTION = "not compile and not triton and not cuda"


def library(name: str) -> str:
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    found = subprocess.run(
        [*compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if not os.path.isabs(found):
        sys.exit(f"{shlex.join(compiler)} has no {name}: install its sanitizer runtime")
    return found


def plain_nvcc() -> str:
    """PATH with an nvcc first that runs without the preloaded runtime, which breaks it."""
    folder = TREE / "bin"
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return os.environ["PATH"]
    folder.mkdir(exist_ok=True)
    script = folder / "nvcc"
    script.write_text(f'#!/bin/sh\nunset LD_PRELOAD\nexec {shlex.quote(nvcc)} "$@"\n')
    script.chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


def main() -> int:
    arguments = sys.argv[1:]
    emulator_only = arguments[:1] == ["--emulator"]
    wanted = arguments[emulator_only:]
    preload = [library("libasan.so"), library("libubsan.so"), library("libstdc++.so")]
    TREE.mkdir(parents=True, exist_ok=True)
    for name in ("llmkern", "tests", "csrc", "tools"):
        shutil.copytree(ROOT / name, TREE / name, dirs_exist_ok=True,
                        ignore=shutil.ignore_patterns("*.so", "__pycache__"))  # fmt: skip
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, TREE / name)
    environment = {**os.environ, "LLMKERN_SANITIZE": "1", "LLMKERN_CUDA": "off"}
    if emulator_only:
        environment["LLMKERN_CPU"] = "off"
    build = [sys.executable, "setup.py", "build_ext", "--inplace"]
    subprocess.run(build, cwd=TREE, env=environment, check=True)
    environment |= {
        "LD_PRELOAD": " ".join(preload),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": str(TREE),
        "PATH": plain_nvcc(),
    }
    tests = [
        f"tests/{name}"
        for name in [*([] if emulator_only else KERNEL_TESTS), *EMULATOR_TESTS]
        if (TREE / "tests" / name).exists()
    ]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-k", SELECTION]
    run = subprocess.run([*command, *tests, *wanted], cwd=TREE, env=environment)
    return run.returncode


if __name__ == "__main__":
    sys.exit(main())
