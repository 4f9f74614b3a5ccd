"""What the CUDA kernels cost by the emulator's counters: bank conflicts, unused bytes of sectors,
matrix instructions. Gates, not timings: they hold on any machine."""

import contextlib

import pytest
import torch

from llmkern import emulator, functional
from llmkern.backends.cuda import _ext

BF16 = torch.bfloat16
MMA_PRODUCTS = 16 * 8 * 16  # multiply-adds of one m16n8k16


@pytest.fixture
def device():
    with emulator.device("sm_80") as made:
        reason = _ext.unavailable("cpu")
        if reason:
            pytest.skip(reason)
        yield made


def _counters(device, *words: str):
    """Of the kernels whose names hold one of the words."""
    total = emulator.Counters()
    for kernel in device.kernels():
        if any(word in kernel for word in words):
            total.add(device.counters(kernel))
    assert total.launches
    return total


def _run(function, *inputs, **options):
    leaves = [t.requires_grad_() for t in inputs]
    y = function(*leaves, backend="cuda", **options)
    y.backward(torch.randn_like(y))


@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=str)
@pytest.mark.parametrize("cols", [64, 1024, 1280, 16384])  # a part of a warp, exact, padded, long
def test_norm_accesses_are_coalesced_and_free_of_conflicts(device, dtype, cols):
    x, residual = torch.randn(64, cols).to(dtype), torch.randn(64, cols).to(dtype)
    weight, bias = torch.randn(cols).to(dtype), torch.randn(cols).to(dtype)
    _run(lambda x, w, b, **o: functional.layer_norm(x, (cols,), w, b, **o), x, weight, bias)
    forward = _counters(device, "norm_fwd").total
    if cols == 1024:
        # x and y once, weight and bias once for each of the 16 blocks of four rows.
        least = (64 * 2 + 16 * 2) * cols * dtype.itemsize + 64 * 2 * 32
        assert 32 * forward.sectors <= least
    _run(lambda x, r, w, b, **o: functional.add_layer_norm(x, r, cols, w, b, dropout_p=0.1, **o),
         x, residual, weight, bias)  # fmt: skip
    for words in (["norm_fwd"], ["norm_bwd"]):
        counters = _counters(device, *words).total
        assert counters.coalescing == 1.0
        assert counters.conflicts == 1.0


# Warp instructions for 32 elements and bytes over the minimum; best of other kernels seen under the
# same counters: layer_norm 24.9 / 19.6 at 2.0x forward, 23.9 / 20.7 at 1.13x / 1.11x backward,
# rms_norm 19.5 / 15.6 at 1.5x and 19.6 / 17.7 at 1.07x.
@pytest.mark.parametrize(
    ("kind", "rows", "cols", "forward", "backward"),
    [
        ("layer", 2048, 1024, (11.2, 1.08), (18.6, 1.10)),
        ("layer", 2048, 4096, (10.4, 1.08), (18.5, 1.10)),
        ("layer", 16384, 768, (10.2, 1.05), (17.9, 1.07)),
        ("rms", 2048, 1024, (8.2, 1.05), (13.1, 1.06)),
        ("rms", 2048, 4096, (7.2, 1.05), (12.6, 1.06)),
    ],
)
def test_norm_spends_few_instructions_and_bytes(device, kind, rows, cols, forward, backward):
    x, weight, bias = (t.to(BF16) for t in (torch.randn(rows, cols), *torch.randn(2, cols)))
    if kind == "layer":
        _run(lambda x, w, b, **o: functional.layer_norm(x, (cols,), w, b, **o), x, weight, bias)
    else:
        _run(lambda x, w, **o: functional.rms_norm(x, (cols,), w, **o), x, weight)
    for words, tensors, (instructions, ratio) in (
        (["norm_fwd"], 2, forward),
        (["norm_bwd", "column_sums"], 3, backward),
    ):
        counters = _counters(device, *words)
        assert counters.warp_instructions <= instructions * rows * cols / 32
        assert counters.global_bytes <= ratio * tensors * 2 * rows * cols
        assert counters.total.coalescing >= 0.99
        assert counters.total.conflicts == 1.0


# Warp instructions a mma; best of other kernels seen: 2.80 with tiles of 128, 3.85 with 64 x 128,
# 6.4 with small ones, 4.3 with k in parts.
@pytest.mark.parametrize(
    ("m", "n", "k", "limit"),
    [(1280, 1280, 512, 2.11), (512, 512, 512, 3.7), (256, 768, 3072, 3.12)],
    ids=["large tiles", "small tiles", "k in parts"],
)
def test_linear_spends_few_instructions_a_product(device, m, n, k, limit):
    x, weight = torch.randn(m, k).to(BF16), torch.randn(n, k).to(BF16)
    functional.linear(x, weight, backend="cuda")
    counters = _counters(device, "gemm")
    assert counters.mma == m * n * k // MMA_PRODUCTS
    assert counters.total.conflicts == 1.0
    assert counters.total.coalescing >= 0.99
    assert counters.warp_instructions <= limit * counters.mma


@pytest.mark.parametrize("size", [64, 1280])  # tiles of 64 and of 128
def test_linear_reads_whole_sectors_and_multiplies_once(device, size):
    k = 64
    _run(functional.linear, torch.randn(size, k).to(BF16), torch.randn(size, k).to(BF16))
    counters = _counters(device, "gemm_kernel")
    assert counters.total.conflicts == 1.0
    assert counters.total.coalescing == 1.0
    assert counters.mma == 3 * size * size * k // MMA_PRODUCTS


