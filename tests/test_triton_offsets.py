"""Triton kernels index in 64 bits: rows 2^30 + 48 elements apart, in memory that is only reserved.
Attention's is in test_attention_properties.py."""

import mmap

import pytest
import torch

from llmkern import functional, use_backend
from llmkern.backends.triton import _launch

pytestmark = [
    pytest.mark.skipif(
        _launch.version() is None, reason="triton is not installed, the kernels are its own"
    ),
    pytest.mark.usefixtures("emulated_triton"),
]
GAP, ROWS, COLS = 2**30 + 48, 3, 64  # a stride of 32 bits, of which row 2 lies beyond them
WEIGHT = torch.linspace(-1.0, 1.0, COLS * COLS).reshape(COLS, COLS).bfloat16()
OPS = {
    "layer_norm": lambda x: functional.layer_norm(x, COLS, WEIGHT[0], WEIGHT[1]),
    "add_rms_norm": lambda x: functional.add_rms_norm(x, x, COLS, WEIGHT[0]),
    "linear": lambda x: functional.linear(x, WEIGHT, WEIGHT[0], residual=x),
    "gelu": functional.gelu,
    "dropout": lambda x: functional.dropout(x, 0.5),
}


@pytest.fixture(scope="module")
def apart():
    """Rows [3, 64], the last one beyond 2^31 elements, twice: an input and a gradient."""
    memory = torch.frombuffer(mmap.mmap(-1, 2 * (2 * GAP + 4 * COLS)), dtype=torch.bfloat16)
    rows = [memory[start:].as_strided((ROWS, COLS), (GAP, 1)) for start in (0, 2 * COLS)]
    for t in rows:
        t.copy_(torch.randn(ROWS, COLS))
    return rows


@pytest.mark.parametrize("op", OPS)
def test_elements_beyond_2_31_are_read_where_they_lie(op, apart):
    results = []
    for x, dy in (apart, [t.clone() for t in apart]):
        torch.manual_seed(5)
        x = x.detach().requires_grad_()
        with use_backend("triton"):
            y = OPS[op](x)
            results.append((y, *torch.autograd.grad(y, x, dy)))
    for far, near in zip(*results, strict=True):
        assert torch.equal(far, near)
