"""MultiheadAttention.

The fused projection writes q, k and v side by side, [B, S, 3, H, D]; attention reads them there and
writes [B, S, H, D], which is what the output projection reads. With batch_first=False the same
memory is seen through a transposed view.
"""

import functools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from llmkern import dispatch, functional
from llmkern.errors import ArgumentError, ModuleDtypeError, ModuleShapeError
from llmkern.nn.modes import outside_modes
from llmkern.nn.table import adopt, replaces
from llmkern.torch_private import safe_softmax


class Masks(NamedTuple):
    """What `functional.scaled_dot_product_attention` wants: True = visible, floats are added."""

    attn_mask: Tensor | None
    keys: Tensor | None  # bool [B, T]
    is_causal: bool


@replaces(torch.nn.MultiheadAttention)
class MultiheadAttention(torch.nn.MultiheadAttention):
    """torch.nn.MultiheadAttention on llmkern's linear and attention.

    The output does not depend on `need_weights`, except in training with dropout, where the weights
    returned are the dropped ones, as in torch. A query that sees no key gets 0 where torch gives
    NaN. `is_causal` is a hint about attn_mask, as in torch, relied on with need_weights=False where
    the mask wants no gradient.
    """

    @functools.wraps(torch.nn.MultiheadAttention.__init__)
    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        adopt(self)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        # Not ours: undone, while somebody has kept this method as the module's forward.
        if not isinstance(self, MultiheadAttention) or self._unserved(query, key, value):
            return torch.nn.MultiheadAttention.forward(
                self, query, key, value, key_padding_mask, need_weights, attn_mask,
                average_attn_weights, is_causal,
            )  # fmt: skip
        return outside_modes(
            self._forward, query, key, value, key_padding_mask, need_weights, attn_mask,
            average_attn_weights, is_causal,
        )  # fmt: skip

    def _forward(
        self, query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights,
        is_causal,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        batched = query.dim() == 3
        seq_first = batched and not self.batch_first
        _check(self, query, key, value, key_padding_mask, attn_mask, seq_first)
        if is_causal and attn_mask is None:
            raise ArgumentError(
                "MultiheadAttention: attn_mask must be given with is_causal=True, got None"
            )
        if not batched:
            query, key, value = _unsqueeze(query, key, value)
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        projected = self._project(query, key, value, seq_first)
        if self.bias_k is not None or self.add_zero_attn:
            q, k, v = _separate(projected)
            projected = q, *self._extend(k, v)
        extra = projected[-1].shape[1] - key.shape[0 if seq_first else 1]
        hinted = not need_weights and (key_padding_mask is None or not extra)
        is_causal = is_causal and hinted and not attn_mask.requires_grad
        masks = _masks(attn_mask, key_padding_mask, is_causal, self.num_heads, extra)
        p = self.dropout if self.training else 0.0
        if need_weights:
            out, weights = _attend_with_weights(*_separate(projected), masks, p)
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            out, weights = _attend(projected, masks, p), None
        out = out.flatten(2)
        if seq_first:
            out = out.transpose(0, 1).contiguous()
        out = functional.linear(out, self.out_proj.weight, self.out_proj.bias)
        if batched:
            return out, weights
        return out[0], None if weights is None else weights[0]

    def _unserved(self, query: Tensor, key: Tensor, value: Tensor) -> str | None:
        weights = (
            (self.in_proj_weight,)
            if self._qkv_same_embed_dim
            else (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        )
        return dispatch.unserved(
            query, key, value, *weights, self.in_proj_bias, self.out_proj.weight, self.out_proj.bias
        )

    def _project(
        self, query: Tensor, key: Tensor, value: Tensor, seq_first: bool
    ) -> tuple[Tensor, ...]:
        """(qkv [B, S, 3, H, D],), (q [B, S, H, D], kv [B, T, 2, H, D]) or (q, k, v)."""
        size, bias = self.embed_dim, self.in_proj_bias
        if not self._qkv_same_embed_dim:
            weights = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
            parts = ((query, weights[0]), (key, weights[1]), (value, weights[2]))
        elif query is key and key is value:
            parts = ((query, self.in_proj_weight),)
        elif key is value:
            w_q, w_kv = self.in_proj_weight.split((size, 2 * size))
            parts = ((query, w_q), (key, w_kv))
        else:
            parts = tuple(zip((query, key, value), self.in_proj_weight.split(size), strict=True))
        widths = [weight.shape[0] for _, weight in parts]
        biases = [None] * len(parts) if bias is None else bias.split(widths)
        projected = []
        for (x, weight), b, width in zip(parts, biases, widths, strict=True):
            y = functional.linear(x, weight, b)
            sizes = (self.num_heads, self.head_dim)
            y = torch.unflatten(y, -1, sizes if width == size else (width // size, *sizes))
            projected.append(y.transpose(0, 1) if seq_first else y)
        return tuple(projected)

    def _extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """k and v [B, T, H, D] with the learned position and the zero position added behind."""
        row = (k.shape[0], 1, self.num_heads, self.head_dim)
        ks, vs = [k], [v]
        if self.bias_k is not None:
            ks.append(self.bias_k.view(1, *row[1:]).expand(row).to(k.dtype))
            vs.append(self.bias_v.view(1, *row[1:]).expand(row).to(v.dtype))
        if self.add_zero_attn:
            ks.append(k.new_zeros(row))
            vs.append(v.new_zeros(row))
        return torch.cat(ks, 1), torch.cat(vs, 1)


def _unsqueeze(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A batch of one; what was one tensor stays one, as `_project` asks for identity."""
    q = query[None]
    k = q if key is query else key[None]
    return q, k, k if value is key else value[None]


def _separate(projected: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [B, S or T, H, D] as views of what `_project` returned."""
    if len(projected) == 1:
        return projected[0].unbind(2)
    if len(projected) == 2:
        return projected[0], *projected[1].unbind(2)
    return projected


def _attend(projected: tuple[Tensor, ...], masks: Masks, dropout_p: float) -> Tensor:
    """[B, S, H, D] from whatever `_project` returned."""
    options = {
        "attn_mask": masks.attn_mask,
        "dropout_p": dropout_p,
        "is_causal": masks.is_causal,
        "key_padding_mask": masks.keys,
    }
    if len(projected) == 1:
        return functional.attention_qkvpacked(projected[0], **options)
    if len(projected) == 2:
        return functional.attention_kvpacked(*projected, **options)
    q, k, v = (t.transpose(1, 2) for t in projected)
    return functional.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2)


def _attend_with_weights(
    q: Tensor, k: Tensor, v: Tensor, masks: Masks, dropout_p: float
) -> tuple[Tensor, Tensor]:
    """([B, S, H, D], weights [B, H, S, T]); the weights are those that were used, dropout included.

    Without dropout the output comes from the kernel: if the caller throws the weights away, their
    memory goes with them and backward does not touch a score matrix.
    """
    qt, kt = q.transpose(1, 2), k.transpose(1, 2)
    scores = (qt * math.sqrt(1.0 / q.shape[-1])) @ kt.transpose(-2, -1)
    if masks.attn_mask is not None:
        mask = masks.attn_mask
        scores = (
            scores.masked_fill(~mask, -math.inf)
            if mask.dtype == torch.bool
            else scores + mask.to(scores.dtype)
        )
    if masks.keys is not None:
        scores = scores.masked_fill(~masks.keys[:, None, None], -math.inf)
    weights = safe_softmax(scores, -1)
    if dropout_p == 0.0:
        return _attend((q, k, v), masks, 0.0), weights
    weights = functional.dropout(weights, dropout_p)
    return (weights @ v.transpose(1, 2)).transpose(1, 2), weights


def _masks(
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    is_causal: bool,
    heads: int,
    extra: int,
) -> Masks:
    """From torch.nn's polarity (True = hidden) to the functional one, without widening a bool."""
    keys = None
    if is_causal:
        attn_mask = None
    elif attn_mask is not None:
        attn_mask = F.pad(attn_mask, (0, extra)) if extra else attn_mask
        if attn_mask.dim() == 3:
            attn_mask = torch.unflatten(attn_mask, 0, (-1, heads))
    if key_padding_mask is not None:
        padding = F.pad(key_padding_mask, (0, extra)) if extra else key_padding_mask
        if padding.dtype == torch.bool:
            keys = ~padding
        elif attn_mask is None:
            attn_mask = padding[:, None, None]
        elif attn_mask.dtype == torch.bool:
            hidden = padding.new_tensor(-math.inf)
            attn_mask = torch.where(attn_mask, hidden, padding[:, None, None])
        else:
            attn_mask = attn_mask + padding[:, None, None]
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = ~attn_mask
    return Masks(attn_mask, keys, is_causal)


def _check(
    module: MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    seq_first: bool,
) -> None:
    """Raise on shapes and dtypes that do not go together."""
    dims = query.dim()
    if dims not in (2, 3):
        raise ModuleShapeError(
            f"MultiheadAttention: query must have 2 or 3 dims, got {list(query.shape)}"
        )
    s, t = query.shape[0 if seq_first else -2], key.shape[0 if seq_first else -2]
    batch = () if dims == 2 else (query.shape[1 if seq_first else 0],)
    for name, tensor, length, width in (
        ("query", query, s, module.embed_dim),
        ("key", key, t, module.kdim),
        ("value", value, t, module.vdim),
    ):
        expected = (length, *batch, width) if seq_first else (*batch, length, width)
        _shape(name, tensor, expected)
    if key_padding_mask is not None:
        _mask_dtype("key_padding_mask", key_padding_mask)
        _shape("key_padding_mask", key_padding_mask, (*batch, t))
    if attn_mask is not None:
        _mask_dtype("attn_mask", attn_mask)
        slabs = (batch[0] if batch else 1) * module.num_heads
        _shape("attn_mask", attn_mask, (s, t) if attn_mask.dim() == 2 else (slabs, s, t))


def _shape(name: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    if tensor.shape != expected:
        raise ModuleShapeError(
            f"MultiheadAttention: {name} must be {list(expected)}, got {list(tensor.shape)}"
        )


def _mask_dtype(name: str, mask: Tensor) -> None:
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise ModuleDtypeError(
            f"MultiheadAttention: {name} must be bool or floating point, got {mask.dtype}"
        )
