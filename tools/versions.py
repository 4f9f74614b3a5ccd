"""`make test-versions`: the tests on every torch that llmkern/supported.py names, each in an
environment of its own under .venv-versions, which is kept for the next run.

The compiled parts contain no torch: those of the tree are used for all. A log for each run lies in
.venv-versions/<torch>.log. Exit code 1 if an environment cannot be made or a test fails.

Left out, with the reason:
    everywhere      slow tests; those of the build and of installation (test_build, test_install,
                    test_cuda_build), which do not depend on the torch beside them and take minutes
    everywhere      the emulator's own tests (test_emulator_*): they are about PTX, not about torch
    triton 3.8      whatever runs Triton kernels on the emulator, which cannot drive that triton yet
                    (tests/conftest.py skips where a test asks for the backend)
"""

import argparse
import importlib.util
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".venv-versions"
NO_TORCH = ("test_build.py", "test_install.py", "test_cuda_build.py")


def supported():
    """llmkern/supported.py, without the package, which needs a torch."""
    spec = importlib.util.spec_from_file_location("supported", ROOT / "llmkern/supported.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def environment(version: str, triton: str) -> Path:
    """The interpreter of an environment with this torch; made where there is none that is whole."""
    folder = FOLDER / f"torch-{version}"
    python, made = folder / "bin/python", folder / ".made"
    if made.exists():
        return python
    wanted = (ROOT / "requirements-dev.txt").read_text().splitlines()
    others = [line for line in wanted if line and not re.match(r"#|torch==|triton==|ruff", line)]
    subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
    install = [python, "-m", "pip", "install", "--quiet", "--no-cache-dir"]
    pins = [f"torch=={version}", f"triton=={triton}"]
    subprocess.run([*install, *pins, *others], check=True)
    made.touch()
    return python


def left_out(triton: str) -> list[str]:
    """Test files that are not run beside this triton."""
    files = {*NO_TORCH, *(p.name for p in (ROOT / "tests").glob("test_emulator_*.py"))}
    if triton.startswith("3.8."):  # what tests/conftest.py cannot skip, test by test
        files |= {p.name for p in (ROOT / "tests").glob("test_*triton*.py")}
        files |= {"test_kernel_table.py", "test_profile.py", "test_tune.py"}
    return sorted(files)


def run(python: Path, version: str, triton: str, arguments: list[str]) -> tuple[int, str]:
    """(exit code, pytest's closing line)"""
    command = [python, "-m", "pytest", "-m", "not slow", "-p", "no:cacheprovider", "--tb=short"]
    command += [f"--ignore=tests/{name}" for name in left_out(triton)]
    log = FOLDER / f"{version}.log"
    with log.open("w") as file:
        code = subprocess.run(
            [*command, *arguments], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT
        ).returncode
    lines = log.read_text().splitlines()
    closing = [line for line in lines if re.search(r"\d+ (passed|failed|error|skipped)", line)]
    return code, closing[-1].strip("= ") if closing else f"no closing line: {log}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="versions of torch, with commas between")
    parser.add_argument("pytest", nargs="*", help="handed to pytest")
    options = parser.parse_args()
    only = options.only.split(",") if options.only else None
    FOLDER.mkdir(exist_ok=True)
    rows, failed = [], False
    for version, triton in supported().TESTED:
        if only and version not in only:
            continue
        start = time.monotonic()
        try:
            python = environment(version, triton)
        except subprocess.CalledProcessError as error:
            code, closing = error.returncode, "the environment could not be made"
        else:
            code, closing = run(python, version, triton, options.pytest)
        failed |= code != 0
        rows.append(f"{version:8} {triton:8} {time.monotonic() - start:6.0f} s  {closing}")
        print(rows[-1], flush=True)
    print("\ntorch    triton     time    result", *rows, sep="\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