@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize("kind", ["bf16", "tf32", "ieee"])
def test_linear_epilogues_read_and_write_whole_sectors(device, kind, activation):
    dtype = BF16 if kind == "bf16" else torch.float32
    inputs = (torch.randn(128, 1024), torch.randn(128, 1024), torch.randn(128))
    with _older_switch() if kind == "tf32" else contextlib.nullcontext():
        _run(
            lambda x, w, b, **o: functional.linear(x, w, b, activation=activation, **o),
            *(t.to(dtype) for t in inputs),
        )
    kernels = " ".join(device.kernels())
    assert ("gemm_join" in kernels) == (kind != "ieee") and "linear_bwd" in kernels
    counters = _counters(device, "gemm", "linear_bwd").total
    assert counters.coalescing == 1.0
    assert counters.conflicts == 1.0


@pytest.mark.parametrize("head_dim", [64, 128])
def test_attention_multiplies_what_the_mask_leaves(device, head_dim):
    b, h, s = 1, 1, 256
    q, k, v = (torch.randn(b, h, s, head_dim).to(BF16) for _ in range(3))
    _run(lambda q, k, v, **o: functional.scaled_dot_product_attention(q, k, v, is_causal=True, **o),
         q, k, v)  # fmt: skip
    product = s * s * head_dim // MMA_PRODUCTS
    blocks = s // 64
    computed = product * (blocks + 1) / (2 * blocks)  # tiles of 64 x 64 on and below the diagonal
    forward = _counters(device, "attention_fwd")
    assert forward.mma == 2 * computed
    assert forward.total.conflicts == 1.0
    assert forward.total.coalescing > 0.99
    backward = _counters(device, "attention_bwd", "attention_delta")
    blocks = s // 32  # a warp leaves out what it can of 32 queries and its keys
    assert backward.mma == 5 * product * (blocks + 1) / (2 * blocks)
    assert backward.total.conflicts == 1.0
    assert backward.total.coalescing > 0.99


# Warp instructions for each mma that the pairs a query sees need at least; best of other kernels
# seen: 9.49 / 6.56 causal, 6.28 / 4.34 full.
@pytest.mark.parametrize(
    ("head_dim", "causal", "limit"),
    [(64, True, 8.8), (128, True, 6.0), (64, False, 6.28), (128, False, 4.34)],
)
def test_attention_spends_few_instructions_a_product(device, head_dim, causal, limit):
    h, s = 2, 512
    q, k, v = (torch.randn(1, h, s, head_dim).to(BF16) for _ in range(3))
    functional.scaled_dot_product_attention(q, k, v, is_causal=causal, backend="cuda")
    pairs = s * (s + 1) // 2 if causal else s * s
    least = 2 * h * pairs * head_dim / MMA_PRODUCTS
    counters = _counters(device, "attention_fwd")
    assert counters.mma <= 1.13 * least
    assert counters.warp_instructions <= limit * least


# The same of backward, with global bytes over those of all inputs and outputs; best of others
# 8.52 / 6.03 causal with 1.25 of the least mma, 5.13 / 3.76 full.
@pytest.mark.parametrize(
    ("head_dim", "causal", "limit", "ratio"),
    [(64, True, 5.7, 2.4), (128, True, 5.5, 2.4), (64, False, 3.9, 3.5), (128, False, 3.7, 3.5)],
)
def test_attention_backward_spends_few_instructions_a_product(
    device, head_dim, causal, limit, ratio
):
    h, s = 2, 512
    q, k, v = (torch.randn(1, h, s, head_dim).to(BF16) for _ in range(3))
    _run(functional.scaled_dot_product_attention, q, k, v, is_causal=causal)
    pairs = s * (s + 1) // 2 if causal else s * s
    least = 5 * h * pairs * head_dim / MMA_PRODUCTS
    counters = _counters(device, "attention_bwd", "attention_delta")
    assert counters.mma <= 1.07 * least
    assert counters.warp_instructions <= limit * least
    assert counters.global_bytes <= ratio * 8 * h * s * head_dim * 2
    assert counters.total.conflicts == 1.0
    assert counters.total.coalescing > 0.99


@contextlib.contextmanager
def _older_switch():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextlib.contextmanager
def _newer_switch():
    matmul = torch.backends.cuda.matmul
    if not hasattr(matmul, "fp32_precision"):
        pytest.skip("torch 2.9 and newer")
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def _to_tf32(x):
    """Rounded to the nearest of 10 bits of mantissa, as torch's products round."""
    return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


@pytest.mark.parametrize("k", [3, 50, 130])  # of 16 in a tile, tiles of k four at a time
@pytest.mark.parametrize("switch", [_older_switch, _newer_switch])
def test_tf32_products_run_on_tensor_cores_where_torch_allows_them(device, switch, k):
    x, weight = torch.randn(70, k), torch.randn(40, k)
    exact = _to_tf32(x).double() @ _to_tf32(weight).double().T
    with switch():
        _run(functional.linear, x, weight)
        y = functional.linear(x, weight, backend="cuda")
    counters = _counters(device, "gemm_kernel")
    assert counters.mma > 0
    assert counters.total.conflicts == 1.0
    # Products of rounded factors are exact in float32; their sum is one of float32.
    assert (y.double() - exact).abs().max() < 2**-20 * k**0.5 * x.abs().max() * weight.abs().max()


def test_tf32_products_spend_few_instructions(device):
    """Half of one of them, for each mma, rounds to nearest; the best of others cuts, with 2.67."""
    x, weight = torch.randn(1280, 512), torch.randn(1280, 512)
    with _older_switch():
        functional.linear(x, weight, backend="cuda")
    counters = _counters(device, "gemm_kernel")
    assert counters.mma == 1280 * 1280 * 512 // (16 * 8 * 8)
    assert counters.total.conflicts == 1.0
    assert counters.warp_instructions <= 2.48 * counters.mma
