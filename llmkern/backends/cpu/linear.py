"""Linear layers with epilogues: csrc/cpu/gemm.cpp, or torch's own product between the kernels of
csrc/cpu/linear.cpp where that is faster (tiles.py)."""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from llmkern import numerics, random
from llmkern.backends.cpu import _ext, tiles
from llmkern.backends.cpu._ext import DTYPE_CODES, rows_of
from llmkern.specs import LinearSpec
from llmkern.torch_private import onednn_linear

ACTIVATION_CODES = {None: 0, "relu": 1, "gelu": 2, "gelu_tanh": 3, "silu": 4}


def supports(spec: LinearSpec) -> str | None:
    return _ext.unavailable(spec.device)


def describe(spec: LinearSpec) -> str:
    """Who computes the product of a call, for `llmkern.explain`."""
    isa = _ext.load().module.isa()
    choice = tiles.pick_gemm(isa, spec.dtype, spec.rows, _has_onednn())
    if choice == tiles.OWN:
        return "product by llmkern"
    library = "oneDNN" if choice == tiles.ONEDNN else _library_of_mm(spec.dtype)
    return f"product by {library}"


def _library_of_mm(dtype: torch.dtype) -> str:
    """The library behind torch.mm on this CPU."""
    if dtype in (torch.float32, torch.float64):
        return "torch.mm (MKL)" if torch.backends.mkl.is_available() else "torch.mm (BLAS)"
    kind = "bf16" if dtype == torch.bfloat16 else "fp16"
    asked = getattr(torch.ops.mkldnn, f"_is_mkldnn_{kind}_supported", None)
    return "torch.mm (oneDNN)" if asked is not None and asked() else "torch.mm"


class _Epilogue(NamedTuple):
    """llmkern::LinearEpilogue but for y; a None means "none"."""

    activation: str | None = None
    bias: Tensor | None = None
    up_bias: Tensor | None = None
    preact: Tensor | None = None
    up_preact: Tensor | None = None
    residual: Tensor | None = None  # [rows, cols], column stride 1
    threshold: int = 0
    seed: Tensor | None = None

    def arguments(self, y: Tensor, cols: int) -> tuple:
        residual_stride = 0 if self.residual is None else self.residual.stride(0)
        return (
            ACTIVATION_CODES[self.activation], self.bias, self.up_bias,
            self.preact, self.up_preact, self.residual,
            residual_stride, self.threshold, self.seed, y, cols,
        )  # fmt: skip


def _contiguous(t: Tensor | None) -> Tensor | None:
    return t if t is None or t.is_contiguous() else t.contiguous()


@functools.cache
def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and onednn_linear is not None


def _pick(a: Tensor) -> str:
    return tiles.pick_gemm(_ext.load().module.isa(), a.dtype, a.shape[0], _has_onednn())


def _own_gemm(a: Tensor, b: Tensor, up: Tensor | None, epilogue: _Epilogue, y: Tensor) -> None:
    """y = epilogue(a [M, K] @ b [N, K]^T), any strides in a, b and up."""
    module = _ext.load().module
    a, b = a.resolve_neg(), b.resolve_neg()  # z.conj().imag is a strided view to be negated
    m, k = a.shape
    n = b.shape[0]
    up_stride = (0, 0) if up is None else up.stride()
    shape = (DTYPE_CODES[a.dtype], m, n, k, *a.stride(), *b.stride(), *up_stride, up is not None)
    scratch = torch.empty(module.gemm_scratch(shape), dtype=torch.uint8, device="cpu")
    module.gemm(shape, a, b, up, epilogue.arguments(y, n), scratch)


def _torch_gemm(choice: str, a: Tensor, b: Tensor, shape: torch.Size) -> Tensor:
    """a @ b^T as `shape`. Resized in place: a view of the product would be an output that autograd
    forbids to modify."""
    if choice == tiles.ONEDNN and a.numel() and b.numel():  # it refuses empty products
        product = onednn_linear(a, b, None, "none", [], "")
    else:
        product = a @ b.T
    return product.resize_(shape)


def _gemm(a: Tensor, b: Tensor, shape: torch.Size, onto: Tensor | None = None) -> Tensor:
    """a @ b^T as `shape`, for the backward products; added to `onto` in place where given."""
    choice = _pick(a)
    if choice != tiles.OWN:
        product = _torch_gemm(choice, a, b, shape)
        return product if onto is None else onto.add_(product)
    y = torch.empty(shape, dtype=a.dtype, device="cpu") if onto is None else onto
    residual = None if onto is None else onto.view(a.shape[0], b.shape[0])
    _own_gemm(a, b, None, _Epilogue(residual=residual), y)
    return y


