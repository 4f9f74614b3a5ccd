"""What ptxas makes of the Triton kernels, by `llmkern kernels`: no GPU, no interpreter.

The compilers run in a process of their own: other tests may have put the emulator's driver in
Triton, or turned its interpreter on, under which kernels cannot be compiled.
"""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from llmkern.backends.triton import _launch
from llmkern.bench import compiled

pytestmark = pytest.mark.skipif(_launch.version() is None, reason="triton is not installed")

# Forms whose gradients keep more alive than 255 registers hold may spill; forward ones may not.
BACKWARD = ("bwd", "backward", "dx", "dw", "dpre", "dq", "dkv")
# Rows that begin at no multiple of 16 bytes; sinks are read one by one along a length that is any.
NARROW = ("odd", "1030", "unaligned", "attention_bwd_sinks")
ROW_BY_ROW = ("attention_terms", "attention_combine", "attention_bwd_sinks")
# A few of each op; the test of all forms is slow.
SHORT = {
    "sm_80": ("norm_fwd 1024 bf16", "bf16 gelu preact", "split join"),
    "sm_86": ("attention_fwd D64 bf16 short",),
    "sm_90": ("64x64x64 16-bit",),
}


def _compile(target: str, words: str = "") -> list[dict]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "llmkern", "kernels", "--target", target]
    command += ["--backend", "triton", "--json", "-"]
    if words:
        command += ["--filter", words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def _check(row: dict) -> None:
    name = f"{row['target']} {row['kernel']}"
    limits = compiled.ARCHITECTURES[compiled.capability_of(row["target"])]
    assert row["registers"] <= 255, name
    assert row["shared_bytes"] <= limits.shared_bytes_program, name
    assert row["programs"] >= 1, name
    if not any(word in row["kernel"] for word in BACKWARD):
        assert row["spill_bytes"] == 0, f"{name}: {row['spill_bytes']} bytes spilled"
    if _multiplies(row):
        assert row["tensor"] > 0, f"{name}: no tensor core instruction"
    if not any(word in row["kernel"].split() for word in NARROW):
        assert row["loads_16"] > 0, f"{name}: no 16-byte load"


def _multiplies(row: dict) -> bool:
    """Whether the kernel has a product for tensor cores."""
    words = row["kernel"].split()
    if row["op"] == "linear":
        return words[-1] not in ("join", "dpre", "sum") and "ieee" not in words
    return row["op"] == "attention" and words[0] not in ROW_BY_ROW


@pytest.mark.parametrize("target,words", [(t, w) for t, forms in SHORT.items() for w in forms])
def test_kernels_compile_without_spills(target, words):
    rows = _compile(target, words)
    assert rows
    for row in rows:
        _check(row)


@pytest.mark.slow
@pytest.mark.parametrize("target", [f"sm_{capability}" for capability in compiled.ARCHITECTURES])
@pytest.mark.parametrize("op", compiled.OPS)
def test_every_form_compiles(target, op):
    for row in _compile(target, op):
        _check(row)


def test_occupancy_follows_from_the_limits():
    assert compiled.resident(80, 4, 128, 0) == 4  # registers: 4 warps x 32 x 128 = 16384
    assert compiled.resident(80, 4, 32, 50_000) == 3  # shared memory: 164 KB
    assert compiled.resident(86, 8, 32, 0) == 6  # threads: 1536
    assert compiled.resident(86, 1, 16, 0) == 16  # programs
    assert compiled.resident(100, 4, 32, 0, tensor_columns=256) == 2
    assert compiled.resident(90, 32, 255, 0) == 0


def test_an_unknown_target_and_a_missing_tool_are_said_in_one_sentence(capsys):
    from llmkern import cli

    assert cli.main(["kernels", "--target", "sm_70"]) == 2
    assert "target must be one of sm_80" in capsys.readouterr().err
    with pytest.raises(compiled.BackendError, match="TRITON_INTERPRET is set"):
        compiled._build(SimpleNamespace(kernel=lambda: "no JITFunction"), 80)
    with pytest.raises(compiled.BackendError, match="nvdisasm-9 is missing"):
        compiled.triton_tool("nvdisasm-9")
