"""ReLU near 0, where rounding alone decides which of two derivatives a run takes.

A unit whose exact pre-activation is 1e-9 may lie on the other side of 0 in float32. Both branches
are right answers then, and their gradients differ by the unit's whole share, so a comparison with
the oracle's own branch says nothing. `Recorder` notes the pre-activations near 0 of the oracle and
of the run that is judged. Where the two lie on opposite sides of 0 and differ by no more than
rounding, the oracle is run again with those units moved to the side that the run was on
(`Mover`). Every other unit keeps the oracle's branch, so a wrong derivative is still an error.

A unit that is an input of the case has no rounding in it and is never moved.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmkern import numerics
from llmkern.bench.registry import Tensors
from llmkern.torch_private import DispatchMode


class Near(NamedTuple):
    """Pre-activations of one ReLU call that are within `margin` of 0."""

    size: int  # elements of the call
    margin: float
    indices: Tensor  # int64 [N], into the flattened call
    values: Tensor  # float64 [N]


class Moves(NamedTuple):
    """Units of one ReLU call to be moved across 0."""

    indices: Tensor  # int64 [N], into the flattened call
    positive: Tensor  # bool [N], the side that they are moved to


class Watch(DispatchMode):
    """Calls `visit(number, pre-activation)` for each ReLU, in the order of the forward pass.

    A pre-activation may be changed in place: the derivative is taken from what it is afterwards.
    """

    def __init__(self, visit: Callable[[int, Tensor], None]) -> None:
        super().__init__()
        self._visit = visit
        self._calls = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        packet, kwargs = func.overloadpacket, kwargs or {}
        if packet is torch.ops.llmkern.linear:
            result = func(*args, **kwargs)
            *_, activation, _dropout_p, keeps, _backend = args
            if activation == "relu" and keeps:
                _y, preact, _up_preact = result
                self._see(preact)
            return result
        if packet in (torch.ops.aten.relu, torch.ops.aten.relu_):
            self._see(args[0])
        elif packet is torch.ops.llmkern.activation:
            x, activation, _backend = args
            if activation == "relu":
                self._see(x)
        return func(*args, **kwargs)

    def _see(self, preact: Tensor) -> None:
        self._visit(self._calls, preact)
        self._calls += 1


class Recorder(Watch):
    """Notes the units of the oracle near 0, `margin` being what rounding to `dtype` may do.

    `inputs` are the tensors that the run is given.
    """

    def __init__(self, inputs: Tensors, dtype: torch.dtype) -> None:
        super().__init__(self._note)
        self._inputs = {tensor.untyped_storage().data_ptr() for tensor in inputs.values()}
        self._floor = numerics.FLOOR[dtype]
        self.near: list[Near] = []

    @property
    def any_near(self) -> bool:
        return any(len(call.indices) for call in self.near)

    def _note(self, number: int, preact: Tensor) -> None:
        flat = preact.detach().reshape(-1)
        margin = 0.0
        if flat.numel() and preact.untyped_storage().data_ptr() not in self._inputs:
            margin = self._floor * (1.0 + float(flat.abs().max()))
        indices = (flat.abs() < margin).nonzero().squeeze(1)
        self.near.append(Near(flat.numel(), margin, indices, flat[indices].double()))


class Comparer(Watch):
    """Finds the units of a run that lie on the other side of 0 than the oracle's.

    `moves` maps the number of a call to what the oracle must move to follow this run.
    """

    def __init__(self, near: list[Near]) -> None:
        super().__init__(self._compare)
        self._near = near
        self.moves: dict[int, Moves] = {}

    def _compare(self, number: int, preact: Tensor) -> None:
        if number >= len(self._near) or preact.numel() != self._near[number].size:
            return
        _, margin, indices, exact = self._near[number]
        found = preact.detach().reshape(-1)[indices].double()
        across = ((found > 0) != (exact > 0)) & ((found - exact).abs() <= margin)
        if bool(across.any()):
            self.moves[number] = Moves(indices[across], found[across] > 0)


class Mover(Watch):
    """Moves units to the given side of 0, by no more than it takes."""

    def __init__(self, moves: dict[int, Moves]) -> None:
        super().__init__(self._move)
        self._moves = moves

    def _move(self, number: int, preact: Tensor) -> None:
        if number in self._moves:
            indices, positive = self._moves[number]
            place = torch.unravel_index(indices, preact.shape)
            sign = torch.where(positive, 1.0, -1.0).to(preact.dtype)
            preact[place] = sign * torch.finfo(preact.dtype).tiny
