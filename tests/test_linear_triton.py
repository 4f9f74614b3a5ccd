"""The Triton linear kernels beyond the contract: every tile, split K, wide strides, tile choice."""

import pytest
import torch
import torch.nn.functional as F
from rule import check_rule

from llmkern import random
from llmkern.backends.triton import _calls, _launch, linear_calls, tiles_linear

pytestmark = [
    pytest.mark.skipif(_launch.version() is None, reason="triton is not installed"),
    pytest.mark.usefixtures("emulated_triton"),
]
CPU = torch.device("cpu")
KINDS = {"16-bit": torch.float16, "tf32": torch.float32, "ieee": torch.float32}
CAPABILITIES = (80, 86, 89, 90, 100, 120)


def _tiles():
    """(kind, gated, vectors, tile) of every row of every table, each once."""
    found = {}
    for capability in CAPABILITIES:
        for kind in KINDS:
            for gated in (False, True):
                for vectors in (True, False):
                    for tile in tiles_linear.rows(kind, gated, vectors, capability):
                        found[kind, gated, tile[:4]] = tile
    return [pytest.param(*key[:2], tile, id=f"{key}") for key, tile in found.items()]


def _matrices(m, n, k, dtype):
    """Numbers with at most 10 bits after the point: TF32 multiplies them exactly."""
    sizes = ((m, k), (n, k), (n, k))
    rounded = [(torch.randn(s).mul(s[1] ** -0.5).view(torch.int32) & ~0x1FFF) for s in sizes]
    return [bits.view(torch.float32).to(dtype) for bits in rounded]


NOTHING = linear_calls.Epilogue()


def _run(a, b, epilogue=NOTHING, c=None, d=None, *, kind="tf32", plan=None):
    y = torch.empty(a.shape[0], b.shape[0], dtype=a.dtype)
    on = linear_calls.Target(80, 108, kind == "tf32")
    _calls.run(linear_calls.product(a, b, y, epilogue, c, d, on=on, plan=plan), CPU)
    return y


@pytest.mark.slow
@pytest.mark.parametrize("kind,gated,tile", _tiles())
def test_every_tile_multiplies_around_its_edges(kind, gated, tile):
    m, n, k = tile.block_m + 1, tile.block_n + 1, 2 * tile.block_k + 1
    a, b, c = _matrices(m, n, k, KINDS[kind])
    plan = tiles_linear.Plan(tile, 1, 3 * tile.block_k)
    epilogue = linear_calls.Epilogue(activation="silu" if gated else None)
    got = _run(a, b, epilogue, c if gated else None, kind=kind, plan=plan)

    def formula(a, b, c):
        return F.silu(a @ b.T) * (a @ c.T) if gated else a @ b.T

    check_rule(f"{tile}", got, formula(a, b, c), formula(a.double(), b.double(), c.double()))


