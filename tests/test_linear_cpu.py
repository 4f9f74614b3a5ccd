"""What only the CPU backend has: the ways to cut a product, instruction sets, torch's products."""

import pytest
import torch
import torch.nn.functional as F
from rule import check_rule, gradients, leaves

from llmkern.backends.cpu import _ext, tiles
from llmkern.functional import linear, linear_gated

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# One a path of csrc/cpu/gemm_plan.h: vector, narrow, blocked with tiles that store y themselves
# (N a multiple of the tile's width), blocked with an edge, blocked in several slices of columns.
PATHS = {
    "vector": (4, 130, 300),
    "narrow": (40, 130, 300),
    "blocked": (300, 96, 530),
    "blocked edge": (205, 97, 530),
    "slices": (200, 1100, 4096),
}


@pytest.fixture(params=_ext.load().module.isa_names() if _ext.load().module else [])
def isa(request):
    module = _ext.load().module
    before = module.isa()
    module.select_isa(request.param)
    yield request.param
    module.select_isa(before)


def _check(ours, theirs, tensors, dtype):
    mine, torchs, exact = leaves(tensors), leaves(tensors), leaves(tensors, torch.float64)
    y = [f(*t) for f, t in ((ours, mine), (theirs, torchs), (theirs, exact))]
    check_rule("output", *y)
    grads = [gradients([v], t) for v, t in zip(y, (mine, torchs, exact), strict=True)]
    for index, triple in enumerate(zip(*grads, strict=True)):
        check_rule(f"gradient {index}", *triple)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.usefixtures("isa", "own_product")
def test_every_path_matches_fp64(path, dtype):
    m, n, k = PATHS[path]
    if path == "slices" and dtype != torch.float32:
        pytest.skip("slices depend on the bytes of packed values alone; float32 stands for all")
    tensors = [t.to(dtype) for t in (torch.randn(m, k), torch.randn(n, k) * k**-0.5)]
    tensors.append(torch.randn(n).to(dtype))
    _check(lambda *t: linear(*t, backend="cpu"), F.linear, tensors, dtype)


@pytest.mark.parametrize("path", ["vector", "narrow", "blocked", "blocked edge"])
@pytest.mark.usefixtures("isa", "own_product")
def test_weight_layouts_on_every_path(path):
    m, n, k = PATHS[path]
    x = torch.randn(m, k)
    for weight in (torch.randn(k, n).T, torch.randn(2 * n, 3 * k)[::2, ::3]):
        got = linear(x, weight, activation="relu", backend="cpu")
        want = F.relu(x.double() @ weight.double().T)
        check_rule(path, got, F.relu(x @ weight.T), want)


@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize("size", [(97, 101, 103), (3, 700, 300), (600, 40, 64)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("isa", "own_product")
def test_own_products_are_bitwise_equal_for_any_thread_count(activation, size, dtype):
    m, n, k = size
    tensors = [torch.randn(s).to(dtype) for s in ((m, k), (n, k), (n,), (m, n))]
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3, 1):
        torch.set_num_threads(threads)
        try:
            torch.manual_seed(3)
            x, w, b, r = leaves(tensors)
            y = linear(x, w, b, activation=activation, residual=r, dropout_p=0.1, backend="cpu")
            results.append((y, *gradients([y], (x, w, b, r))))
        finally:
            torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("choice", [tiles.TORCH, tiles.ONEDNN])
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_products_of_torch_between_our_kernels(monkeypatch, choice, activation):
    isa = _ext.load().module.isa()
    monkeypatch.setitem(tiles.GEMM, (isa, torch.float32), choice)
    m, n, k = 33, 70, 40
    x, w, b, r = (torch.randn(s) for s in ((m, k), (n, k), (n,), (m, n)))

    def ours(x, w, b, r):
        return linear(x, w, b, activation=activation, residual=r, backend="cpu")

    def theirs(x, w, b, r):
        y = F.linear(x, w, b)
        return (F.gelu(y) if activation else y) + r

    _check(ours, theirs, [x, w, b, r], torch.float32)
    _check(
        lambda x, wg, wu: linear_gated(x, wg, wu, backend="cpu"),
        lambda x, wg, wu: F.silu(F.linear(x, wg)) * F.linear(x, wu),
        [x, w, torch.randn(n, k)],
        torch.float32,
    )


@pytest.mark.parametrize("choice", [tiles.TORCH, tiles.ONEDNN])
@pytest.mark.parametrize("size", [(9, 5, 0), (9, 0, 5), (0, 5, 9), (1, 6, 7)], ids=str)
def test_products_of_torch_may_be_empty(monkeypatch, choice, size):
    monkeypatch.setitem(tiles.GEMM, (_ext.load().module.isa(), torch.float32), choice)
    m, n, k = size
    tensors = [torch.randn(m, k), torch.randn(n, k), torch.randn(n)]

    def results(function):
        inputs = leaves(tensors)
        y = function(*inputs)
        return [y, *gradients([y], inputs)]

    for ours, theirs in zip(results(linear), results(F.linear), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_pick_is_defined_for_every_isa_and_dtype():
    for isa in ("scalar", "avx2", "avx512", "avx512_bf16"):
        for dtype in DTYPES:
            for rows in (1, 64, 4096):
                assert tiles.pick_gemm(isa, dtype, rows, True) in (
                    tiles.OWN,
                    tiles.ONEDNN,
                    tiles.TORCH,
                )
                assert tiles.pick_gemm(isa, dtype, rows, False) != tiles.ONEDNN
    assert tiles.pick_gemm("avx512_bf16", torch.bfloat16, 512, True) == tiles.TORCH
    assert tiles.pick_gemm("avx2", torch.bfloat16, 512, True) == tiles.OWN
