"""Activation checkpointing: what a region ran under, its recomputation in backward runs under.

torch.utils.checkpoint saves and restores torch's own state (autocast, the generators, the default
device). State of llmkern's that a context manager sets is added here: each kind is entered with
`carry`, which from then on also looks at torch's two forms of checkpoint where they keep and where
they call the function. That holds for a `checkpoint` imported before, and for regions whose forward
ran before, outside any such context: their recomputation runs outside as well, wherever backward
is called.
"""

import contextlib
import functools
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch

from llmkern.torch_private import CheckpointFrame, CheckpointFunction, checkpoint_known


class _Kind(NamedTuple):
    """One kind of state."""

    read: Callable[[], Any]
    under: Callable[[Any], AbstractContextManager]
    default: Any


_kinds: dict[str, _Kind] = {}
_State = dict[str, Any]


def carry(
    name: str,
    read: Callable[[], Any],
    under: Callable[[Any], AbstractContextManager],
    default: Any,
    possible: bool = True,
) -> None:
    """Make recomputations run `under(value)` with the value that `read()` gave at the forward.

    Args:
        name: of this kind of state; known already, nothing is done.
        default: what `read` gives outside all contexts.
        possible: False where `under` cannot do it with this torch. Then, and where torch's
            checkpoint is not known, a warning says that recomputations run outside.
    """
    if not (checkpoint_known and possible):
        warnings.warn(
            f"llmkern's {name} is not carried into what torch.utils.checkpoint recomputes: torch "
            f"{torch.__version__} works in a way that is not known here. The recomputation runs "
            "outside it, with other kernels and another dropout mask: do not use them together",
            RuntimeWarning,
            stacklevel=3,
        )
        return
    if not _kinds:
        _watch()
    _kinds.setdefault(name, _Kind(read, under, default))


def _state() -> _State:
    return {name: kind.read() for name, kind in _kinds.items()}


def _as_in(state: _State, function: Callable, *args: Any, **kwargs: Any) -> Any:
    with contextlib.ExitStack() as stack:
        for name, kind in _kinds.items():
            stack.enter_context(kind.under(state.get(name, kind.default)))
        return function(*args, **kwargs)


class _RecomputeFn:
    """_CheckpointFrame.recompute_fn (use_reentrant=False): keeps the state at which it was set,
    which is when the region's forward starts."""

    def __set__(self, frame: Any, function: Callable) -> None:
        frame.__dict__["recompute_fn"] = function
        frame.__dict__["llmkern_state"] = _state()

    def __get__(self, frame: Any, owner: type | None = None) -> Any:
        if frame is None:
            return self
        state = frame.__dict__.get("llmkern_state", {})
        return functools.partial(_as_in, state, frame.__dict__["recompute_fn"])


def _watch() -> None:
    forward, backward = CheckpointFunction.forward, CheckpointFunction.backward

    @functools.wraps(forward)
    def keep(ctx, *args):
        ctx.llmkern_state = _state()
        return forward(ctx, *args)

    @functools.wraps(backward)
    def recompute(ctx, *gradients):
        function, state = ctx.run_function, getattr(ctx, "llmkern_state", {})
        ctx.run_function = functools.partial(_as_in, state, function)
        try:
            return backward(ctx, *gradients)
        finally:
            ctx.run_function = function

    CheckpointFunction.forward = staticmethod(keep)
    CheckpointFunction.backward = staticmethod(recompute)
    CheckpointFrame.recompute_fn = _RecomputeFn()
