"""Attention calls for the tests, and the formula of csrc/include/llmkern/attention.h written with
autograd: in float64 it is the truth, in the inputs' dtype it is what torch would give."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from llmkern import functional, random


class Case(NamedTuple):
    """One call. mask: shape of a bool mask, bias: shape of a float one; padded: a key padding
    mask."""

    b: int
    h: int
    s: int
    t: int
    d: int
    g: int | None = None
    dv: int | None = None
    causal: bool = False
    align: str = "top_left"
    window: tuple[int | None, int | None] | None = None
    softcap: float = 0.0
    scale: float | None = None
    alibi: bool = False
    sinks: bool = False
    mask: tuple[int, ...] | None = None
    bias: tuple[int, ...] | None = None
    padded: bool = False
    p: float = 0.0

    def options(self) -> dict:
        return dict(dropout_p=self.p, is_causal=self.causal, scale=self.scale,
                    enable_gqa=self.g is not None, causal_align=self.align, window=self.window,
                    softcap=self.softcap)  # fmt: skip

    def torch_has_it(self) -> bool:
        plain = (self.align, self.window, self.softcap, self.alibi, self.sinks, self.padded, self.p)
        return plain == ("top_left", None, 0.0, False, False, False, 0.0) and not (
            self.causal and (self.mask or self.bias)
        )


def make(case: Case, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor | None]:
    """Tensors of the call. Scores have unit variance; query 0 sees key 0 in every mask."""
    n = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=n).to(dtype)

    b, h, s, t, d = case[:5]
    g, dv = case.g or h, case.dv or d
    tensors: dict[str, Tensor | None] = dict(
        q=randn(b, h, s, d), k=randn(b, g, t, d), v=randn(b, g, t, dv)
    )
    tensors["mask"] = tensors["padding"] = tensors["slopes"] = tensors["sinks"] = None
    if case.mask is not None:
        tensors["mask"] = torch.rand(case.mask, generator=n) > 0.4
        tensors["mask"][..., 0] = True
    if case.bias is not None:
        tensors["mask"] = randn(*case.bias)
    if case.padded:
        tensors["padding"] = torch.rand((b, t), generator=n) > 0.3
    if case.alibi:
        tensors["slopes"] = torch.rand(h, generator=n)
    if case.sinks:
        tensors["sinks"] = torch.randn(h, generator=n)
    return tensors


def inputs_of(tensors: dict[str, Tensor | None], case: Case) -> list[Tensor]:
    """The differentiable ones."""
    names = ["q", "k", "v"] + ["mask"] * (case.bias is not None) + ["sinks"] * case.sinks
    return [tensors[name] for name in names]


def with_grad(tensors: dict, case: Case, dtype: torch.dtype | None = None) -> dict:
    """Fresh leaves; q, k, v and a bias in `dtype` if one is given."""
    wanted = ["q", "k", "v"] + ["mask"] * (case.bias is not None)
    result = dict(tensors)
    for name in wanted:
        result[name] = tensors[name].detach().clone().to(dtype or tensors[name].dtype)
        result[name].requires_grad_()
    if case.sinks:
        result["sinks"] = (
            tensors["sinks"]
            .detach()
            .clone()
            .to(torch.float64 if dtype == torch.float64 else torch.float32)
        )
        result["sinks"].requires_grad_()
    return result


def ours(tensors: dict, case: Case, seed: int = 7, **options) -> tuple[Tensor, Tensor]:
    """(out, lse) by llmkern, with the dropout seed drawn from generator state `seed`."""
    if case.p:
        torch.manual_seed(seed)
    return functional.scaled_dot_product_attention(
        tensors["q"], tensors["k"], tensors["v"], tensors["mask"], **case.options(),
        key_padding_mask=tensors["padding"], alibi_slopes=tensors["slopes"],
        sinks=tensors["sinks"], return_lse=True, **options)  # fmt: skip


def keep_mask(case: Case, seed: int = 7) -> Tensor:
    torch.manual_seed(seed)
    drawn = random.draw_seed(torch.device("cpu"))
    return random.attention_keep_mask(drawn, (case.b, case.h, case.s, case.t), case.p)


def visible(tensors: dict, case: Case) -> Tensor:
    """bool [B, H, S, T]."""
    shift = case.t - case.s if case.align == "bottom_right" else 0
    i, j = torch.arange(case.s)[:, None] + shift, torch.arange(case.t)
    seen = torch.ones(case.b, case.h, case.s, case.t, dtype=torch.bool)
    left, right = case.window or (None, None)
    if case.causal:
        seen &= j <= i
    if left is not None and left >= 0:
        seen &= j >= i - left
    if right is not None and right >= 0:
        seen &= j <= i + right
    if tensors["mask"] is not None:
        mask = tensors["mask"].detach()
        seen &= mask if mask.dtype == torch.bool else mask != -math.inf
    if tensors["padding"] is not None:
        seen &= tensors["padding"][:, None, None, :]
    return seen


def formula(tensors: dict, case: Case, seed: int = 7) -> tuple[Tensor, Tensor]:
    """(out, lse) in the dtype of the tensors, by autograd-friendly torch ops."""
    q, k, v = tensors["q"], tensors["k"], tensors["v"]
    dtype, groups = q.dtype, case.h // k.shape[1] if k.shape[1] else 1
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scale = case.scale if case.scale is not None else 1.0 / math.sqrt(case.d)
    scores = q @ k.mT * scale
    if case.softcap:
        scores = case.softcap * torch.tanh(scores / case.softcap)
    seen = visible(tensors, case)
    if case.bias is not None:
        scores = scores + torch.where(seen, tensors["mask"], 0).to(dtype)
    if case.alibi:
        shift = case.t - case.s if case.align == "bottom_right" else 0
        distance = torch.arange(case.t) - torch.arange(case.s)[:, None] - shift
        slopes = tensors["slopes"].to(dtype)
        scores = scores - slopes[:, None, None] * distance.abs()
    scores = torch.where(seen, scores, -math.inf)
    if case.sinks:
        sink = tensors["sinks"].to(dtype)[:, None, None].expand(case.b, case.h, case.s, 1)
        scores = torch.cat([scores, sink], -1)
        seen = torch.cat([seen, torch.ones_like(sink, dtype=torch.bool)], -1)
    some = seen.any(-1, keepdim=True)
    safe = torch.where(some, scores, 0.0)  # no NaN gradient from rows that see nothing
    lse = torch.logsumexp(safe, -1)
    weights = torch.where(seen, torch.softmax(safe, -1), 0.0)[..., : case.t]
    if case.p:
        weights = torch.where(keep_mask(case, seed), weights * random.scale(case.p), 0.0)
    return weights @ v, torch.where(some[..., 0], lse, -math.inf)


def theirs(tensors: dict, case: Case) -> Tensor:
    """out by torch: its own attention where that has the features, else the formula. By its math,
    which is at least as accurate as its fused kernels, runs on every CPU and can be differentiated
    in every way."""
    if not case.torch_has_it():
        return formula(tensors, case)[0]
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(
            tensors["q"], tensors["k"], tensors["v"], tensors["mask"], is_causal=case.causal,
            scale=case.scale, enable_gqa=case.g is not None)  # fmt: skip
