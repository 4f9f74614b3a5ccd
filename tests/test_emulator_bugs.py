"""Bugs put into CUDA C++ kernels: each is stopped at its source line, or shows in the result or in
the counters, and the kernels without them run silently and right."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from llmkern.emulator import EmulatorError, Program, device

SOURCE = Path(__file__).with_name("emulator_bugs.cu")
M, N, K = 20, 40, 96


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not here")
    out = tmp_path_factory.mktemp("bugs") / "bugs.ptx"
    command = [nvcc, "-ptx", "-arch=compute_80", "-lineinfo", SOURCE, "-o", out]
    subprocess.run(command, check=True)
    return Program(out.read_text())


def gemm(dev, program, bug):
    a, b, c = torch.randn(M, K), torch.randn(K, N), torch.zeros(M, N)
    dev.launch(program, f"gemm_{bug}", (2, 1), 256, [a, b, c, M, N, K])
    return c, a @ b


def moments(dev, program, bug, shared=16):
    x, out = torch.randn(100), torch.zeros(2)
    dev.launch(program, f"moments_{bug}", 1, 128, [x, out, 100], shared_bytes=shared)
    return out, torch.stack([x.sum(), (x - x.mean()).square().sum()])


def reverse(dev, program, bug):
    x, y = torch.randn(128), torch.zeros(128)
    dev.launch(program, f"reverse_{bug}", 1, 128, [x, y])
    return y, x.view(4, 32).flip(1).flatten()


def last_block(dev, program, bug):
    x, partial, tickets = torch.randn(10), torch.zeros(5), torch.zeros(1, dtype=torch.int32)
    out = torch.zeros(1)
    dev.launch(program, f"last_block_{bug}", 5, 64, [x, partial, tickets, out])
    return out, x.sum().view(1)


def causal(dev, program, bug):
    s, out = torch.randn(24, 24), torch.zeros(24)
    dev.launch(program, f"causal_{bug}", 1, 24, [s, out, 24])
    return out, s.exp().tril().sum(1)


def transpose(dev, program, bug):
    x, y = torch.randn(32, 32), torch.zeros(32, 32)
    dev.launch(program, f"transpose_{bug}", 1, (32, 8), [x, y])
    return y, x.T


RUNS = {run.__name__: run for run in (gemm, moments, reverse, last_block, causal, transpose)}
CAUGHT = {
    ("gemm", "kNoBarrierAfterWait"): {"shared race", "uninitialised shared memory"},
    ("gemm", "kLaxWait"): {"async copy in flight"},
    ("gemm", "kNoWait"): {"async copy in flight"},
    ("gemm", "kRowBound"): {"out of bounds"},
    ("gemm", "kColumnBound"): {"out of bounds"},
    ("gemm", "kStageNeverFilled"): {"uninitialised shared memory"},
    ("gemm", "kWrongStage"): {"async copy in flight"},
    ("gemm", "kNoBarrierBeforeReuse"): {"shared race", "async copy in flight"},
    ("gemm", "kShiftedStore"): {"out of bounds"},
    ("moments", "kScratchReused"): {"shared race"},
    ("moments", "kPartialsPastEnd"): {"out of bounds"},
    ("moments", "kDivergentShuffle"): {"divergent collective"},
    ("reverse", "kNoWarpBarrier"): {"warp race"},
    ("last_block", "kNoFence"): {"global race"},
}


def lines_of(bug: str) -> set[int]:
    """Numbers of the source's lines that a report may name."""
    marked = enumerate(SOURCE.read_text().splitlines(), 1)
    found = [(i, line) for i, line in marked if re.search(rf"caught:.*\b{bug}\b", line)]
    return {i + line.lstrip().startswith("//") for i, line in found}


def lines_named(error: EmulatorError) -> set[int]:
    places = error.source + error.other_source
    return {int(line) for line in re.findall(r"emulator_bugs\.cu:(\d+)", places)}


@pytest.mark.parametrize("seed", [0, 3])
@pytest.mark.parametrize("name", RUNS)
def test_kernels_without_bugs_are_silent_and_right(program, name, seed):
    with device("sm_80", seed=seed, warp_races=True) as dev:
        got, want = RUNS[name](dev, program, "kNone")
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name, bug", CAUGHT)
def test_the_bug_is_stopped_at_its_source_line(program, name, bug):
    with pytest.raises(EmulatorError) as caught:
        with device("sm_80", warp_races=bug == "kNoWarpBarrier") as dev:
            RUNS[name](dev, program, bug)
    error = caught.value
    assert error.check in CAUGHT[name, bug] and error.kernel == f"{name}_{bug}"
    assert lines_named(error) & lines_of(bug), error


def test_too_little_dynamic_shared_memory(program):
    with pytest.raises(EmulatorError) as caught:
        with device("sm_80") as dev:
            moments(dev, program, "kNone", shared=8)
    assert caught.value.check == "out of bounds" and "which ends at 0x8" in caught.value.message
    assert lines_named(caught.value) & lines_of("kSmallShared")


def test_a_wrong_mask_shows_in_the_result(program):
    with device("sm_80") as dev:
        got, want = causal(dev, program, "kWrongMask")
    assert not torch.allclose(got, want, atol=0.1)


def test_an_unswizzled_layout_shows_in_the_counters(program):
    with device("sm_80") as dev:
        for bug in ("kNone", "kUnswizzled"):
            transpose(dev, program, bug)
        assert dev.counters("transpose_kNone").total.conflicts == 1.0
        loads = dev.counters("transpose_kUnswizzled").by_class["shared load"]
    assert loads.conflicts == 32.0
