"""Linear layers with epilogues: csrc/cuda/gemm.cu (tensor cores), gemm_ieee.cu (float32 where torch
asks for full precision), linear_bwd.cu."""

import torch
from torch import Tensor

from llmkern import random
from llmkern.backends.cuda import _ext
from llmkern.backends.cuda._ext import DTYPE_CODES, Launch, contiguous, rows_of, shown
from llmkern.precision import tf32_allowed
from llmkern.specs import LinearSpec

ACTIVATION_CODES = {None: 0, "relu": 1, "gelu": 2, "gelu_tanh": 3, "silu": 4}
_UNIT_BYTES = 16  # what the tensor-core kernels load at a time


def supports(spec: LinearSpec) -> str | None:
    if max(spec.rows, spec.in_features) > _ext.INT32_MAX // 2 or spec.out_features > _ext.MAX_COLS:
        return f"its kernels index each dim with 32 bits, and outputs go up to {_ext.MAX_COLS}"
    return _ext.refusal(spec.device, spec.dtype)


def _tf32(t: Tensor) -> bool:
    """Whether torch lets products of t's dtype be rounded to TF32."""
    return t.dtype == torch.float32 and tf32_allowed()


def _inner(t: Tensor) -> bool:
    return t.stride(1) == 1


def _loadable(t: Tensor) -> bool:
    """Whether the tensor-core kernels can read t [rows, k] in place, 16 bytes at a time."""
    if 1 not in t.stride():
        return False
    line = t.stride(0 if _inner(t) else 1) * t.element_size()
    whole = line % _UNIT_BYTES == 0 and t.data_ptr() % _UNIT_BYTES == 0
    return whole and 0 < line <= _ext.INT32_MAX


