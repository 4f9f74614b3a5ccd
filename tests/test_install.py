"""Installs as users make them: an isolated build without an nvcc, with one from the registry, from
an sdist; and what an install without compiled parts says of itself."""

import importlib
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOT_BUILT = "llmkern._C_cuda was not built: it needs nvcc"
SYSTEM = "/usr/bin:/bin"
UNREACHABLE = "No matching distribution found|Could not find a version|Connection|Temporary failure"


def _tracked() -> list[str]:
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("not a git checkout: which files belong to it is not known")
    return [name for name in listed.stdout.splitlines() if (ROOT / name).exists()]


def _copy(folder: Path) -> Path:
    for name in _tracked():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return _copy(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def sdist(source) -> Path:
    code = "import setuptools.build_meta as b, sys; print(b.build_sdist(sys.argv[1]))"
    run = subprocess.run(
        [sys.executable, "-c", code, source / "dist"], cwd=source, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    (found,) = (source / "dist").glob("*.tar.gz")
    return found


def test_sdist_holds_every_file_that_a_build_or_a_test_reads(sdist):
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {name for name in _tracked() if not name.startswith((".ci/", ".git"))}
    assert wanted and not wanted - packed
    assert not [name for name in packed if ".so" in Path(name).suffixes]


def test_info_says_why_each_compiled_part_is_missing(tmp_path):
    """The package's Python alone: what an install without nvcc, and worse, has."""
    shutil.copytree(
        ROOT / "llmkern",
        tmp_path / "llmkern",
        ignore=shutil.ignore_patterns("*.so*", "__pycache__"),
    )
    # An editable install of this checkout would find its extensions for the copy, too.
    code = (
        "import runpy, sys; sys.argv = ['llmkern', 'info']; "
        "foreign = [getattr(f, '__module__', '').startswith('__editable_') for f in sys.meta_path];"
        "sys.meta_path = [f for f, skip in zip(sys.meta_path, foreign) if not skip]; "
        "runpy.run_module('llmkern', run_name='__main__')"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    lines = {line.split()[0]: line for line in run.stdout.splitlines()}
    assert "missing" in lines["cpu"] and "llmkern._C_cpu" in lines["cpu"]
    assert "missing" in lines["cuda"] and NOT_BUILT in lines["cuda"]
    assert "usable" in lines["reference"]


@pytest.mark.parametrize("asked, status", [("on", 1), ("auto", 0)])
def test_smoke_fails_without_the_cuda_kernels_that_were_asked_for(
    monkeypatch, tmp_path, capsys, asked, status
):
    monkeypatch.syspath_prepend(ROOT / "tools")
    smoke = importlib.import_module("smoke")
    monkeypatch.setattr(smoke, "ROOT", tmp_path)  # else the source tree is refused
    monkeypatch.setattr(smoke.cuda, "load", lambda: smoke.cuda.Loaded(None, NOT_BUILT))
    monkeypatch.setenv("LLMKERN_CUDA", asked)
    assert smoke.main() == status
    assert NOT_BUILT in capsys.readouterr().out


def _wheel(source: Path, out: Path, **environment: str) -> Path:
    """An isolated build with no nvcc on PATH. Unoptimised: what it computes is tested elsewhere."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in ("CUDA_HOME", "PYTHONPATH") and not name.startswith("LLMKERN_")
    }
    own = f"{Path(sys.executable).parent}:{SYSTEM}"
    if shutil.which("nvcc", path=own):
        pytest.skip(f"nvcc lies beside python or the system's programs, in {own}")
    if shutil.which(kept.get("CXX", "c++").split()[-1], path=own) is None:
        pytest.skip("no C++ compiler among the system's programs")
    command = [sys.executable, "-m", "pip", "wheel", str(source), "--no-deps", "-w", str(out)]
    run = subprocess.run(
        command,
        env={**kept, "PATH": own, "CXXFLAGS": "-O0", "LLMKERN_EMULATOR": "off", **environment},
        capture_output=True,
        text=True,
    )
    said = run.stdout + run.stderr
    if run.returncode and any(words in said for words in UNREACHABLE.split("|")):
        pytest.skip(f"the package registry cannot be reached: {said.strip().splitlines()[-1]}")
    assert run.returncode == 0, said
    (found,) = out.glob("*.whl")
    return found


def _python(wheel: Path, folder: Path, *arguments: str) -> str:
    """Run on the unpacked wheel: torch comes from this environment."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    run = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.slow
def test_without_nvcc_the_sdist_installs_and_info_says_what_is_missing(sdist, tmp_path):
    wheel = _wheel(sdist, tmp_path / "dist")
    told = _python(wheel, tmp_path / "installed", "-m", "llmkern", "info")
    assert NOT_BUILT in told
    (cpu,) = (line for line in told.splitlines() if line.split()[0] == "cpu")
    assert "usable" in cpu


@pytest.mark.slow
def test_asked_for_cuda_the_build_brings_its_own_nvcc(source, tmp_path):
    wheel = _wheel(source, tmp_path / "dist", LLMKERN_CUDA="on", LLMKERN_CUDA_ARCHS="compute_80")
    code = "from llmkern.backends.cuda import _ext; print(_ext.load())"
    told = _python(wheel, tmp_path / "installed", "-c", code)
    assert "module 'llmkern._C_cuda'" in told, told
    names = zipfile.ZipFile(wheel).namelist()
    assert [name for name in names if name.startswith("llmkern/_C_cuda_emulated.")]
