"""`llmkern profile --against-peers`: our Triton kernels' counts beside those of peers.py.

Shapes: bf16; norms of 2048 rows; attention B1 H4 S512; products M x N x K with a given tile. Each
call runs in the emulator of sm_80 and what ran is assembled by ptxas, for its size and spills.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

import llmkern.functional as LF
from llmkern import cost, dispatch, emulator
from llmkern.bench import compiled, peers

TARGET = 80
ROWS, WIDTHS = 2048, (1024, 4096)
HEADS, LENGTH, HEAD_DIMS = 4, 512, (64, 128)
PRODUCTS = ((512, 512, 512), (256, 768, 3072))
JOIN = "column_sum"  # the last sum of norm backward, which peers' figures leave out
FLOPS_16_BIT, FLOPS_TF32 = 4096, 2048  # of one mma: m16n8k16, m16n8k8


class Call(NamedTuple):
    """A row to be counted."""

    name: str
    run: Callable[[], None]
    units: float  # what `warp` is per: 32 elements, or the mma that are needed
    minimum_bytes: int
    minimum_mma: float = 0.0


@dataclass(frozen=True)
class Row:
    """Ours for one row; its figures mean what peers.Peer says."""

    name: str
    warp: float
    bytes: float
    mma: float
    conflicts: float
    coalescing: float
    join_warp: float  # of JOIN, in `warp`'s units and not in `warp`
    join_bytes: float
    instructions: int  # SASS of all kernels of the row
    spill_bytes: int

    @property
    def excess(self) -> tuple[str, ...]:
        """In what the best peer needs less."""
        peer = peers.PEERS[self.name]
        pairs = (("warp", peer.warp), ("bytes", peer.bytes), ("mma", peer.mma), ("conflicts", 1.0))
        # The peers' figures have two or three digits.
        found = [n for n, theirs in pairs if theirs and getattr(self, n) > theirs + 0.005]
        return tuple(found)

    def row(self) -> dict[str, Any]:
        return asdict(self) | {"peer": peers.PEERS[self.name]._asdict(), "excess": self.excess}


def measure(words: str | None) -> Iterator[Row]:
    """The rows whose name has every one of `words`.

    Raises:
        BackendError: triton is missing.
        EmulatorError: a check of the emulator stopped a kernel.
    """
    with emulator.device(f"sm_{TARGET}") as dev, dispatch.use_backend("triton"):
        for call in _calls((words or "").split()):
            dev.reset_counters()
            call.run()
            yield _counted(call, dev)


def _counted(call: Call, dev: emulator.Device) -> Row:
    total, join = dev.counters(), dev.counters(JOIN)
    codes = [
        compiled.assemble(program.ptx, TARGET)
        for kernel in dev.kernels()
        for program in dev.programs(kernel)
    ]
    joined = join.warp_instructions
    return Row(
        name=call.name,
        warp=(total.warp_instructions - joined) / call.units,
        bytes=(total.global_bytes - join.global_bytes) / call.minimum_bytes,
        mma=total.mma / call.minimum_mma if call.minimum_mma else 0.0,
        conflicts=total.total.conflicts,
        coalescing=total.total.coalescing,
        join_warp=joined / call.units,
        join_bytes=join.global_bytes / call.minimum_bytes,
        instructions=sum(code.instructions for code in codes),
        spill_bytes=sum(code.spill_bytes for code in codes),
    )


def _normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def _calls(words: list[str]) -> Iterator[Call]:
    def wanted(name: str) -> bool:
        return name in peers.PEERS and all(word in name for word in words)

    for name, make in (*_norms(), *_attentions()):
        if wanted(f"{name} fwd") or wanted(f"{name} bwd"):
            for call in _both(name, make()):
                if wanted(call.name):
                    yield call
    for name, call in _products():
        if wanted(name):
            yield call()


Step = tuple[Callable[..., Any], list[Tensor], list[Tensor]]  # function, inputs, cotangents


def _both(name: str, step: Step) -> Iterator[Call]:
    function, inputs, cotangents = step
    inputs = [t.requires_grad_() for t in inputs]
    with dispatch.recording() as records:
        outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    ((op, spec, _),) = records
    minimum, back = cost.of(op, spec), cost.backward(op, spec)
    elements = inputs[0].numel() / 32
    matrix = op == "attention"
    mma = [work.flops / FLOPS_16_BIT if matrix else 0.0 for work in (minimum, back)]
    yield Call(f"{name} fwd", lambda: function(*inputs), mma[0] or elements, minimum.bytes, mma[0])
    yield Call(
        f"{name} bwd",
        lambda: torch.autograd.grad(outputs, inputs, cotangents, retain_graph=True),
        mma[1] or elements,
        back.bytes,
        mma[1],
    )


def _norms() -> Iterator[tuple[str, Callable[[], Step]]]:
    for width in WIDTHS:
        shape = (width,)
        x, weight = _normal(ROWS, width), _normal(width)

        def layer(x, weight, bias, shape=shape):
            return LF.layer_norm(x, shape, weight, bias)

        def rms(x, weight, shape=shape):
            return LF.rms_norm(x, shape, weight, 1e-5)

        def add_rms(x, residual, weight, shape=shape):
            return LF.add_rms_norm(x, residual, shape, weight, 1e-5, prenorm=True)

        def add_layer(x, residual, weight, bias, shape=shape, p=0.0):
            return LF.add_layer_norm(x, residual, shape, weight, bias, dropout_p=p, prenorm=True)

        def dropped(*tensors, add_layer=add_layer):
            return add_layer(*tensors, p=0.1)

        def of(function, parameters, residual=False, x=x, weight=weight):
            streams = [x.clone() for _ in range(2 if residual else 1)]
            inputs = streams + [weight.clone() for _ in range(parameters)]
            return function, inputs, [x.clone() for _ in streams]

        yield f"layer_norm {width}", lambda of=of, f=layer: of(f, 2)
        yield f"rms_norm {width}", lambda of=of, f=rms: of(f, 1)
        yield f"add_rms_norm {width}", lambda of=of, f=add_rms: of(f, 1, True)
        yield f"add_layer_norm {width}", lambda of=of, f=add_layer: of(f, 2, True)
        yield f"add_layer_norm dropout {width}", lambda of=of, f=dropped: of(f, 2, True)


def _attentions() -> Iterator[tuple[str, Callable[[], Step]]]:
    for causal in (False, True):
        for dim in HEAD_DIMS:

            def attention(q, k, v, causal=causal):
                return LF.scaled_dot_product_attention(q, k, v, is_causal=causal)

            def make(function=attention, dim=dim):
                tensors = [_normal(1, HEADS, LENGTH, dim) for _ in range(4)]
                return function, tensors[:3], tensors[3:]

            yield f"attention {'causal ' if causal else ''}D{dim}", make


def _products() -> Iterator[tuple[str, Callable[[], Call]]]:
    from llmkern.backends.triton import linear_calls, tiles_linear
    from llmkern.backends.triton._calls import run

    def product(name: str, sizes: tuple[int, int, int], kind: str, row: int, split: int) -> Call:
        m, n, k = sizes
        tile = tiles_linear.rows(kind, False, True, TARGET)[row]
        on = linear_calls.Target(TARGET, 108, kind == "tf32")
        dtype = torch.float32 if kind == "tf32" else torch.bfloat16
        a, b, y = (_normal(*shape, dtype=dtype) for shape in ((m, k), (n, k), (m, n)))
        plan = tiles_linear.Plan(tile, split, k // split)
        calls = linear_calls.product(a, b, y, on=on, plan=plan)
        mma = 2 * m * n * k / (FLOPS_TF32 if kind == "tf32" else FLOPS_16_BIT)
        bytes_ = (m * k + n * k + m * n) * dtype.itemsize
        return Call(name, lambda: run(calls, y.device), mma, bytes_, mma)

    for sizes in PRODUCTS:
        size = "x".join(map(str, sizes))
        for form, kind, row, split in (
            ("128x128x32", "16-bit", 0, 1),
            ("64x128x32", "16-bit", 1, 1),
            ("split", "16-bit", 0, 2),
            ("tf32", "tf32", 0, 1),
        ):
            name = f"linear {form} {size}"
            yield name, lambda a=(name, sizes, kind, row, split): product(*a)


def table(rows: list[Row]) -> str:
    """A table in Markdown; "ours / best peer", what a peer needs less of in bold."""
    heads = ("row", "warp", "bytes", "mma", "conflicts", "coalescing", "last sum", "SASS", "spills")
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for row in rows:
        peer, excess = peers.PEERS[row.name], row.excess

        def pair(name: str, theirs: float | None, row=row, excess=excess) -> str:
            ours = f"{getattr(row, name):.2f}"
            ours = f"**{ours}**" if name in excess else ours
            return f"{ours} / {theirs:.2f}" if theirs else ours

        last = f"{row.join_warp:.2f}, {row.join_bytes:.2f}" if row.join_warp else ""
        cells = (
            row.name,
            pair("warp", peer.warp),
            pair("bytes", peer.bytes),
            pair("mma", peer.mma) if row.mma else "",
            pair("conflicts", None),
            f"{row.coalescing:.2f}",
            last,
            str(row.instructions),
            str(row.spill_bytes),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
