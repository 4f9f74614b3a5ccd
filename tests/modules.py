"""A llmkern.nn module against the torch.nn module it replaces, by the accuracy rule."""

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence

import torch
from rule import check_rule, leaves
from torch import Tensor
from torch.nn import Module

from llmkern.nn import REPLACEMENTS

Call = Callable[..., Tensor | tuple[Tensor | None, ...]]


@contextlib.contextmanager
def slow_path() -> Iterator[None]:
    """Without torch's evaluation fast path, which rounds in another order."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def replaced(module: Module) -> Module:
    """A copy of a torch.nn module in which every class of the type table is llmkern's."""
    copied = copy.deepcopy(module)
    for child in copied.modules():
        child.__class__ = REPLACEMENTS.get(type(child), type(child))
    return copied


def run(module: Module, call: Call, inputs: Sequence[Tensor], dtype: torch.dtype) -> dict:
    """Outputs of call(module, *inputs) and the gradients of a fixed random projection of them."""
    module = copy.deepcopy(module).to(dtype)
    xs = leaves(inputs, dtype)
    outputs = call(module, *xs)
    outputs = [y for y in (outputs if isinstance(outputs, tuple) else (outputs,)) if y is not None]
    results = {f"output {i}": y for i, y in enumerate(outputs)}
    differentiable = [y for y in outputs if y.requires_grad]
    if differentiable:
        generator = torch.Generator().manual_seed(1)
        loss = sum((y * torch.randn(y.shape, generator=generator)).sum() for y in differentiable)
        named = {f"input {i}": x for i, x in enumerate(xs)}
        named |= {k: p for k, p in module.named_parameters() if p.requires_grad}
        gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        results |= dict(zip((f"gradient of {k}" for k in named), gradients, strict=True))
    return results


def check_module(
    theirs: Module,
    call: Call,
    *inputs: Tensor,
    ours: Module | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Every output and every gradient of llmkern's form of `theirs` keeps the accuracy rule."""
    ours = replaced(theirs) if ours is None else ours
    with slow_path():
        exact = run(theirs, call, inputs, torch.float64)
        reference = run(theirs, call, inputs, dtype)
    got = run(ours, call, inputs, dtype)
    assert got.keys() == exact.keys()
    for name in exact:
        if exact[name] is None or got[name] is None:
            none_or_zero = [r for r in (exact[name], got[name]) if r is not None]
            assert all(not bool(r.any()) for r in none_or_zero), f"{name}: unused in one only"
            continue
        check_rule(name, got[name], reference[name], exact[name])
