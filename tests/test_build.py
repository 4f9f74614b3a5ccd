"""The compiled extension: free of torch, one OpenMP runtime, an instruction set by choice."""

import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llmkern.backends.cpu import _ext

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def extension() -> Path:
    loaded = _ext.load()
    assert loaded.module is not None, loaded.reason
    return Path(loaded.module.__file__)


def _python(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def _dynamic(extension: Path, *options: str) -> str:
    found = subprocess.run(["readelf", *options, extension], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    return found.stdout


def test_extension_needs_no_torch_and_no_openmp_library(extension):
    needed = re.findall(r"NEEDED.*\[(.*)\]", _dynamic(extension, "--dynamic", "--wide"))
    assert needed
    assert not [n for n in needed if re.search(r"torch|c10|gomp|omp|mkl", n)], needed


def test_extension_leaves_no_symbol_of_torch_or_of_an_openmp_runtime_undefined(extension):
    symbols = _dynamic(extension, "--dyn-syms", "--wide")
    undefined = [line.split()[-1] for line in symbols.splitlines() if " UND " in line]
    assert undefined
    foreign = r"torch|c10|_ZN2at|caffe|GOMP|^omp_|kmpc?_"
    assert not [n for n in undefined if re.search(foreign, n)]


def test_extension_exports_only_its_init_function(extension):
    symbols = _dynamic(extension, "--dyn-syms", "--wide")
    defined = [
        line.split()[-1]
        for line in symbols.splitlines()
        if re.search(r"(GLOBAL|WEAK)\s+DEFAULT\s+\d+", line)
    ]
    ours = [name for name in defined if "llmkern" in name]
    assert not ours, ours


def test_one_openmp_runtime_is_mapped():
    code = """
import llmkern, torch
llmkern.functional.layer_norm(torch.ones(64, 1024), (1024,))
torch.nn.functional.layer_norm(torch.ones(4096, 1024), (1024,))
names = {line.split()[-1] for line in open("/proc/self/maps") if "/" in line}
print(sorted(n for n in names if "gomp" in n or "iomp" in n or "libomp" in n))
"""
    run = _python(code)
    assert run.returncode == 0, run.stderr
    assert len(eval(run.stdout)) == 1, run.stdout


def test_isa_variable_forces_a_lower_instruction_set():
    code = """
import torch, llmkern
from llmkern.backends.cpu import _ext
llmkern.functional.layer_norm(torch.ones(2, 8), (8,), backend="cpu")
print(_ext.load().module.isa())
"""
    run = _python(code, LLMKERN_CPU_ISA="scalar")
    assert run.stdout.strip() == "scalar", run.stderr


@pytest.mark.parametrize("value", ["avx1024", "", "AVX2"])
def test_unknown_isa_is_an_error(value):
    code = "import torch, llmkern; llmkern.functional.layer_norm(torch.ones(2, 8), (8,))"
    run = _python(code, LLMKERN_CPU_ISA=value)
    assert run.returncode != 0
    assert "LLMKERN_CPU_ISA must be one of" in run.stderr


def test_import_builds_loads_and_reads_nothing():
    code = """
import os, sys
os.environ["LLMKERN_CPU_ISA"] = "nonsense"
import llmkern, llmkern.nn
assert "llmkern._C_cpu" not in sys.modules
"""
    run = _python(code)
    assert run.returncode == 0, run.stderr


def test_missing_extension_is_reported_not_hidden(monkeypatch):
    _ext.load.cache_clear()
    monkeypatch.setitem(sys.modules, "llmkern._C_cpu", None)
    try:
        loaded = _ext.load()
        assert loaded.module is None
        assert "llmkern._C_cpu does not load" in loaded.reason
        assert _ext.unavailable("cpu") == loaded.reason
    finally:
        _ext.load.cache_clear()


def test_bindings_take_tensors_and_no_addresses():
    """A tensor given as itself lives until the call is over; one given as an address may not."""
    x = torch.ones(8)
    with pytest.raises(AttributeError, match="data_ptr"):
        _ext.load().module.activation_fwd(0, 1, 1, 8, x.data_ptr(), 8, x, 8)


MACHINES = {
    "Zen 3": (["avx2", "scalar"], ["default", "avx2"], False),
    "with AMX": (
        ["avx512_bf16", "avx512", "avx2", "scalar"], ["default", "avx2", "avx512"], True,
    ),
    "not x86": (["scalar"], ["default"], False),
}  # fmt: skip


@pytest.mark.parametrize("isas, levels, amx", MACHINES.values(), ids=MACHINES)
def test_the_matrix_of_instruction_sets_has_every_pair_that_matters(monkeypatch, isas, levels, amx):
    monkeypatch.syspath_prepend(ROOT / "tools")
    matrix = importlib.import_module("isa_matrix")
    runs = matrix.runs(isas, levels, amx)
    assert len(set(runs)) == len(runs) <= 13
    pairs = {(run.isa, run.torch) for run in runs}
    assert pairs >= {(isa, level) for isa in isas for level in (levels[0], levels[-1])}
    best = {run.threads for run in runs if run[:3] == (isas[0], levels[-1], "all")}
    assert best == {1, 2, 3}
    assert len(runs) < 8 or {run.threads for run in runs[3:]} == {1, 2, 3}
    # An AVX2 machine is there, as one or within a larger one.
    assert "avx2" not in levels or any(run[:2] == ("avx2", "avx2") for run in runs)


def test_the_matrix_tells_failures_and_errors(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(ROOT / "tools")
    matrix = importlib.import_module("isa_matrix")
    run = matrix.Run("scalar", "default", "all", 1)
    (tmp_path / "test_one.py").write_text("def test_fails(): assert False\n")
    (tmp_path / "test_two.py").write_text("import nothing_of_this_name\n")
    for name, failed in (("test_one.py", "1 failed"), ("test_two.py", "1 error")):
        file = str(tmp_path / name)
        outcome = matrix.run_tests(run, tmp_path / "log", [file, "--rootdir", str(tmp_path)])
        number, kind = failed.split()
        assert outcome.code != 0 and outcome.counts[kind] == int(number)
    assert matrix.table([outcome]).splitlines()[1].split()[4:6] == ["0", "1"]


@pytest.fixture
def cpp_build(monkeypatch):
    for name in ("CXX", "CXXFLAGS", "LLMKERN_SANITIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.syspath_prepend(ROOT / "tools")
    yield importlib.import_module("cpp_build")
    sys.modules.pop("cpp_build")


# The threads, portable vectors, shuffles, loops over lanes.
WITHOUT_WARNING = "threads elementwise.scalar op_ldmatrix op_mma"


@pytest.mark.parametrize("compiler", ["g++", "clang++"])
@pytest.mark.parametrize("name", WITHOUT_WARNING.split())
def test_sources_compile_without_a_warning(cpp_build, monkeypatch, tmp_path, compiler, name):
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not on PATH")
    monkeypatch.setenv("CXX", compiler)
    objects = [*cpp_build.cpu_objects(), *cpp_build.emulator_objects()]
    found = {stem: (source, flags) for stem, source, flags in objects}
    if name not in found:
        pytest.skip(f"{name} is not built for this processor")
    source, flags = found[name]
    command = [*cpp_build.compiler(), *cpp_build.common_flags(), *flags, "-Werror", "-c", source]
    run = subprocess.run([*command, "-o", tmp_path / "object"], capture_output=True, text=True)
    assert run.returncode == 0 and not run.stderr, run.stderr


def test_flags_are_asked_of_the_compiler_with_its_arguments(cpp_build, monkeypatch, tmp_path):
    """CXX may hold a launcher and arguments; a flag that only warns is not accepted."""
    script = tmp_path / "launcher"
    script.write_text('#!/bin/sh\nfor a; do test "$a" = -fodd && exit 1; done\nexit 0\n')
    script.chmod(0o755)
    monkeypatch.setenv("CXX", f"{script} some-compiler -m64")
    assert cpp_build.compiler() == [str(script), "some-compiler", "-m64"]
    assert cpp_build.where_accepted("-feven", "-g") == ["-feven", "-g"]
    assert cpp_build.where_accepted("-feven", "-fodd") == []
    monkeypatch.setenv("CXX", str(tmp_path / "missing"))
    assert cpp_build.where_accepted("-g") == []


def test_no_compile_line_asks_for_openmp(cpp_build):
    objects = [*cpp_build.cpu_objects(), *cpp_build.emulator_objects()]
    lines = [cpp_build.common_flags(), cpp_build.link_flags(), *(flags for _, _, flags in objects)]
    assert not [flag for flags in lines for flag in flags if "openmp" in flag]


def test_modules_link_on_macos_with_what_its_linker_has(cpp_build, monkeypatch):
    monkeypatch.setattr(cpp_build.sys, "platform", "darwin")
    assert cpp_build.link_flags() == ["-bundle", "-undefined", "dynamic_lookup"]


def test_setuptools_is_new_enough_for_the_licence_string():
    """`license = "BSD-3-Clause"`: 77 is the first that reads an SPDX expression there."""
    for name in ("pyproject.toml", "requirements-dev.txt"):
        (version,) = re.findall(r"setuptools>=(\d+)", (ROOT / name).read_text())
        assert int(version) >= 77, name
