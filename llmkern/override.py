"""Rerouting of torch.nn.functional calls to llmkern, for models that make them themselves.

    with llmkern.override() as calls:
        loss = model(x)
    print(calls)

A TorchFunctionMode: it sees F.linear, torch.layer_norm, Tensor.relu and the like on this thread
only, nests, ends with its block, and is traced by torch.compile in a compiled region or around one.
A call that llmkern does not serve runs as if the mode were not there, and is counted with the
reason. Backward needs no mode: a rerouted call records its own, and what torch.utils.checkpoint
recomputes there runs under the modes of its forward.
"""

import contextlib
import itertools
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from llmkern import dispatch, functional, recompute
from llmkern.errors import LlmkernError
from llmkern.torch_private import (
    FunctionMode,
    constant_in_graph,
    function_modes,
    function_modes_known,
    set_function_modes,
    silu,
)

# Of the module, so that a Rerouting can be copied and pickled. dynamo passes constants only to a
# function that it runs: a Rerouting is named by a key, in the order of their making.
_counting = threading.Lock()
_made: "weakref.WeakValueDictionary[str, Rerouting]" = weakref.WeakValueDictionary()
_numbers = itertools.count(1)


class Declined(LlmkernError):
    """The call is torch's; the text says why."""


class Rerouting(FunctionMode):
    """What `override` returns: the mode, and its counts.

    served: calls that ran on llmkern, by function. declined: calls that torch ran, by "function:
    reason". In a compiled region a call is counted when it is traced, not each time it runs.
    """

    def __new__(cls) -> "Rerouting":  # not __init__, which a copy and a pickle go past
        _recompute_alike()
        mode = super().__new__(cls)
        if not torch.compiler.is_dynamo_compiling():
            mode._key = str(next(_numbers))  # not an int, of which dynamo may make a symbol
            _made[mode._key] = mode
        return mode

    _key = ""  # of one that a compiled region makes, which counts nothing

    def __getstate__(self) -> dict[str, Any]:
        """What a copy takes over: all but the key."""
        return {name: value for name, value in self.__dict__.items() if name != "_key"}

    def __init__(self) -> None:
        super().__init__()
        self.served: Counter[str] = Counter()
        self.declined: Counter[str] = Counter()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        route = _ROUTES.get(func)
        if route is None:
            return func(*args, **kwargs) if kwargs else func(*args)
        kwargs = kwargs or {}
        try:
            if torch.compiler.is_compiling():  # no context variable can be set in a traced region
                output = route.call(*args, **kwargs)
            else:
                with dispatch.fallback_policy("error"):
                    output = route.call(*args, **kwargs)
        except LlmkernError as refusal:
            plain = isinstance(refusal, Declined) or not torch.compiler.is_compiling()
            reason = refusal.args[0] if plain else type(refusal).__name__  # no traced sizes in it
            _count(self._key, f"{route.name}: {reason}", served=False)
            return func(*args, **kwargs)
        _count(self._key, route.name, served=True)
        return output

    def is_on(self) -> bool:
        """Whether this thread is inside the mode."""
        return any(mode is self for mode in function_modes())

    def __str__(self) -> str:
        served = ", ".join(f"{n} x {name}" for name, n in self.served.most_common())
        lines = [f"rerouted: {served or 'nothing'}"]
        lines += [f"  left to torch: {n} x {why}" for why, n in self.declined.most_common()]
        return "\n".join(lines)


def override() -> Rerouting:
    """A context in which torch.nn.functional calls that llmkern serves run on llmkern.

    Reached: linear, scaled_dot_product_attention, layer_norm, rms_norm, dropout, gelu, silu, relu,
    as functions of torch.nn.functional or torch, and Tensor.relu. Not reached: functions that torch
    calls inside another (the linear inside F.multi_head_attention_forward), operators (x @ w), and
    in-place forms.
    """
    return Rerouting()


def _on() -> tuple[Rerouting, ...]:
    """The Reroutings that this thread is inside of, the innermost last."""
    return tuple(mode for mode in function_modes() if isinstance(mode, Rerouting))


@contextlib.contextmanager
def _just(modes: tuple[Rerouting, ...]) -> Iterator[None]:
    """Inside, the Reroutings that are on are `modes`, whichever were on before."""
    if modes == _on():
        yield
        return
    before = function_modes()
    set_function_modes([*(mode for mode in before if not isinstance(mode, Rerouting)), *modes])
    try:
        yield
    finally:
        set_function_modes(before)


def _recompute_alike() -> bool:
    """Have torch.utils.checkpoint recompute under the Reroutings of the forward."""
    recompute.carry("rerouting", _on, _just, (), possible=function_modes_known)
    return True


constant_in_graph(_recompute_alike)


def _count(key: str, what: str, served: bool) -> None:
    if torch.compiler.is_dynamo_compiling():  # traced, not run: no lock and no count in a graph
        return
    mode = _made.get(key)
    if mode is not None:
        with _counting:
            (mode.served if served else mode.declined)[what] += 1


constant_in_graph(_count)


def _require(input: Tensor, *others: Tensor | None) -> None:
    reason = dispatch.unserved(input, *others)
    if reason is not None:
        raise Declined(reason)


def _linear(input, weight, bias=None):
    _require(input, weight, bias)
    return functional.linear(input, weight, bias)


def _attention(
    query,
    key,
    value,
    attn_mask=None,
    dropout_p=0.0,
    is_causal=False,
    scale=None,
    enable_gqa=False,
):
    _require(query, key, value, attn_mask)
    return functional.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa
    )


def _layer_norm(input, normalized_shape, weight=None, bias=None, eps=1e-5, cudnn_enable=True):
    _require(input, weight, bias)
    return functional.layer_norm(input, normalized_shape, weight, bias, eps)


def _rms_norm(input, normalized_shape, weight=None, eps=None):
    _require(input, weight)
    return functional.rms_norm(input, normalized_shape, weight, eps)


def _dropout(input, p=0.5, training=True, inplace=False):
    if inplace or not training:
        raise Declined("in place" if inplace else "not in training")
    _require(input)
    return functional.dropout(input, p)


def _torch_dropout(input, p, train):
    return _dropout(input, p, train)


def _gelu(input, *, approximate="none"):
    _require(input)
    return functional.gelu(input, approximate)


def _silu(input, inplace=False):
    return _activation(functional.silu, input, inplace)


def _relu(input, inplace=False):
    return _activation(functional.relu, input, inplace)


def _activation(function: Callable[[Tensor], Tensor], input: Tensor, inplace: bool) -> Tensor:
    if inplace:
        raise Declined("in place")
    _require(input)
    return function(input)


class _Route(NamedTuple):
    name: str
    call: Callable[..., Tensor]


_ROUTES = {
    function: _Route(name, call)
    for name, call, functions in (
        ("linear", _linear, (F.linear,)),
        ("scaled_dot_product_attention", _attention, (F.scaled_dot_product_attention,)),
        ("layer_norm", _layer_norm, (F.layer_norm, torch.layer_norm)),
        ("rms_norm", _rms_norm, (F.rms_norm, torch.rms_norm)),
        ("dropout", _dropout, (F.dropout,)),
        ("dropout", _torch_dropout, (torch.dropout,)),
        ("gelu", _gelu, (F.gelu,)),
        ("silu", _silu, (F.silu, silu)),
        ("relu", _relu, (F.relu, torch.relu, Tensor.relu)),
    )
    for function in functions
}

NAMES = frozenset(route.name for route in _ROUTES.values())
