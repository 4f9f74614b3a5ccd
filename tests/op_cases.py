"""One small call of each op, for properties that all of them share."""

import contextlib
from collections.abc import Callable
from typing import NamedTuple

import torch
from conftest import gpu
from torch import Tensor

from llmkern import dispatch
from llmkern import functional as K


class Case(NamedTuple):
    call: Callable[..., Tensor | tuple[Tensor, ...]]
    shapes: tuple[tuple[int, ...], ...]  # of its tensors, all of which get gradients
    op: str  # a backend's module
    saves_output: bool = False  # backward needs what the call returned, as torch's does

    def tensors(self, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        generator = torch.Generator().manual_seed(3)
        found = (torch.randn(shape, generator=generator) for shape in self.shapes)
        return [t.to(dtype).requires_grad_() for t in found]

    def outputs(self, tensors: list[Tensor]) -> tuple[Tensor, ...]:
        """Of a call with the same dropout mask each time."""
        torch.manual_seed(5)
        found = self.call(*tensors)
        return found if isinstance(found, tuple) else (found,)


_X, _W, _B = (2, 8, 64), (48, 64), (48,)
_HEADS = (2, 2, 8, 16)

CASES = {
    "linear": Case(K.linear, (_X, _W, _B), "linear"),
    "linear without bias": Case(K.linear, (_X, _W), "linear"),
    "linear of few rows": Case(K.linear, ((2, 64), _W, _B), "linear"),
    "linear of one output": Case(K.linear, (_X, (64,), ()), "linear"),
    "linear gelu": Case(lambda *t: K.linear(*t, activation="gelu"), (_X, _W, _B), "linear"),
    "linear relu": Case(lambda *t: K.linear(*t, activation="relu"), (_X, _W, _B), "linear"),
    "linear dropout residual": Case(
        lambda x, w, b, r: K.linear(x, w, b, dropout_p=0.3, residual=r),
        (_X, _W, _B, (2, 8, 48)),
        "linear",
    ),
    "linear gated": Case(K.linear_gated, (_X, _W, _W, _B, _B), "linear"),
    "layer_norm": Case(lambda *t: K.layer_norm(t[0], (64,), *t[1:]), (_X, (64,), (64,)), "norm"),
    "layer_norm large": Case(
        lambda *t: K.layer_norm(t[0], (520,), *t[1:]), ((40, 520), (520,), (520,)), "norm"
    ),
    "layer_norm two dims": Case(
        lambda *t: K.layer_norm(t[0], (8, 64), *t[1:]), (_X, (8, 64), (8, 64)), "norm"
    ),
    "rms_norm": Case(lambda *t: K.rms_norm(t[0], (64,), t[1]), (_X, (64,)), "norm"),
    "add_layer_norm": Case(
        lambda x, r, w, b: K.add_layer_norm(x, r, (64,), w, b, dropout_p=0.3),
        (_X, _X, (64,), (64,)),
        "norm",
    ),
    "add_rms_norm prenorm": Case(
        lambda x, r, w: K.add_rms_norm(x, r, (64,), w, prenorm=True),
        (_X, _X, (64,)),
        "norm",
        saves_output=True,
    ),
    "attention": Case(
        lambda *t: K.scaled_dot_product_attention(*t, is_causal=True),
        (_HEADS, _HEADS, _HEADS),
        "attention",
        saves_output=True,
    ),
    "attention dropout bias": Case(
        lambda q, k, v, bias: K.scaled_dot_product_attention(q, k, v, bias, dropout_p=0.3),
        (_HEADS, _HEADS, _HEADS, (8, 8)),
        "attention",
        saves_output=True,
    ),
    "attention packed": Case(
        K.attention_qkvpacked, ((2, 8, 3, 2, 16),), "attention", saves_output=True
    ),
    "dropout": Case(lambda x: K.dropout(x, 0.3), (_X,), "dropout"),
    "gelu": Case(K.gelu, (_X,), "activation"),
    "silu": Case(K.silu, (_X,), "activation"),
    "relu": Case(K.relu, (_X,), "activation", saves_output=True),
}


@contextlib.contextmanager
def serving(backend: str):
    """Calls run on `backend`; GPU backends in the emulator."""
    with contextlib.ExitStack() as stack:
        if backend in ("triton", "cuda"):
            stack.enter_context(gpu(backend))
        stack.enter_context(dispatch.use_backend(backend))
        yield