def _aligned(t: Tensor) -> Tensor:
    """A copy of t [rows, k] with k contiguous and lines of whole units."""
    (rows, k), unit = t.shape, _UNIT_BYTES // t.element_size()
    padded = torch.empty(rows, -(-k // unit) * unit, dtype=t.dtype, device=t.device)
    return padded[:, :k].copy_(t)


def _operands(a: Tensor, b: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """a [M, K], b and up [N, K] in layouts that the kernels read; copies only of the others."""
    tf32 = _tf32(a)
    if a.dtype == torch.float32 and not tf32:
        return a, b, up
    a, b, up = (
        t if t is None or (_loadable(t) and (_inner(t) or not tf32)) else _aligned(t)
        for t in (a, b, up)
    )
    if up is not None and _inner(b) != _inner(up):
        b, up = (t if _inner(t) else _aligned(t) for t in (b, up))
    if _inner(b) and not _inner(a):  # there is no kernel for this pair
        a = _aligned(a)
    return a, b, up


def _gemm(
    launch: Launch,
    a: Tensor,
    b: Tensor,
    up: Tensor | None,
    y: Tensor,
    *,
    activation: str | None = None,
    bias: tuple[Tensor | None, Tensor | None] = (None, None),
    preact: tuple[Tensor | None, Tensor | None] = (None, None),
    residual: Tensor | None = None,
    threshold: int = 0,
    seed: Tensor | None = None,
) -> Tensor:
    """y [M, N] = epilogue(a [M, K] @ b [N, K]^T), any strides in a, b and up."""
    (m, k), n = a.shape, b.shape[0]
    a, b, up = _operands(a, b, up)
    up_stride = (0, 0) if up is None else up.stride()
    shape = (DTYPE_CODES[a.dtype], m, n, k, *a.stride(), *b.stride(), *up_stride, up is not None)
    epilogue = (
        ACTIVATION_CODES[activation], shown(bias[0]), shown(bias[1]), shown(preact[0]),
        shown(preact[1]), shown(residual), 0 if residual is None else residual.stride(0),
        threshold, shown(seed), shown(y), n,
    )  # fmt: skip
    tf32 = _tf32(a)
    size = launch.module.gemm_scratch(DTYPE_CODES[a.dtype], m, n, k, up is not None, tf32)
    scratch = torch.empty(size, dtype=torch.float32, device=a.device) if size else None
    launch.gemm(shape, shown(a), shown(b), shown(up), epilogue, tf32, shown(scratch))
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
    shape = (*x.shape[:-1], cols)
    y = torch.empty(shape, dtype=x.dtype, device=x.device)
    parts = (2 if spec.gated else 1) if spec.keep_preact else 0
    kept = [torch.empty(shape, dtype=x.dtype, device=x.device) for _ in range(parts)]
    kept += [None] * (2 - parts)
    if residual is not None:
        residual = rows_of(residual, rows, cols)[0].reshape(rows, cols)
    with Launch(x, spec) as launch:
        _gemm(
            launch,
            x.reshape(rows, spec.in_features),
            weight,
            up_weight,
            y,
            activation=spec.activation,
            bias=(contiguous(bias), contiguous(up_bias)),
            preact=(kept[0], kept[1]),
            residual=residual,
            threshold=random.threshold(spec.dropout_p) if spec.dropout_p else 0,
            seed=seed,
        )
    preact, up_preact = (x.new_empty(0) if t is None else t for t in kept)
    return y, preact, up_preact


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
    found = [x.new_empty(0) for _ in range(3)]
    a = x.reshape(spec.rows, spec.in_features)
    with Launch(x, spec) as launch:
        g, gu, dbias, dup_bias = _product_gradients(
            launch, spec, dy, preact, up_preact, seed, wants
        )
        if wants[0]:
            dx = found[0] = torch.empty(x.shape, dtype=x.dtype, device=x.device)
            rows = dx.view(spec.rows, spec.in_features)
            if spec.gated:
                _gemm(launch, gu, up_weight.T, None, rows)
            _gemm(launch, g, weight.T, None, rows, residual=rows if spec.gated else None)
        if wants[1]:
            found[1] = torch.empty(weight.shape, dtype=x.dtype, device=x.device)
            _gemm(launch, g.T, a.T, None, found[1])
        if wants[2]:
            found[2] = torch.empty(up_weight.shape, dtype=x.dtype, device=x.device)
            _gemm(launch, gu.T, a.T, None, found[2])
    return (*found, dbias, dup_bias)


def _product_gradients(
    launch: Launch,
    spec: LinearSpec,
    dy: Tensor,
    preact: Tensor,
    up_preact: Tensor,
    seed: Tensor | None,
    wants: list[bool],
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """(g, gu) [rows, out_features], gradients of the two products, and those of their biases."""
    rows, cols = spec.rows, spec.out_features
    like = {"dtype": spec.dtype, "device": dy.device}
    dbias = torch.empty(cols if wants[3] else 0, **like)
    dup_bias = torch.empty(cols if wants[4] else 0, **like)
    changed = spec.activation is not None or spec.dropout_p > 0.0
    sums = wants[3] or wants[4]
    if not changed and not sums:
        return dy.reshape(rows, cols), None, dbias, dup_bias
    dy_rows, dy_stride = rows_of(dy, rows, cols)
    products = changed and (wants[0] or wants[1] or wants[2])
    g = torch.empty((rows, cols), **like) if products else None
    gu = torch.empty((rows, cols), **like) if products and spec.gated else None
    code = DTYPE_CODES[spec.dtype]
    size = launch.module.linear_bwd_scratch(code, rows, cols) if sums else 0
    scratch = torch.empty(size, dtype=torch.float32, device=dy.device)
    launch.linear_bwd(
        code,
        rows,
        cols,
        ACTIVATION_CODES[spec.activation],
        shown(dy_rows),
        dy_stride,
        shown(preact) if spec.activation is not None else None,
        shown(up_preact) if spec.gated else None,
        random.threshold(spec.dropout_p) if spec.dropout_p else 0,
        shown(seed),
        shown(g),
        shown(gu),
        shown(dbias) if wants[3] else None,
        shown(dup_bias) if wants[4] else None,
        shown(scratch),
    )
    return (dy.reshape(rows, cols) if g is None else g), gu, dbias, dup_bias
