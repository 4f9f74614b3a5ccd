"""Argument checks, before anything is allocated or written: op, tensor, rule, what it got."""

from collections.abc import Sequence

import torch
import torch.fx
from torch import Tensor

from llmkern import errors

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(d).removeprefix("torch.") for d in dtypes)


def tensor(op: str, name: str, value: object) -> None:
    if isinstance(value, Tensor):
        return
    text = f"{op}: {name} must be a Tensor, got {type(value).__name__}"
    if isinstance(value, torch.fx.Proxy):
        text += (
            "; torch.fx traces calls of the form llmkern.functional.name(...), and a function that "
            "was imported by itself after torch.fx.wrap('name') in the module that calls it"
        )
    raise errors.DtypeError(text)


def floating(op: str, name: str, value: Tensor) -> None:
    if value.dtype not in FLOATS:
        raise errors.DtypeError(
            f"{op}: {name} must be one of {_names(FLOATS)}, got {_names((value.dtype,))}"
        )
    if value.layout != torch.strided or value.is_nested:
        kind = "a nested one" if value.is_nested else value.layout
        raise errors.ShapeError(f"{op}: {name} must be a strided tensor, got {kind}")


def same_device(
    op: str, name: str, value: Tensor, input: Tensor, input_name: str = "input"
) -> None:
    if value.device != input.device:
        raise errors.DeviceError(
            f"{op}: {name} must be on {input.device} as {input_name}, got {value.device}"
        )


def dtype_in(op: str, name: str, value: Tensor, dtypes: Sequence[torch.dtype], why: str) -> None:
    if value.dtype not in dtypes:
        raise errors.DtypeError(
            f"{op}: {name} must be {_names(dtypes)} ({why}), got {_names((value.dtype,))}"
        )


def shape(op: str, name: str, value: Tensor, expected: Sequence[int], why: str) -> None:
    if tuple(value.shape) != tuple(expected):
        raise errors.ShapeError(
            f"{op}: {name} must be {list(expected)} ({why}), got {list(value.shape)}"
        )


def probability(op: str, name: str, value: float) -> None:
    if not 0.0 <= value <= 1.0:
        raise errors.ArgumentError(f"{op}: {name} must be in [0, 1], got {value}")


def one_of(op: str, name: str, value: object, options: Sequence[object]) -> None:
    if value not in options:
        listed = ", ".join(repr(option) for option in options)
        raise errors.ArgumentError(f"{op}: {name} must be one of {listed}, got {value!r}")
