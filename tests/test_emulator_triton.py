"""Triton's compiled kernels on the emulator: right results, bugs stopped at their source line.

The kernels run in one process of their own, without TRITON_INTERPRET: see emulator_kernels.py.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

HERE = Path(__file__).resolve().parent
LIMITS = {"f32": 1e-5, "ieee": 1e-6, "tf32x3": 1e-5, "int8": 0.0, "add": 0.0, "tf32": 2e-3}
LIMITS |= {"bf16": 2e-2, "f16": 5e-3, "one": 2e-2, "tickets": 0.0}


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[tuple, dict]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE), str(HERE.parent)])
    # Triton's cache goes by source text: a shared one may name the file of another checkout.
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    script = HERE / "emulator_kernels.py"
    run = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    rows = [json.loads(line) for line in run.stdout.splitlines()]
    found: dict[tuple, dict] = {}
    for row in rows:
        key = (row["name"], row["architecture"])
        found[(*key, "again") if key in found else key] = row
    return found


RIGHT = [
    "add",
    "norm f32",
    "norm bf16",
    "norm f16",
    "matmul bf16",
    "matmul bf16 odd",
    "matmul f16",
    "matmul f16 in f16",
    "matmul tf32",
    "matmul tf32x3",
    "matmul ieee",
    "matmul int8",
    "matmul one stage",
    "attention bf16",
    "attention f16 odd",
    "attention f32",
    "lock",
    "tickets",
    "histogram",
    "sort, scan and argmax",
    "random",
    "fp8",
    "print",
]


@pytest.mark.parametrize("name", RIGHT)
def test_compiled_kernels_give_the_right_result(results, name):
    row = results[name, "sm_80"]
    assert "error" in row, row
    words = name.split()
    limit = LIMITS.get(words[1] if len(words) > 1 else name, 1e-2)
    if name == "attention f32":
        limit = 2e-3  # tl.dot uses tf32
    assert row["error"] <= limit


@pytest.mark.parametrize("architecture", ["sm_86", "sm_89", "sm_90", "sm_120"])
def test_other_architectures(results, architecture):
    row = results["norm bf16", architecture]
    assert row["error"] < 2e-2 and row["inside"] == int(architecture[3:])
    assert results["matmul bf16", "sm_120"]["error"] < 2e-2
    if architecture != "sm_86":
        assert results["fp8 e4m3", architecture]["error"] == 0.0


@pytest.mark.parametrize(
    "name, check, source",
    [
        ("bug: unmasked load", "out of bounds", "x = tl.load(x_ptr + offsets)\n"),
        ("bug: shifted store", "out of bounds", "tl.store(out_ptr + offsets + shift"),
        ("bug: overlapping tiles", "global race", "tl.store(out_ptr + offsets, tl.zeros"),
        ("bug: relaxed wait", "global race", "total = tl.load(total_ptr"),
        ("bug: no barrier before release", "global race", "total = tl.load(total_ptr"),
    ],
)
def test_bugs_are_stopped_at_their_source_line(results, name, check, source):
    row = results[name, "sm_80"]
    assert row["check"] == check
    path, line = row["source"].rsplit(":", 1)
    assert path.endswith("emulator_kernels.py")
    assert source in Path(path).read_text().splitlines(keepends=True)[int(line) - 1]
    tensor = "total_ptr" if "total" in source else "x_ptr" if "load" in name else "out_ptr"
    assert tensor in row["message"]


def test_device_print_shows_each_threads_value(results):
    lines = results["print", "sm_80"]["printed"].splitlines()
    assert len(lines) >= 3 and all("x is" in line for line in lines)
    for program, value in enumerate(("1.500000", "-2.000000", "40.000000")):
        assert f"pid ({program}, 0, 0) idx () x is: {value}" in lines


def test_threads_and_order_change_nothing(results):
    for name in ("norm bf16", "attention bf16", "matmul bf16 odd", "tickets", "bug: shifted store"):
        first, again = results[name, "sm_80"], results[name, "sm_80", "again"]
        for key in ("error", "instructions", "mma", "coalescing", "conflicts", "check"):
            assert first.get(key) == again.get(key), (name, key)


def test_counters_know_the_matrix_work(results):
    row = results["matmul bf16", "sm_80"]
    assert row["mma"] == 128 * 128 * 96 // (16 * 8 * 16)
    assert row["conflicts"] == 1.0 and row["coalescing"] == 1.0
    assert "mma" in row["report"] and "emulator_kernels.py" in row["report"]


def test_target_and_driver_are_as_before(results):
    for row in results.values():
        assert row["before"] is None and row["after"] is None
