"""Linear layers with epilogues: linear_kernels.py, linear_grad_kernels.py, linear_calls.py."""

from collections.abc import Iterator

import torch
from torch import Tensor

from llmkern import random
from llmkern.backends.triton import _launch, linear_calls, tiles_linear, tiles_norm
from llmkern.backends.triton._calls import Call, compilation, run
from llmkern.backends.triton._views import contiguous
from llmkern.specs import LinearSpec


def supports(spec: LinearSpec) -> str | None:
    return _launch.unavailable(spec.device) or _launch.unsupported(spec.dtype)


def _rows(t: Tensor, rows: int, cols: int) -> Tensor:
    """t as [rows, cols] with unit column stride; a copy only where that is needed."""
    t = t.reshape(rows, cols)
    return t if t.stride(1) == 1 or cols <= 1 else t.contiguous()


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
    parts = (1 + spec.gated) if spec.keep_preact else 0
    kept = [torch.empty(shape, dtype=x.dtype, device=x.device) for _ in range(parts)]
    if y.numel():
        epilogue = linear_calls.Epilogue(
            activation=spec.activation,
            bias=contiguous(bias),
            up_bias=contiguous(up_bias),
            preact=kept[0] if parts else None,
            up_preact=kept[1] if parts > 1 else None,
            residual=None if residual is None else _rows(residual, rows, cols),
            seed=seed if random.threshold(spec.dropout_p) else None,
            dropout_p=spec.dropout_p,
        )
        a = x.reshape(rows, spec.in_features)
        calls = linear_calls.product(
            a, weight, y, epilogue, up_weight, on=linear_calls.target_of(x)
        )
        run(calls, x.device)
    kept += [torch.empty(0, dtype=x.dtype, device=x.device) for _ in range(2 - parts)]
    return y, kept[0], kept[1]


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
    on = linear_calls.target_of(x)
    g, gu, dbias, dup_bias = _product_gradients(spec, dy, preact, up_preact, seed, wants)
    found = [torch.empty(0, dtype=x.dtype, device=x.device) for _ in range(3)]
    calls = []
    if wants[0]:
        dx = found[0] = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        up = None if up_weight is None else up_weight.T
        if dx.numel():
            calls += linear_calls.product(g, weight.T, dx, c=up, d=gu, on=on)
    rows = x.reshape(spec.rows, spec.in_features)
    for index, part, parameter in ((1, g, weight), (2, gu, up_weight)):
        if wants[index]:
            dw = found[index] = torch.empty(parameter.shape, dtype=x.dtype, device=x.device)
            if dw.numel():
                calls += linear_calls.product(part.T, rows.T, dw, on=on)
    run(calls, x.device)
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
    rows, cols = spec.rows, spec.out_features
    changed = spec.activation is not None or random.threshold(spec.dropout_p) > 0
    wide = changed and (wants[0] or wants[1] or wants[2])
    g, gu = (
        torch.empty((rows, cols), dtype=dy.dtype, device=dy.device) if wanted else None
        for wanted in (wide, wide and spec.gated)
    )
    dbias, dup_bias = (
        torch.empty(cols if wanted else 0, dtype=dy.dtype, device=dy.device) for wanted in wants[3:]
    )
    dy = dy.reshape(rows, cols)
    if cols and (changed or wants[3] or wants[4]):
        biases = (dbias if wants[3] else None, dup_bias if wants[4] else None)
        calls = linear_calls.dpre(
            spec,
            _rows(dy, rows, cols),
            preact if spec.activation is not None else None,
            up_preact if spec.gated else None,
            seed,
            (g, gu),
            biases,
            linear_calls.target_of(dy).processors,
        )
        run(calls, dy.device)
    return dy if g is None else g, gu, dbias, dup_bias


