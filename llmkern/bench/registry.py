"""What a benchmark case is. A suite is a list of these, each one declarative entry.

A case owns its inputs, the variants that compute the same thing from them (ours first, then torch
as shipped, then the other torch baselines), the oracle that says what is right, and the work it
counts: FLOPs that the definition needs (a causal half is not counted) and bytes that must move at
least once. The harness (runner.py) does the rest: gate, timing, memory, roofline, report.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llmkern.errors import DeviceError

Tensors = dict[str, Tensor]
Step = Callable[[], tuple[Tensor, ...]]
Function = Callable[[Tensors], Tensor | tuple[Tensor, ...]]

OURS = "llmkern"
EAGER = "torch eager"


def is_torch(variant: str) -> bool:
    """Whether a variant is a baseline; ours, in whatever combination, begin with OURS."""
    return not variant.startswith(OURS)


DTYPE_NAMES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float64: "fp64",
}
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


@dataclass(frozen=True)
class Cost:
    """Work of one call: `flops` by the definition, `nbytes` that must cross memory once."""

    flops: float
    nbytes: float


@dataclass(frozen=True)
class Variant:
    """One way to compute a case. `prepare(tensors)` does what is not timed and returns the call.

    `note` says where the work differs from the case's own (for example, dropout left out).
    `slow_to_prepare` marks torch.compile, which the runner may be told to skip.
    """

    name: str
    prepare: Callable[[Tensors], Step]
    note: str = ""
    slow_to_prepare: bool = False


@dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """One row of the report. `make` builds inputs on the CPU from a seeded `Maker`.

    `oracle` and `torch_error` are what the gate compares with: the first is run on the inputs in
    float64, the second on the inputs as they are, to give torch's own rounding error.
    """

    suite: str
    op: str
    shape: Mapping[str, int]
    dtype: torch.dtype
    backward: bool
    make: Callable[[Maker], Tensors]
    variants: tuple[Variant, ...]
    oracle: Callable[[Tensors], Step]
    torch_error: Callable[[Tensors], Step]
    cost: Cost
    label: str = ""
    budget_s: float = 2.0
    min_rounds: int = 5
    tags: frozenset[str] = field(default_factory=frozenset)

    @property
    def direction(self) -> str:
        return "fwd+bwd" if self.backward else "fwd"

    @property
    def shape_text(self) -> str:
        return " ".join(f"{axis}{size}" for axis, size in self.shape.items())

    @property
    def id(self) -> str:
        """Stable name of the case: what `--filter` matches and `compare` joins on."""
        shape = "x".join(f"{axis}{size}" for axis, size in self.shape.items())
        parts = [self.suite, self.op, self.label, shape, DTYPE_NAMES[self.dtype], self.direction]
        return "/".join(part.replace(" ", "_") for part in parts if part)


class Maker:
    """Seeded random inputs. Drawn in float32, rounded to the case's dtype, so that the float64
    oracle starts from the very same numbers."""

    def __init__(self, dtype: torch.dtype, device: torch.device, seed: int) -> None:
        self.dtype = dtype
        self.device = device
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        drawn = torch.randn(shape, generator=self._generator) * scale
        return drawn.to(device=self.device, dtype=self.dtype)

    def weight(self, *shape: int) -> Tensor:
        """As torch.nn.Linear initialises: variance 1 / (3 fan_in)."""
        return self.normal(*shape, scale=(3 * shape[-1]) ** -0.5)

    def bools(self, *shape: int, true_share: float) -> Tensor:
        drawn = torch.rand(shape, generator=self._generator) < true_share
        return drawn.to(self.device)


def device_of(name: str) -> torch.device:
    """The device, after a first allocation on it.

    Raises:
        DeviceError: there is no such device here.
    """
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch built without it
        raise DeviceError(f"device {name!r} cannot be used here: {error}") from error


def seed_of(case: Case) -> int:
    """A seed that depends on the case alone, the same in every process."""
    return int.from_bytes(hashlib.blake2b(case.id.encode(), digest_size=4).digest(), "little")


def inputs_of(case: Case, device: torch.device) -> Tensors:
    return case.make(Maker(case.dtype, device, seed_of(case)))


def to_float64(tensors: Tensors) -> Tensors:
    return {k: t.double() if t.is_floating_point() else t for k, t in tensors.items()}


def functional(
    fn: Function,
    *,
    wanted: tuple[str, ...] = (),
    cotangents: tuple[str, ...] = ("dy",),
    context: Callable[[], AbstractContextManager] = nullcontext,
) -> Callable[[Tensors], Step]:
    """`prepare` of a pure function: forward without grad mode, or forward and backward to the
    tensors named in `wanted` from output gradients named in `cotangents`."""

    def prepare(tensors: Tensors) -> Step:
        leaves = {k: t.detach().requires_grad_(k in wanted) for k, t in tensors.items()}

        def forward() -> tuple[Tensor, ...]:
            with torch.no_grad(), context():
                out = fn(leaves)
            return out if isinstance(out, tuple) else (out,)

        def forward_backward() -> tuple[Tensor, ...]:
            with context():
                out = fn(leaves)
            out = out if isinstance(out, tuple) else (out,)
            upstream = [leaves[name].detach() for name in cotangents]
            grads = torch.autograd.grad(out, [leaves[name] for name in wanted], upstream)
            return (*(o.detach() for o in out), *grads)

        return forward_backward if wanted else forward

    return prepare


def select(cases: Iterable[Case], pattern: str | None) -> list[Case]:
    """Cases whose id contains every comma- or space-separated word of `pattern`."""
    words = (pattern or "").replace(",", " ").split()
    return [case for case in cases if all(word in case.id for word in words)]
