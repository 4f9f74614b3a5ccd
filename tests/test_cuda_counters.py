"""What the CUDA kernels cost by the emulator's counters: bank conflicts, unused bytes of sectors,
matrix instructions. Gates, not timings: they hold on any machine."""

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


def test_norm_accesses_are_coalesced_and_free_of_conflicts(device):
    x, weight, bias = torch.randn(64, 1024), torch.randn(1024), torch.randn(1024)
    _run(lambda x, w, b, **o: functional.layer_norm(x, (1024,), w, b, **o),
         *(t.to(BF16) for t in (x, weight, bias)))  # fmt: skip
    forward = _counters(device, "norm_fwd_kernel").total
    assert forward.coalescing == 1.0
    backward = _counters(device, "norm_bwd_kernel").total
    # The float32 partial sums, written 16 of 32 bytes at a time, are the only other accesses.
    assert backward.coalescing > 0.9
    assert backward.conflicts == 1.0
    # x and y once, weight and bias once for each of the 64 groups of lanes.
    assert 32 * forward.sectors <= 64 * 1024 * (2 + 2 + 2 * 2) + 64 * 2 * 32


@pytest.mark.parametrize("size", [64, 1280])  # tiles of 64 and of 128
def test_linear_reads_whole_sectors_and_multiplies_once(device, size):
    k = 64
    _run(functional.linear, torch.randn(size, k).to(BF16), torch.randn(size, k).to(BF16))
    counters = _counters(device, "gemm_kernel")
    assert counters.total.conflicts == 1.0
    assert counters.total.coalescing == 1.0
    assert counters.mma == 3 * size * size * k // MMA_PRODUCTS


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
    assert backward.mma == 7 * computed
    assert backward.total.conflicts == 1.0
    assert backward.total.coalescing > 0.95


def test_tf32_products_run_on_tensor_cores_where_torch_allows_them(device):
    x, weight = torch.randn(70, 50), torch.randn(40, 50)
    exact = x.double() @ weight.double().T
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        _run(functional.linear, x, weight)
        y = functional.linear(x, weight, backend="cuda")
    finally:
        torch.set_float32_matmul_precision(before)
    counters = _counters(device, "gemm_kernel")
    assert counters.mma > 0
    assert counters.total.conflicts == 1.0
    # Each of the 50 products is off by 2^-11 for either factor at most; ten of them at once is far.
    assert (y.double() - exact).abs().max() < 10 * 2**-10 * x.abs().max() * weight.abs().max()