@pytest.mark.parametrize("mode", ["plain", "gated", "sum"])
@pytest.mark.parametrize("split,k", [(2, 128), (3, 150), (4, 257)])
def test_split_k_joins_parts_in_a_fixed_order(mode, split, k):
    m, n = 17, 70
    a, b, c = _matrices(m, n, k, torch.float32)
    bias, residual, seed = torch.randn(n), torch.randn(m, n), torch.tensor([11])
    kept = [torch.empty(m, n) for _ in range(2)] if mode == "gated" else []
    epilogue = NOTHING
    if mode != "sum":
        up_bias, (preact, up_preact) = (bias, kept) if kept else (None, (None, None))
        epilogue = linear_calls.Epilogue(
            "gelu", bias, up_bias, preact, up_preact, residual, seed, 0.3
        )
    tile = tiles_linear.Tile(16, 64, 32, 4, 3, 1.0)
    k_part = -(-k // (32 * split)) * 32
    plan = tiles_linear.Plan(tile, -(-k // k_part), k_part)
    second = {"plain": (None, None), "gated": (c, None), "sum": (c, a.flip(1))}[mode]
    got = _run(a, b, epilogue, *second, plan=plan)

    def formula(a, b, c, bias, residual):
        if mode == "sum":
            return a @ b.T + a.flip(1) @ c.T
        y = F.gelu(a @ b.T + bias)
        y = y * (a @ c.T + bias) if mode == "gated" else y
        keep = random.flat_keep_mask(seed, (m, n), 0.3)
        return torch.where(keep, y * random.scale(0.3), 0.0) + residual

    tensors = (a, b, c, bias, residual)
    check_rule(mode, got, formula(*tensors), formula(*(t.double() for t in tensors)))
    for index, factor in enumerate((b, c)[: len(kept)]):
        exact = a.double() @ factor.double().T + bias.double()
        check_rule(f"kept {index}", kept[index], a @ factor.T + bias, exact)
    assert torch.equal(got, _run(a, b, epilogue, *second, plan=plan))


@pytest.mark.parametrize("n", [64, 70])
@pytest.mark.parametrize("split", [1, 2])
def test_dropout_mask_is_the_contracts_bit_for_bit(n, split):
    seed = torch.tensor([2**40 + 5])
    a, b = torch.ones(40, 64), torch.ones(n, 64)
    plan = tiles_linear.Plan(tiles_linear.Tile(16, 64, 32, 4, 3, 1.0), split, 64 // split)
    y = _run(a, b, linear_calls.Epilogue(seed=seed, dropout_p=0.5), plan=plan)
    assert torch.equal(y != 0, random.flat_keep_mask(seed, (40, n), 0.5))


def test_strides_whose_offsets_need_64_bits():
    step = 2**23 + 8  # 255 rows of it pass 2^31
    store = torch.zeros(2 * step + 64, dtype=torch.float16)
    a = store.as_strided((3, 64), (step, 1))
    a.copy_(torch.randn(3, 64))
    b = torch.randn(40, 64).half()
    calls = linear_calls.product(
        a, b, torch.empty(3, 40).half(), on=linear_calls.Target(80, 1, True)
    )
    assert calls[0].constexprs["WIDE"]
    check_rule("wide", _run(a, b), a @ b.T, a.double() @ b.double().T)


def test_a_tile_grid_visits_every_tile_once_whatever_its_shape():
    tile = tiles_linear.Tile(16, 32, 16, 2, 3, 1.0)
    for m, n in ((16 * 9 + 3, 32 * 2 + 1), (16, 32 * 3)):
        a, b, _ = _matrices(m, n, 16, torch.float32)
        got = _run(a, b, plan=tiles_linear.Plan(tile, 1, 16))
        torch.testing.assert_close(got, a @ b.T)


def _pick(kind, m, n, k, capability=80, processors=108, gated=False):
    tiles = tiles_linear.rows(kind, gated, True, capability)
    return tiles_linear.pick(kind, gated, tiles, m, n, k, processors)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_plans_cover_k_without_an_empty_part(kind, gated, capability):
    for m, n, k in ((1, 1, 0), (1, 1, 1), (1, 50257, 768), (7, 64, 100_000), (4096, 4096, 4096)):
        plan = _pick(kind, m, n, k, capability, gated=gated)
        assert plan.split_k * plan.k_part >= k
        assert plan.split_k == 1 or (plan.split_k - 1) * plan.k_part < k
        assert plan.k_part % plan.tile.block_k == 0


def test_large_products_take_large_tiles_and_few_rows_take_flat_ones_with_split_k():
    for capability in CAPABILITIES:
        first = tiles_linear.rows("16-bit", False, True, capability)[0]
        assert _pick("16-bit", 8192, 8192, 8192, capability).tile == first
        few = _pick("16-bit", 8, 1024, 4096, capability)
        assert few.tile.block_m == 16
        assert few.split_k > 1
    assert _pick("16-bit", 8192, 8192, 8192, processors=1).split_k == 1


def test_ranges_of_rows_cover_them_and_do_not_depend_on_more_than_shape_and_card():
    for m, n in ((0, 8), (1, 1), (33, 70), (4096, 768), (100_003, 64)):
        cut = tiles_linear.pick_columns(m, n, 108)
        assert cut.parts * cut.m_part >= m and cut.m_part % cut.block_m == 0
        assert cut.parts == 1 or (cut.parts - 1) * cut.m_part < m
