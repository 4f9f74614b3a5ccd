"""The triton norms beyond test_norm.py: rows that do not fit on chip, and the tiles."""

import pytest
import torch
from norm_cases import check_add_norm

from llmkern.backends.triton import _launch, norm, tiles_norm

pytestmark = [
    pytest.mark.skipif(
        _launch.version() is None, reason="triton is not installed, the kernels are its own"
    ),
    pytest.mark.usefixtures("emulated_triton"),
]
COLUMNS = [1, 2, 7, 8, 64, 100, 255, 256, 257, 768, 1024, 1280, 1536, 2048, 3072, 4096, 5120, 7168,
           8192, 12288, 16384, 16385, 50000]  # fmt: skip


@pytest.fixture
def only_wide(monkeypatch):
    """No row fits on chip; 64 columns at a time."""
    monkeypatch.setattr(tiles_norm, "_row_shape", lambda *arguments: None)
    monkeypatch.setattr(tiles_norm, "WIDE_CHUNK", 64)
    choices = (tiles_norm.pick_forward, tiles_norm.pick_backward,
               norm._forward_plan, norm._backward_plan)  # fmt: skip
    for choice in choices:
        choice.cache_clear()
    yield
    for choice in choices:
        choice.cache_clear()


@pytest.mark.parametrize(("kind", "dtype"), [("layer", torch.float32), ("rms", torch.bfloat16)])
def test_wide_norm_matches_fp64(only_wide, kind, dtype):
    rows, cols = 3, 139
    assert tiles_norm.pick_forward(rows, cols, dtype.itemsize, 80).chunks == 0
    tensors = [torch.randn(shape).to(dtype) for shape in ((rows, cols),) * 2 + (cols, cols)]
    tensors[1] += 100.0  # a mean that a one-pass variance would not survive
    check_add_norm("triton", kind, tensors, p=0.3)


@pytest.mark.parametrize("pick", [tiles_norm.pick_forward, tiles_norm.pick_backward])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("rows", [1, 7, 2048, 1 << 20])
def test_tiles_cover_the_row_and_fit_the_registers(pick, itemsize, rows):
    for cols in COLUMNS:
        tile = pick(rows, cols, itemsize, 80)
        if tile.chunks == 0:
            assert cols > 4096
            continue
        assert cols <= tile.chunk * tile.chunks < max(2 * cols, 9)
        assert tile.chunk & (tile.chunk - 1) == 0 and tile.chunk % 8 == 0
        elements = tile.block_rows * tile.chunk * tile.chunks
        assert elements <= tile.num_warps * 32 * 64
        blocks = -(-rows // tile.block_rows)
        assert 1 <= tile.programs <= blocks


def test_tiles_of_common_widths_have_one_warp_a_row_and_no_padding():
    for cols in (256, 512, 768, 1024, 1280):
        tile = tiles_norm.pick_forward(4096, cols, 2, 90)
        assert tile.covers(cols)
        assert tile.block_rows == tile.num_warps


def test_every_sm_has_a_program_and_few_partial_sums():
    for capability, sms in tiles_norm.SMS.items():
        for rows in (2048, 16384):
            assert tiles_norm.pick_forward(rows, 1024, 2, capability).programs >= sms // 2
            assert tiles_norm.pick_backward(rows, 1024, 2, capability).programs <= sms
    assert tiles_norm.multiprocessors(87) == tiles_norm.SMS[86]
    assert tiles_norm.multiprocessors(103) == tiles_norm.SMS[100]
