"""Every op of the GPU backends on each architecture that the emulator knows, on small shapes, with
every check on: the results agree with the reference, and no kernel races, not inside a warp
either."""

import pytest
import torch

from llmkern import emulator, functional
from llmkern.backends.cuda import _ext as cuda_ext
from llmkern.backends.triton import _launch

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
LIMITS = {BF16: 4e-2, F16: 1e-2, F32: 1e-2}  # of the largest value; float32 products are tf32


def norm(name, width, residual=False):
    function = getattr(functional, name)
    bias = "layer" in name

    def make(dtype):
        rows = [torch.randn(9, width, dtype=dtype) for _ in range(1 + residual)]
        return rows + [torch.randn(width, dtype=dtype) for _ in range(1 + bias)]

    def run(*inputs, **options):
        head, tail = inputs[: 1 + residual], inputs[1 + residual :]
        return function(*head, (width,), *tail, **options)

    return make, run


def linear(m, k, n, **kept):
    def make(dtype):
        return [torch.randn(m, k, dtype=dtype), torch.randn(n, k, dtype=dtype) / k**0.5,
                torch.randn(n, dtype=dtype)]  # fmt: skip

    return make, lambda *inputs, **options: functional.linear(*inputs, **kept, **options)


def linear_gated(m, k, n):
    def make(dtype):
        return [torch.randn(m, k, dtype=dtype), torch.randn(n, k, dtype=dtype) / k**0.5,
                torch.randn(n, k, dtype=dtype) / k**0.5]  # fmt: skip

    return make, functional.linear_gated


def attention(s, t, d, groups=1, **kept):
    def make(dtype):
        sizes = ((1, 2, s, d), (1, 2 // groups, t, d), (1, 2 // groups, t, d))
        return [torch.randn(size, dtype=dtype) for size in sizes]

    def run(*inputs, **options):
        return functional.scaled_dot_product_attention(*inputs, **kept, **options)

    return make, run


def elementwise(name):
    function = getattr(functional, name)
    return lambda dtype: [torch.randn(7, 300, dtype=dtype)], function


CASES = {
    "layer_norm": norm("layer_norm", 768),
    "rms_norm": norm("rms_norm", 1000),
    "add_layer_norm": norm("add_layer_norm", 256, residual=True),
    "add_rms_norm": norm("add_rms_norm", 256, residual=True),
    "linear": linear(40, 64, 72),
    "linear_gelu": linear(64, 128, 64, activation="gelu"),
    "linear_gated": linear_gated(33, 64, 40),
    "attention": attention(70, 70, 64, is_causal=True),
    "attention_gqa": attention(33, 65, 32, groups=2, enable_gqa=True),
    "gelu": elementwise("gelu"),
    "silu": elementwise("silu"),
}
ARCHITECTURES = ["sm_80", "sm_86", "sm_89", "sm_120"]
# The short run: compiling takes most of the time, and other tests run every op on sm_80.
SHORT = {
    ("layer_norm", "triton", "sm_86", BF16),
    ("linear", "triton", "sm_120", BF16),
    ("attention", "triton", "sm_120", BF16),
    ("silu", "triton", "sm_89", BF16),
    ("linear", "cuda", "sm_86", BF16),
    ("attention", "cuda", "sm_89", BF16),
}


def serves(backend, name, dtype):
    if backend == "triton":
        return True
    return name not in ("gelu", "silu") and not (name.startswith("attention") and dtype == F32)


def cases():
    for name in CASES:
        for backend in ("triton", "cuda"):
            for architecture in ARCHITECTURES:
                for dtype in (BF16, F16, F32):
                    if not serves(backend, name, dtype):
                        continue
                    case = (name, backend, architecture, dtype)
                    marks = [] if case in SHORT else [pytest.mark.slow]
                    yield pytest.param(*case, marks=marks)


def results(make, run, dtype, backend):
    torch.manual_seed(0)
    leaves = [t.requires_grad_() for t in make(dtype)]
    y = run(*leaves, backend=backend)
    parts = y if isinstance(y, tuple) else (y,)
    torch.autograd.backward(parts, [torch.randn_like(p) for p in parts])
    return [*(p.detach() for p in parts), *(t.grad for t in leaves)]


@pytest.mark.parametrize("name, backend, architecture, dtype", cases())
def test_every_op_runs_clean_on_every_architecture(name, backend, architecture, dtype):
    make, run = CASES[name]
    wanted = results(make, run, dtype, "reference")
    with emulator.device(architecture, warp_races=True) as dev:
        reason = (cuda_ext if backend == "cuda" else _launch).unavailable("cpu")
        if reason:
            pytest.skip(reason)
        got = results(make, run, dtype, backend)
        assert dev.counters().launches >= 2
    for ours, reference in zip(got, wanted, strict=True):
        scale = reference.double().abs().max()
        error = (ours.double() - reference.double()).abs().max()
        assert error <= LIMITS[dtype] * scale
