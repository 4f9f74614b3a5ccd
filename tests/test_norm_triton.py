"""The triton norms beyond test_norm.py: rows that do not fit on chip, and the tiles."""

import pytest
import torch
from rule import check_rule, gradients, leaves
from torch.nn import functional

from llmkern import random, use_backend
from llmkern.backends.triton import _launch, norm, tiles_norm
from llmkern.functional import add_layer_norm, add_rms_norm

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
    rows, cols, p = 3, 139, 0.3
    assert tiles_norm.pick_forward(rows, cols, dtype.itemsize, 80).chunks == 0
    tensors = [torch.randn(shape).to(dtype) for shape in ((rows, cols),) * 2 + (cols, cols)]
    tensors[1] += 100.0  # a mean that a one-pass variance would not survive
    torch.manual_seed(3)
    state = torch.get_rng_state()
    seed = random.draw_seed(torch.device("cpu"))
    factor = random.flat_keep_mask(seed, (rows, cols), p).double() * random.scale(p)

    def ours(x, residual, weight, bias):
        torch.set_rng_state(state)
        if kind == "layer":
            return add_layer_norm(x, residual, cols, weight, bias, dropout_p=p, prenorm=True)
        return add_rms_norm(x, residual, cols, weight, 1e-5, dropout_p=p, prenorm=True)

    def theirs(x, residual, weight, bias):
        z = x * factor.to(x.dtype) + residual
        if kind == "layer":
            return functional.layer_norm(z, (cols,), weight, bias), z
        return functional.rms_norm(z, (cols,), weight, 1e-5), z

    used = slice(None) if kind == "layer" else slice(0, -1)
    results = []
    for function, dtype_of in ((ours, dtype), (theirs, dtype), (theirs, torch.float64)):
        inputs = leaves(tensors, dtype_of)
        with use_backend("triton"):
            outputs = function(*inputs)
            results.append([*outputs, *gradients(outputs, inputs[used])])
    for index, (got, torchs, exact) in enumerate(zip(*results, strict=True)):
        check_rule(f"{kind} {index}", got, torchs, exact)


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
