"""llmkern.testing: the pytest fixture for users' kernels."""

import pytest
import torch
from emulator_ptx import kernel

from llmkern.emulator import EmulatorError, Program
from llmkern.testing import emulated_gpu  # noqa: F401  a fixture

STORE = "mad.wide.u32 %d1, %r40, 4, %d40;\nst.global.b32 [%d1], %r40;"


def test_fixture_launches_and_counts(emulated_gpu):  # noqa: F811
    out = torch.zeros(32, dtype=torch.int32)
    emulated_gpu.launch(Program(kernel(STORE, 1)), "k", 1, 32, [out])
    assert out.tolist() == list(range(32))
    counters = emulated_gpu.counters()
    assert counters.by_class["global store"].coalescing == 1.0
    assert counters.global_bytes == 128 and emulated_gpu.capability == 80
    assert "global store" in emulated_gpu.report()
    with pytest.raises(EmulatorError):
        emulated_gpu.launch(Program(kernel(STORE, 1)), "k", 1, 64, [out])


@pytest.mark.parametrize("emulated_gpu", ["sm_90"], indirect=True)
def test_fixture_takes_an_architecture(emulated_gpu):  # noqa: F811
    assert emulated_gpu.capability == 90
