"""The accuracy rule of docs/numerics.md as an assertion (one definition: llmkern/numerics.py)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from llmkern import numerics


def check_rule(name: str, ours: Tensor, theirs: Tensor, exact: Tensor) -> None:
    """error(ours) <= 2 x error(torch, same dtype) + floor, both against float64."""
    assert ours.dtype == theirs.dtype, f"{name}: {ours.dtype} instead of {theirs.dtype}"
    assert ours.shape == exact.shape, f"{name}: {ours.shape} instead of {exact.shape}"
    bound = numerics.allowed(numerics.error(theirs, exact), ours.dtype)
    got = numerics.error(ours, exact)
    assert got <= bound, f"{name}: error {got:.3g} against float64, allowed {bound:.3g}"


def check_same(backend: str, got: Tensor, want: Tensor) -> None:
    """Bitwise equal where our kernels computed. The reference is torch's ops, whose last bits may
    depend on layout, batch, threads and instruction set: there, equal up to the dtype's floor."""
    if backend == "reference":
        assert got.dtype == want.dtype and got.shape == want.shape
        assert numerics.error(got, want) <= numerics.FLOOR[got.dtype]
    else:
        assert torch.equal(got, want)


def gradients(outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of a fixed random projection of the outputs (the same for every dtype)."""
    generator = torch.Generator().manual_seed(1)
    loss = sum(
        (y.double() * torch.randn(y.shape, generator=generator).double()).sum() for y in outputs
    )
    return list(torch.autograd.grad(loss, inputs))


def leaves(tensors: Sequence[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    """Fresh leaf copies that require grad, in another dtype if one is given."""
    return [t.detach().clone().to(dtype or t.dtype).requires_grad_() for t in tensors]