def forward(
    spec: LinearSpec,
    x: Tensor,
    weight: Tensor,
    up_weight: Tensor | None,
    bias: Tensor | None,
    up_bias: Tensor | None,
    residual: Tensor | None,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, preact, up_preact); the last two are empty unless spec.keep_preact (and gated)."""
    rows, cols = spec.rows, spec.out_features
    a = x.reshape(rows, spec.in_features)
    choice = _pick(a)
    shape = torch.Size((*x.shape[:-1], cols))
    parts = 2 if spec.gated else 1
    if choice == tiles.OWN:
        kept = [
            torch.empty(shape, dtype=x.dtype, device="cpu")
            for _ in range(parts if spec.keep_preact else 0)
        ]
    else:
        kept = [_torch_gemm(choice, a, w, shape) for w in (weight, up_weight)[:parts]]
    in_place = choice != tiles.OWN and not spec.keep_preact
    y = kept[0] if in_place else torch.empty(shape, dtype=x.dtype, device="cpu")
    products, kept = kept, kept if spec.keep_preact else []
    preacts = [kept[i] if i < len(kept) else None for i in range(2)]
    epilogue = _Epilogue(
        activation=spec.activation,
        bias=_contiguous(bias),
        up_bias=_contiguous(up_bias),
        preact=preacts[0],
        up_preact=preacts[1],
        residual=None if residual is None else rows_of(residual, rows, cols)[0].reshape(rows, cols),
        threshold=random.threshold(spec.dropout_p) if spec.dropout_p else 0,
        seed=seed,
    )
    if choice == tiles.OWN:
        _own_gemm(a, weight, up_weight, epilogue, y)
    elif _something_to_do(spec):
        _ext.load().module.linear_epilogue(
            DTYPE_CODES[x.dtype], rows, cols, *products, *[None] * (2 - parts),
            epilogue.arguments(y, cols),
        )  # fmt: skip
    empty = [torch.empty(0, dtype=x.dtype, device="cpu") for _ in range(2 - len(kept))]
    return y, *kept, *empty


def _something_to_do(spec: LinearSpec) -> bool:
    after = spec.bias or spec.residual or spec.dropout_p > 0.0
    return after or spec.gated or spec.activation is not None


def backward(
    spec: LinearSpec,
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    up_weight: Tensor | None,
    preact: Tensor,
    up_preact: Tensor,
    seed: Tensor | None,
    wants: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of (x, weight, up_weight, bias, up_bias); empty where `wants` says no."""
    g, gu, dbias, dup_bias = _product_gradients(spec, dy, preact, up_preact, seed, wants)
    found = [torch.empty(0, dtype=x.dtype, device="cpu") for _ in range(3)]
    if wants[0]:
        up = _gemm(gu, up_weight.T, x.shape) if spec.gated else None
        found[0] = _gemm(g, weight.T, x.shape, up)
    a = x.reshape(spec.rows, spec.in_features)
    if wants[1]:
        found[1] = _gemm(g.T, a.T, weight.shape)
    if wants[2]:
        found[2] = _gemm(gu.T, a.T, up_weight.shape)
    return (*found, dbias, dup_bias)


def _product_gradients(
    spec: LinearSpec,
    dy: Tensor,
    preact: Tensor,
    up_preact: Tensor,
    seed: Tensor | None,
    wants: list[bool],
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """(g, gu) [rows, out_features], gradients of the two products, and those of their biases."""
    rows, cols, dtype = spec.rows, spec.out_features, spec.dtype
    dbias = torch.empty(cols if wants[3] else 0, dtype=dtype, device="cpu")
    dup_bias = torch.empty(cols if wants[4] else 0, dtype=dtype, device="cpu")
    changed = spec.activation is not None or spec.dropout_p > 0.0
    sums = wants[3] or wants[4]
    if not changed and not sums:
        return dy.reshape(rows, cols), None, dbias, dup_bias
    dy_rows, dy_stride = rows_of(dy, rows, cols)
    products = changed and (wants[0] or wants[1] or wants[2])
    g = torch.empty((rows, cols), dtype=dtype, device="cpu") if products else None
    gu = torch.empty((rows, cols), dtype=dtype, device="cpu") if products and spec.gated else None
    module = _ext.load().module
    wide = numerics.compute_dtype(dtype)
    scratch = torch.empty(
        module.LINEAR_BWD_CHUNKS * 4 * cols if sums else 0, dtype=wide, device="cpu"
    )
    module.linear_bwd(
        DTYPE_CODES[dtype],
        rows,
        cols,
        ACTIVATION_CODES[spec.activation],
        dy_rows,
        dy_stride,
        preact if spec.activation is not None else None,
        up_preact if spec.gated else None,
        random.threshold(spec.dropout_p) if spec.dropout_p else 0,
        seed,
        g,
        gu,
        dbias if wants[3] else None,
        dup_bias if wants[4] else None,
        scratch,
    )
    return (dy.reshape(rows, cols) if g is None else g), gu, dbias, dup_bias
