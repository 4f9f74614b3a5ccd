"""The CUDA backend as far as a machine without a GPU can tell: what nvcc made of the kernels, what
the extension needs, which calls it takes. What the kernels compute is the emulator's business."""

import importlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llmkern.backends.cuda import _ext, attention, linear, norm
from llmkern.specs import UNBOUNDED, AttentionSpec, LinearSpec, NormSpec

ROOT = Path(__file__).resolve().parent.parent
REGISTERS_OF_A_MULTIPROCESSOR = 65536
THREADS = {
    "attention": 128,  # attention_bwd_joint also 256: one such block in place of two
    "column_sums": 256,
    "gemm_ieee": 256,
    "gemm": 128,
    "linear_bwd": 128,
    "norm": 256,
}
# Bytes of local memory: in attention, weights indexed at run time where a tile that the band
# cuts holds a NaN or Inf: [8 or 4 blocks of columns][4] floats, in one pass 8 words of two, and 16
# bytes of spills in backward. Elsewhere it would be spills.
LOCAL_BYTES = {
    "attention_fwd": 128,
    "attention_bwd_queries": 144,
    "attention_bwd_keys": 128,
    "attention_bwd_joint": 48,
}


@pytest.fixture(scope="module")
def extension() -> Path:
    loaded = _ext.load()
    if loaded.module is None:
        pytest.skip(loaded.reason)
    return Path(loaded.module.__file__)


def _cuobjdump() -> str:
    """NVIDIA's tool, from PATH or as Triton brings it."""
    found = shutil.which("cuobjdump")
    if found is None:
        try:
            triton = importlib.import_module("triton")
        except ModuleNotFoundError:
            pytest.skip("neither cuobjdump nor triton, which brings one, is here")
        found = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return str(found)


def _run(*command) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def resources(extension) -> dict[str, dict[str, int]]:
    """{kernel: {"REG": .., "STACK": .., ..}} of the machine code."""
    text = _run(_cuobjdump(), "--dump-resource-usage", extension)
    found = re.findall(r"Function (\S+):\s+(REG:.*)", text)
    assert found, text
    return {
        name: {key: int(n) for key, n in re.findall(r"(\w+):(\d+)", line)} for name, line in found
    }


def _short(symbol: str) -> str:
    """norm_fwd of ..8norm_fwd_kernelI..: the length before a name ends in a digit."""
    return re.search(r"\d([a-z][a-z_]*)_kernel", symbol).group(1)


def _of(table: dict[str, int], kernel: str) -> int:
    return next((n for name, n in table.items() if kernel.startswith(name)), 0)


def test_kernels_do_not_spill(resources):
    spilled = {
        name: used["STACK"] + used["LOCAL"]
        for name, used in resources.items()
        if used["STACK"] + used["LOCAL"] > _of(LOCAL_BYTES, _short(name))
    }
    assert not spilled


def test_two_blocks_fit_into_the_registers_of_a_multiprocessor(resources):
    large = {
        name: used["REG"]
        for name, used in resources.items()
        if used["REG"] * _of(THREADS, _short(name)) * 2 > REGISTERS_OF_A_MULTIPROCESSOR
        and not _short(name).startswith("norm")  # 256 threads only from 4096 columns on
    }
    assert not large


def test_shared_memory_is_an_argument_of_the_launch(resources):
    assert not {name: used["SHARED"] for name, used in resources.items() if used["SHARED"]}


def test_number_of_kernels(resources):
    """Each is compile time and megabytes: a new one is a decision."""
    counts: dict[str, int] = {}
    for name in resources:
        counts[_short(name)] = counts.get(_short(name), 0) + 1
    assert counts == {
        "attention_bwd_joint": 6,
        "attention_bwd_keys": 4,
        "attention_bwd_queries": 4,
        "attention_delta": 2,
        "attention_fwd": 4,
        "column_sums": 1,
        "gemm": 14,
        "gemm_ieee": 1,
        "gemm_join": 3,
        "linear_bwd": 3,
        "norm_bwd": 5,
        "norm_bwd_columns": 3,
        "norm_bwd_exact": 6,
        "norm_bwd_loop": 5,
        "norm_fwd": 5,
        "norm_fwd_exact": 6,
        "norm_fwd_loop": 5,
    }


def test_extension_holds_machine_code_and_ptx(extension):
    assert "sm_80" in _run(_cuobjdump(), "--list-elf", extension)
    assert "sm_80" in _run(_cuobjdump(), "--list-ptx", extension)


def test_extension_needs_neither_cuda_nor_torch_to_load(extension):
    needed = re.findall(r"NEEDED.*\[(.*)\]", _run("readelf", "--dynamic", "--wide", extension))
    assert needed
    assert not [n for n in needed if re.search(r"cuda|torch|c10", n)], needed


