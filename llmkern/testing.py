"""Fixtures for testing GPU kernels without a GPU. In a conftest.py:

pytest_plugins = ["llmkern.testing"]

def test_add(emulated_gpu):
    add[(1,)](x, y, out, n, BLOCK=1024)         # any @triton.jit kernel, on CPU tensors
    assert emulated_gpu.counters().total.conflicts == 1.0
"""

from collections.abc import Iterator

import pytest

from llmkern import emulator


@pytest.fixture
def emulated_gpu(request: pytest.FixtureRequest) -> Iterator[emulator.Device]:
    """An emulated device, with every check on, for the time of a test.

    The architecture is "sm_80", or the test's parameter:
    `@pytest.mark.parametrize("emulated_gpu", ["sm_90"], indirect=True)`.
    """
    with emulator.device(getattr(request, "param", "sm_80")) as dev:
        yield dev
