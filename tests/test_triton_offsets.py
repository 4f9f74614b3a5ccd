"""Triton kernels index in 64 bits: rows 2^30 + 48 elements apart, in memory that is only reserved.
Attention's is in test_attention_properties.py. No grid is longer than a card allows."""

import mmap

import pytest
import torch

from llmkern import functional, use_backend
from llmkern.backends.triton import _launch, _views, norm, tiles_elementwise, tiles_norm
from llmkern.specs import NormSpec

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


LONGEST_AXIS = 65535  # of a grid, but for the first


def test_rows_longer_than_a_grid_is_wide_are_copied():
    def rows(cols):
        return torch.empty_strided((2, cols), (cols + 8, 1), dtype=torch.bfloat16, device="meta")

    for cols in (_views.MOST_COLUMNS, _views.MOST_COLUMNS + 1):
        _, count, width, _ = _views.plane_of(rows(cols))
        blocks = -(-width // tiles_elementwise.pick_rows(width).chunk)
        assert count == 1 or blocks <= LONGEST_AXIS
    assert _views.plane_of(rows(_views.MOST_COLUMNS))[1] == 2


def test_sums_of_the_longest_norm_fit_in_a_grid(monkeypatch):
    """An image as one row: [3, 64, 512, 1024] over its last three dims."""
    grids = []

    class Kernel:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *arguments, **options: None

    monkeypatch.setattr(norm._backward_kernels(), "norm_bwd_affine", Kernel())
    spec = NormSpec(torch.bfloat16, torch.bfloat16, "cuda", 3, 64 * 512 * 1024, 1e-5, False, False,
                    False, 0.0, True, torch.bfloat16)  # fmt: skip
    tile = tiles_norm.pick_backward(spec.rows, spec.cols, 2, 80)
    norm._partial_sums(spec, tile, None, 0, None, 0, None, [None, None])
    assert max(grids[0][1:]) <= LONGEST_AXIS
