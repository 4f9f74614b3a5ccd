"""The launches of linear layers as data (_calls.py): what a product, its epilogue and the pass over
dy become on a given card.

One product kernel serves y = x W^T, dx = g W and dW = g^T x; it takes any strides, but an operand
without a unit stride is copied first, because its loads would be of single elements.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from llmkern import random, target
from llmkern.backends.triton import _launch, tiles_linear, tiles_norm
from llmkern.backends.triton._calls import Call
from llmkern.precision import tf32_allowed
from llmkern.specs import LinearSpec

_WIDEST_TILE = 256


class Target(NamedTuple):
    """What tiles are chosen for."""

    capability: int
    processors: int
    tf32: bool  # float32 products may use TF32


def interpreted() -> bool:
    """Whether Triton's interpreter, not a compiled kernel, runs the next launch."""
    return _launch.interpreted() and not target.emulated()


def target_of(t: Tensor) -> Target:
    """Of products of t. The interpreter runs programs one after another and multiplies exactly
    whatever it is told: the few large tiles of TF32 on one processor are quickest there."""
    capability = _launch.capability(t.device)
    if interpreted():
        return Target(capability, 1, True)
    tf32 = t.dtype == torch.float32 and tf32_allowed()
    return Target(capability, tiles_norm.multiprocessors(capability), tf32)


class Epilogue(NamedTuple):
    """What follows the product; a None means "none"."""

    activation: str | None = None
    bias: Tensor | None = None
    up_bias: Tensor | None = None
    preact: Tensor | None = None
    up_preact: Tensor | None = None
    residual: Tensor | None = None  # [m, n], column stride 1
    seed: Tensor | None = None  # None without dropout, or where its threshold is 0
    dropout_p: float = 0.0

    def arguments(self, y: Tensor) -> dict[str, object]:
        return {
            "bias": self.bias,
            "up_bias": self.up_bias,
            "residual": self.residual,
            "seed": self.seed,
            "y": y,
            "preact": self.preact,
            "up_preact": self.up_preact,
            "stride_rm": None if self.residual is None else self.residual.stride(0),
            "threshold": None if self.seed is None else random.threshold(self.dropout_p),
            "scale": None if self.seed is None else random.scale(self.dropout_p),
        }


_NOTHING = Epilogue()


def product_kernel():
    from llmkern.backends.triton import linear_kernels

    return linear_kernels.linear_kernel


def _join_kernel():
    from llmkern.backends.triton import linear_kernels

    return linear_kernels.linear_join_kernel


def _dpre_kernel():
    from llmkern.backends.triton import linear_grad_kernels

    return linear_grad_kernels.linear_dpre_kernel


def _sum_kernel():
    from llmkern.backends.triton import norm_bwd_kernels

    return norm_bwd_kernels.column_sum


def _operand(t: Tensor | None) -> Tensor | None:
    """t [rows, K] with a unit stride in one of its dims."""
    if t is None or 1 in t.stride():
        return t
    return t.contiguous()


def _vectors(strides: list[int]) -> bool:
    """Whether Triton loads 16 bytes at a time: it knows of a stride only that it is 1, a multiple
    of 16, or neither."""
    return all(stride == 1 or stride % 16 == 0 for stride in strides)


class _Shape(NamedTuple):
    """What the launch of a product depends on but for addresses."""

    dtype: torch.dtype
    m: int
    n: int
    k: int
    a: tuple[int, int]  # strides
    b: tuple[int, int]
    c: tuple[int, int] | None
    d: tuple[int, int] | None
    residual: int | None  # its row stride
    activation: str | None
    on: Target
    plan: tiles_linear.Plan | None  # None: the pick function's


class _Launch(NamedTuple):
    grid: tuple[int, int]
    parts: int  # of K: 1, or the results are joined by another launch
    gated: bool
    numbers: dict[str, object]  # arguments
    constexprs: dict[str, object]
    num_warps: int
    num_stages: int


