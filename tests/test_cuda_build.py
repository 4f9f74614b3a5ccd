"""LLMKERN_CUDA and LLMKERN_CUDA_ARCHS: what the build of the CUDA extension makes of them."""

import importlib
import shlex
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parent.parent / "tools"


@pytest.fixture
def build(monkeypatch):
    for name in ("LLMKERN_CUDA", "LLMKERN_CUDA_ARCHS", "CUDA_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.syspath_prepend(TOOLS)
    module = importlib.import_module("cuda_build")
    yield module
    sys.modules.pop("cuda_build")
    sys.modules.pop("build_backend", None)


@pytest.fixture
def without_nvcc(build, monkeypatch):
    monkeypatch.setattr(build, "find", lambda: None)
    return build


def test_default_targets_are_machine_code_for_sm_80_and_ptx(build):
    assert build.targets() == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_80,code=compute_80",
    ]


def test_targets_follow_the_variable(build, monkeypatch):
    monkeypatch.setenv("LLMKERN_CUDA_ARCHS", "sm_90a, compute_120")
    assert build.targets() == [
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_120,code=compute_120",
    ]


@pytest.mark.parametrize(
    "value, said",
    [
        ("8.0", "'8.0' is not sm_XX or compute_XX"),
        ("", "'' is not sm_XX or compute_XX"),
        ("sm_80,", "'' is not sm_XX or compute_XX"),
        ("sm_80;sm_90", "'sm_80;sm_90' is not"),
        ("compute_75", "the kernels need sm_80, got compute_75"),
    ],
)
def test_unknown_target_stops_the_build(build, monkeypatch, value, said):
    monkeypatch.setenv("LLMKERN_CUDA_ARCHS", value)
    with pytest.raises(SystemExit, match=said):
        build.targets()


def test_unknown_mode_stops_the_build(build, monkeypatch):
    monkeypatch.setenv("LLMKERN_CUDA", "yes")
    with pytest.raises(SystemExit, match="must be one of auto, on, off, got 'yes'"):
        build.mode()


def test_auto_leaves_cuda_out_where_there_is_no_nvcc(without_nvcc):
    assert without_nvcc.wanted() is None
    without_nvcc.check(None)


def test_on_without_nvcc_stops_the_build(without_nvcc, monkeypatch):
    monkeypatch.setenv("LLMKERN_CUDA", "on")
    with pytest.raises(SystemExit, match="nvidia-cuda-nvcc"):
        without_nvcc.check(without_nvcc.wanted())


def test_off_does_not_look_for_nvcc(build, monkeypatch):
    monkeypatch.setenv("LLMKERN_CUDA", "off")
    monkeypatch.setattr(build, "find", lambda: pytest.fail("looked for nvcc"))
    assert build.wanted() is None


@pytest.mark.parametrize("mode, wheels", [("auto", False), ("off", False), ("on", True)])
def test_build_asks_for_a_compiler_only_where_it_must_have_one(
    without_nvcc, monkeypatch, mode, wheels
):
    monkeypatch.setenv("LLMKERN_CUDA", mode)
    backend = importlib.import_module("build_backend")
    assert backend._compiler() == (without_nvcc.WHEELS if wheels else [])


def _toolkit(root: Path, lib: str, *runtime: str, mode: int = 0o755) -> Path:
    """A folder that looks like CUDA's; gives its nvcc."""
    for folder in ("bin", lib):
        (root / folder).mkdir(parents=True)
    (root / "bin/nvcc").write_text("#!/bin/sh\n")
    (root / "bin/nvcc").chmod(mode)
    for name in runtime:
        (root / lib / name).touch()
    return root / "bin/nvcc"


RUNTIME = ("libcudart_static.a", "libcudart.so.13")


def test_nvcc_is_found_in_cuda_home(build, monkeypatch, tmp_path):
    nvcc = _toolkit(tmp_path, "lib64", *RUNTIME)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert build.find() == build.Toolkit(nvcc, tmp_path / "lib64")


def test_nvcc_is_found_among_installed_wheels(build, monkeypatch, tmp_path):
    nvcc = _toolkit(tmp_path / "nvidia/cu13", "lib", *RUNTIME)
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    monkeypatch.setattr(build.sys, "path", [str(tmp_path)])
    assert build.find() == build.Toolkit(nvcc, tmp_path / "nvidia/cu13/lib")


@pytest.mark.parametrize(
    "runtime, mode",
    [
        ((), 0o755),
        (("libcudart_static.a",), 0o755),
        (("libcudart_static.a", "libcudart.so.12"), 0o755),  # its nvcc need not know our flags
        (RUNTIME, 0o644),
    ],
)
def test_nvcc_that_cannot_build_both_modules_is_passed_over(
    build, monkeypatch, tmp_path, runtime, mode
):
    _toolkit(tmp_path / "old", "lib64", *runtime, mode=mode)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "old"))
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    monkeypatch.setattr(build.sys, "path", [str(tmp_path)])
    assert build.find() is None
    nvcc = _toolkit(tmp_path / "nvidia/cu13", "lib", *RUNTIME)
    assert build.find() == build.Toolkit(nvcc, tmp_path / "nvidia/cu13/lib")


def test_paths_with_spaces_stay_one_argument(build, tmp_path):
    root, toolkit = tmp_path / "a b", build.Toolkit(Path("/c d$/nvcc"), Path("/c d$/lib"))
    (root / "csrc/cuda").mkdir(parents=True)
    (root / "csrc/cuda/bindings_x.cpp").touch()
    product, emulated = root / "_C.so", root / "_E.so"
    lines = build.ninja_lines(root, toolkit, product, emulated, lambda p: str(p).replace(" ", "$ "))
    words = [word for line in lines for word in shlex.split(line.replace("$$", "$"))]
    assert words.count(f"-I{root / 'csrc/cuda'}") == 4  # nvcc, one bindings file, two modules
    assert words.count(f"-I{root / 'csrc/include'}") == 1
    assert {"/c d$/nvcc", "-L/c d$/lib", "/c d$/lib/libcudart.so.13"} <= set(words)