def compilations(capability: int) -> Iterator[_launch.Compilation]:
    """Every tile of the product in each arithmetic, then the forms of each kernel that the layers
    of a Transformer use."""
    processors = tiles_norm.multiprocessors(capability)
    for dtype, tf32 in ((torch.bfloat16, False), (torch.float32, True), (torch.float32, False)):
        on = linear_calls.Target(capability, processors, tf32)
        for gated in (False, True):
            kind = tiles_linear.arithmetic(dtype, tf32)
            for tile in tiles_linear.rows(kind, gated, True, capability):
                size = f"{tile.block_m}x{tile.block_n}x{tile.block_k} {kind}"
                name = f"linear {'gated ' if gated else ''}{size}"
                yield from _described(name, _layer(dtype, on, tile, gated=gated))
    on = linear_calls.Target(capability, processors, False)
    tile = tiles_linear.rows("16-bit", False, True, capability)[0]
    for dtype in (torch.bfloat16, torch.float16):
        name = f"linear {_NAMES[dtype]}"
        yield from _described(f"{name} gelu preact", _layer(dtype, on, tile, preact=True))
    bf16 = torch.bfloat16
    yield from _described("linear bf16 dropout residual", _layer(bf16, on, tile, dropout_p=0.1))
    for dtype, kind in ((bf16, "16-bit"), (torch.float32, "tf32")):
        largest = tiles_linear.rows(kind, False, False, capability)[0]
        name = f"linear {_NAMES[dtype]} odd sizes"
        yield from _described(name, _layer(dtype, on._replace(tf32=True), largest, odd=True))
    yield from _described("linear bf16 split", _layer(bf16, on, tile, split=4))
    yield from _backward_compilations(on, tile)


_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def _described(name: str, calls: list[Call]) -> Iterator[_launch.Compilation]:
    for call in calls:
        kernel = (
            "" if call.kernel is linear_calls.product_kernel else f" {call.kernel.__name__[1:-7]}"
        )
        yield compilation(name + kernel, call, ("m", "m_part", "parts"))


def _meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _layer(
    dtype: torch.dtype,
    on: linear_calls.Target,
    tile: tiles_linear.Tile,
    *,
    gated: bool = False,
    preact: bool = False,
    dropout_p: float = 0.0,
    odd: bool = False,
    split: int = 1,
) -> list[Call]:
    """The calls of one forward pass, 16 tiles a side unless odd."""
    m, n, k = 16 * tile.block_m, 16 * tile.block_n, 16 * tile.block_k
    if odd:
        m, n, k = m - 1, n - 1, k - 1
    x, weight, y = (_meta(*s, dtype=dtype) for s in ((m, k), (n, k), (m, n)))
    epilogue = linear_calls.Epilogue(
        activation="silu" if gated else "gelu" if preact else None,
        bias=None if gated else _meta(n, dtype=dtype),
        preact=y if preact else None,
        residual=y if dropout_p else None,
        seed=_meta(1, dtype=torch.int64) if dropout_p else None,
        dropout_p=dropout_p,
    )
    plan = tiles_linear.Plan(tile, split, k // split)
    return linear_calls.product(x, weight, y, epilogue, weight if gated else None, on=on, plan=plan)


def _backward_compilations(
    on: linear_calls.Target, tile: tiles_linear.Tile
) -> Iterator[_launch.Compilation]:
    m, n, k = 16 * tile.block_m, 16 * tile.block_n, 16 * tile.block_n
    plan = tiles_linear.Plan(tile, 1, k)
    g, weight, x = _meta(m, n), _meta(n, k), _meta(m, k)
    yield from _described("linear bf16 dx", linear_calls.product(g, weight.T, x, on=on, plan=plan))
    pair = linear_calls.product(g, weight.T, x, c=weight.T, d=g, on=on, plan=plan)
    yield from _described("linear bf16 dx gated", pair)
    for split in (1, 8):
        plan = tiles_linear.Plan(tile, split, m // split)
        calls = linear_calls.product(g.T, x.T, weight, on=on, plan=plan)
        yield from _described(f"linear bf16 dw{' split' if split > 1 else ''}", calls)
    bias = _meta(n)
    for activation, gated, p in (("gelu", False, 0.0), ("silu", True, 0.0), (None, False, 0.1)):
        spec = LinearSpec(torch.bfloat16, "cuda", m, n, k, activation, gated, True, False, p, True)
        z, u = (g if activation else None), (g if gated else None)
        grads, biases = (g, u), (bias, bias if gated else None)
        calls = linear_calls.dpre(
            spec, g, z, u, _meta(1, dtype=torch.int64), grads, biases, on.processors
        )
        form = "gated" if gated else activation or "dropout"
        yield from _described(f"linear bf16 {form}", calls)