def test_emulated_extension_leaves_the_runtime_open(extension):
    emulated = extension.with_name(extension.name.replace("_C_cuda", "_C_cuda_emulated"))
    assert "[libcudart.so.13]" in _run("readelf", "--dynamic", "--wide", emulated)


def test_inline_assembly_stands_in_one_file():
    files = [*ROOT.glob("csrc/cuda/*.cu"), *ROOT.glob("csrc/cuda/*.cuh")]
    assert [f.name for f in files if re.search(r"\basm\b", f.read_text())] == ["ptx.cuh"]


def test_cuda_sources_include_no_torch():
    wrong = [
        f.name
        for f in ROOT.glob("csrc/cuda/*")
        if re.search(r"#include\s*[<\"](torch|ATen|c10)", f.read_text())
        or ("pybind11" in f.read_text() and not f.name.startswith("bindings"))
    ]
    assert not wrong


def test_import_touches_no_device():
    code = """
import sys, llmkern.backends.cuda, llmkern.backends.cuda.attention, llmkern.backends.cuda.linear
import llmkern.backends.cuda.norm
assert "llmkern._C_cuda" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_launch_without_a_driver_names_the_kernel(extension):
    x = torch.ones(2, 8)
    shape = (0, 0, 0, 2, 8, 1e-5, True, False, 0)
    with pytest.raises(RuntimeError, match="^norm_fwd: .*(driver|device)"):
        _ext.load().module.norm_fwd((0, 0), shape, None, x, 8, None, 0, None, None, None, x, None)


def test_missing_extension_is_a_reason(monkeypatch):
    monkeypatch.setitem(sys.modules, "llmkern._C_cuda", None)
    _ext.load.cache_clear()
    try:
        assert "llmkern._C_cuda" in _ext.load().reason
    finally:
        _ext.load.cache_clear()


NORM = NormSpec(torch.bfloat16, torch.bfloat16, "cuda", 64, 1024, 1e-5, False, False, False, 0.0,
                False, torch.bfloat16)  # fmt: skip
LINEAR = LinearSpec(torch.bfloat16, "cuda", 64, 64, 64, None, False, True, False, 0.0, False)
ATTENTION = AttentionSpec(torch.bfloat16, "cuda", 1, 4, 2, 64, 64, 64, 64, 0.125, 0.0, 0, UNBOUNDED,
                          0, 0.0, False, False, False, False, False)  # fmt: skip


@pytest.fixture
def present(monkeypatch):
    monkeypatch.setattr(_ext, "unavailable", lambda device: None)


@pytest.mark.parametrize(
    "module, spec",
    [
        (norm, NORM),
        (norm, NORM._replace(dtype=torch.float32, rms=True, dropout_p=0.1, add=True)),
        (norm, NORM._replace(cols=100_000)),
        (norm, NORM._replace(weight_dtype=None)),
        (linear, LINEAR),
        (linear, LINEAR._replace(dtype=torch.float16, activation="gelu", gated=True, rows=3)),
        (linear, LINEAR._replace(dtype=torch.float32, in_features=7)),
        (attention, ATTENTION),
        (attention, ATTENTION._replace(head_dim=128, value_dim=96, left=20, key_mask=True)),
        (attention, ATTENTION._replace(dropout_p=0.1, q_len=1)),
    ],
)
def test_serves(present, module, spec):
    assert module.supports(spec) is None


@pytest.mark.parametrize(
    "module, spec, reason",
    [
        (norm, NORM._replace(dtype=torch.float64), "float64"),
        (norm, NORM._replace(cols=1 << 27), "rows of"),
        (linear, LINEAR._replace(dtype=torch.float64), "float64"),
        (linear, LINEAR._replace(rows=1 << 31), "32 bits"),
        (attention, ATTENTION._replace(dtype=torch.float32), "float32"),
        (attention, ATTENTION._replace(dtype=torch.float64), "float64"),
        (attention, ATTENTION._replace(bias=True), "a bias"),
        (attention, ATTENTION._replace(mask=True), "mask"),
        (attention, ATTENTION._replace(slopes=True), "ALiBi"),
        (attention, ATTENTION._replace(sinks=True), "sinks"),
        (attention, ATTENTION._replace(softcap=30.0), "softcap"),
        (attention, ATTENTION._replace(scale=0.0), "scale"),
        (attention, ATTENTION._replace(head_dim=256), "head dims"),
        (attention, ATTENTION._replace(value_dim=100), "head dims"),
    ],
)
def test_refuses_with_a_reason(present, module, spec, reason):
    assert reason in module.supports(spec)