@functools.lru_cache(4096)  # by shapes, which a stream of new lengths does not repeat
def _launch_of(shape: _Shape) -> _Launch:
    m, n, k, on = shape.m, shape.n, shape.k, shape.on
    gated = shape.c is not None and shape.d is None
    kind = tiles_linear.arithmetic(shape.dtype, on.tf32)
    steps = [stride for pair in (shape.a, shape.b, shape.c, shape.d) if pair for stride in pair]
    plan = shape.plan
    if plan is None:
        tiles = tiles_linear.rows(kind, gated, _vectors(steps), on.capability)
        plan = tiles_linear.pick(kind, gated, tiles, m, n, k, on.processors)
    tile, split = plan.tile, plan.split_k
    if shape.residual is not None:
        steps.append(shape.residual)
    numbers = {"m": m, "n": n, "k": k, "k_part": plan.k_part if split > 1 else None}
    for name, pair in (("am", shape.a), ("bn", shape.b), ("cn", shape.c), ("dm", shape.d)):
        numbers[f"stride_{name}"], numbers[f"stride_{name[0]}k"] = pair or (None, None)
    constexprs = {
        "ACTIVATION": shape.activation if split == 1 else None,
        "ALIGNED": n % 8 == 0,
        "SPLIT_K": split,
        "WIDE": max(n, *steps) * _WIDEST_TILE >= 2**31,
        "EVEN_M": m % tile.block_m == 0,
        "EVEN_N": n % tile.block_n == 0,
        "EVEN_K": k % tile.block_k == 0,
        "MODE": "plain" if shape.c is None else "gated" if gated else "sum",
        "PRECISION": "ieee" if kind == "ieee" else "tf32",
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "GROUP_M": tiles_linear.GROUP_M,
    }
    grid = (-(-m // tile.block_m) * -(-n // tile.block_n), split)
    return _Launch(grid, split, gated, numbers, constexprs, tile.num_warps, tile.num_stages)


def product(
    a: Tensor,
    b: Tensor,
    y: Tensor,
    epilogue: Epilogue = _NOTHING,
    c: Tensor | None = None,
    d: Tensor | None = None,
    *,
    on: Target,
    plan: tiles_linear.Plan | None = None,
) -> list[Call]:
    """The calls for y [M, N] = epilogue(a [M, K] @ b [N, K]^T).

    With c, the gated form (its other product is a @ c^T); with d too, the sum a b^T + d c^T.
    """
    a, b, c, d = _operand(a), _operand(b), _operand(c), _operand(d)
    (m, k), n = a.shape, b.shape[0]
    residual = epilogue.residual
    how = _launch_of(
        _Shape(a.dtype, m, n, k, a.stride(), b.stride(), None if c is None else c.stride(),
               None if d is None else d.stride(), None if residual is None else residual.stride(0),
               epilogue.activation, on, plan)
    )  # fmt: skip
    after, parts = epilogue, y
    if how.parts > 1:
        after = _NOTHING
        size = (how.parts * (1 + how.gated), m, n)
        parts = torch.empty(size, dtype=torch.float32, device=y.device)
    arguments = {"a": a, "b": b, "c": c, "d": d, **after.arguments(parts), **how.numbers}
    calls = [
        Call(product_kernel, how.grid, arguments, how.constexprs, how.num_warps, how.num_stages)
    ]
    if how.parts > 1:
        calls.append(_join(parts, y, epilogue, how))
    return calls


def _join(parts: Tensor, y: Tensor, epilogue: Epilogue, how: _Launch) -> Call:
    """y = epilogue(sum of the parts)."""
    _, m, n = parts.shape
    block_m, block_n, num_warps = tiles_linear.pick_join(n)
    arguments = {"parts": parts, **epilogue.arguments(y), "m": m, "n": n}
    constexprs = {
        "ACTIVATION": epilogue.activation,
        "ALIGNED": how.constexprs["ALIGNED"],
        "SPLIT_K": how.parts,
        "WIDE": how.constexprs["WIDE"],
        "GATED": how.gated,
        "EVEN_M": m % block_m == 0,
        "EVEN_N": n % block_n == 0,
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
    }
    grid = (-(-m // block_m), -(-n // block_n))
    return Call(_join_kernel, grid, arguments, constexprs, num_warps, 1)


def dpre(
    spec: LinearSpec,
    dy: Tensor,
    preact: Tensor | None,
    up_preact: Tensor | None,
    seed: Tensor | None,
    grads: tuple[Tensor | None, Tensor | None],
    biases: tuple[Tensor | None, Tensor | None],
    processors: int,
) -> list[Call]:
    """The calls for g and gu [rows, cols] and for the gradients of the biases [cols]."""
    (m, n), device = dy.shape, dy.device
    threshold = random.threshold(spec.dropout_p)  # 0: nothing is dropped
    cut = tiles_linear.pick_columns(m, n, processors)
    sums = biases
    if cut.parts > 1:
        sums = tuple(
            t if t is None else torch.empty((cut.parts, n), dtype=torch.float32, device=device)
            for t in biases
        )
    arguments = {
        "dy": dy,
        "preact": preact,
        "up_preact": up_preact,
        "seed": seed if threshold else None,
        "g": grads[0],
        "gu": grads[1],
        "sums": sums[0],
        "up_sums": sums[1],
        "stride_dm": dy.stride(0),
        "m": m,
        "n": n,
        "m_part": cut.m_part,
        "threshold": threshold or None,
        "scale": random.scale(spec.dropout_p) if threshold else None,
    }
    constexprs = {
        "ACTIVATION": spec.activation,
        "ALIGNED": n % 8 == 0,
        "EVEN_M": m % cut.block_m == 0,
        "EVEN_N": n % cut.block_n == 0,
        "BLOCK_M": cut.block_m,
        "BLOCK_N": cut.block_n,
    }
    grid = (-(-n // cut.block_n), cut.parts)
    calls = [Call(_dpre_kernel, grid, arguments, constexprs, cut.num_warps, 2)]
    if cut.parts > 1:
        pairs = [pair for pair in zip(sums, biases, strict=True) if pair[0] is not None]
        calls += [_sum(pairs)] if pairs else []
    return calls


def _sum(pairs: list[tuple[Tensor, Tensor]]) -> Call:
    """bias gradient = sum of the rows of its workspace, for one bias or two."""
    (first_parts, first), (second_parts, second) = (*pairs, (None, None))[:2]
    parts, n = first_parts.shape
    block = tiles_norm.pick_sum(parts)
    arguments = {
        "first_parts": first_parts,
        "second_parts": second_parts,
        "first": first,
        "second": second,
        "parts": parts,
        "cols": n,
    }
    constexprs = {"PARTS": block.rows, "CHUNK": block.chunk}
    grid = (-(-n // block.chunk), len(pairs))
    return Call(_sum_kernel, grid, arguments, constexprs, block.num_warps, 2)
