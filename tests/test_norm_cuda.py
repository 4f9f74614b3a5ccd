"""The cuda norms beyond test_norm.py: the widths that have kernels of their own."""

import pytest
import torch
from norm_cases import check_add_norm
from rule import check_rule, gradients, leaves
from torch.nn import functional

from llmkern import use_backend
from llmkern.functional import layer_norm, rms_norm

pytestmark = pytest.mark.usefixtures("emulated_cuda")
# Groups of 1, 2, 3, 4 and 8 warps with 3 or 4 packs of eight columns a thread; 1280 has neither.
COLUMNS = [768, 1024, 1280, 1536, 2048, 2304, 4096, 8192]


@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("cols", COLUMNS)
@pytest.mark.parametrize(
    ("dtype", "weight_dtype"),
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float16),
        (torch.float32, torch.float32),
    ],
    ids=str,
)
def test_norm_of_exact_widths_matches_fp64(kind, cols, dtype, weight_dtype):
    rows = 9  # blocks that are not full; backward, a group without a row
    weight, bias = (torch.randn(cols).to(weight_dtype) for _ in range(2))
    x = torch.full((rows, cols + 8), float("nan"), dtype=dtype)  # between rows
    x[:, :cols] = torch.randn(rows, cols) + 3.0
    tensors = [x, weight, bias]
    used = slice(None) if kind == "layer" else slice(0, -1)

    def ours(x, w, b):
        x = x[:, :cols]
        return layer_norm(x, cols, w, b) if kind == "layer" else rms_norm(x, cols, w, 1e-5)

    def theirs(x, w, b):
        x, w, b = x[:, :cols], w.to(x.dtype), b.to(x.dtype)
        if kind == "layer":
            return functional.layer_norm(x, (cols,), w, b)
        return functional.rms_norm(x, (cols,), w, 1e-5)

    results = []
    for function, exact in ((ours, False), (theirs, False), (theirs, True)):
        inputs = leaves(tensors, torch.float64) if exact else leaves(tensors)
        with use_backend("cuda"):
            y = function(*inputs)
            results.append([y, *gradients((y,), inputs[used])])
    for name, got, torchs, exact in zip(("y", "dx", "dw", "db"), *results, strict=False):
        check_rule(f"{kind} {name}", got, torchs, exact)


# Forward groups take several rows from 1024 warps on: the next row is fetched, its addresses move.
@pytest.mark.parametrize(("rows", "cols"), [(1030, 768), (259, 4096)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_many_rows_of_exact_widths_match_fp64(rows, cols, dtype):
    wide = torch.full((rows, cols + 8), float("nan"), dtype=dtype)
    wide[:, :cols] = torch.randn(rows, cols)
    x, weight, bias = wide[:, :cols], *torch.randn(2, cols).to(dtype)
    exact = functional.layer_norm(x.double(), (cols,), weight.double(), bias.double())
    torchs = functional.layer_norm(x, (cols,), weight, bias)
    check_rule("y", layer_norm(x, cols, weight, bias, backend="cuda"), torchs, exact)


@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize(("rows", "cols"), [(700, 768), (5, 1024), (6, 4096)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_add_norm_of_exact_widths_matches_fp64(kind, rows, cols, dtype):
    tensors = [torch.randn(shape).to(dtype) for shape in ((rows, cols),) * 2 + (cols, cols)]
    check_add_norm("cuda", kind, tensors, p=0.3)
