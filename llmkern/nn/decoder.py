"""TransformerDecoderLayer and TransformerDecoder: encoder.py's scheme and cross-attention."""

import functools

import torch
from torch import Tensor

from llmkern import dispatch
from llmkern.nn.fusion import add_linear, add_norm, feed_forward, ours
from llmkern.nn.masks import detect_causal, sequence_length
from llmkern.nn.table import adopt, replaces

_BLOCKS = {
    name: getattr(torch.nn.TransformerDecoderLayer, name)
    for name in ("_sa_block", "_mha_block", "_ff_block")
}


@replaces(torch.nn.TransformerDecoderLayer)
class TransformerDecoderLayer(torch.nn.TransformerDecoderLayer):
    """torch.nn.TransformerDecoderLayer with its residual additions, norms, activations and dropouts
    fused into the kernels beside them."""

    @functools.wraps(torch.nn.TransformerDecoderLayer.__init__)
    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        adopt(self)

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Tensor:
        if not ours(self, TransformerDecoderLayer, _BLOCKS) or dispatch.unserved(tgt, memory):
            return torch.nn.TransformerDecoderLayer.forward(
                self, tgt, memory, tgt_mask, memory_mask, tgt_key_padding_mask,
                memory_key_padding_mask, tgt_is_causal, memory_is_causal,
            )  # fmt: skip
        own = {
            "attn_mask": tgt_mask,
            "key_padding_mask": tgt_key_padding_mask,
            "is_causal": tgt_is_causal,
            "need_weights": False,
        }
        cross = {
            "attn_mask": memory_mask,
            "key_padding_mask": memory_key_padding_mask,
            "is_causal": memory_is_causal,
            "need_weights": False,
        }
        if self.norm_first:
            y = self.norm1(tgt)
            attended = self.self_attn(y, y, y, **own)[0]
            y, z = add_norm(attended, tgt, self.dropout1, self.norm2, prenorm=True)
            attended = self.multihead_attn(y, memory, memory, **cross)[0]
            y, z = add_norm(attended, z, self.dropout2, self.norm3, prenorm=True)
            return add_linear(self.linear2, feed_forward(self, y), self.dropout3, z)
        attended = self.self_attn(tgt, tgt, tgt, **own)[0]
        y = add_norm(attended, tgt, self.dropout1, self.norm1)
        attended = self.multihead_attn(y, memory, memory, **cross)[0]
        y = add_norm(attended, y, self.dropout2, self.norm2)
        y = add_norm(self.linear2(feed_forward(self, y)), y, self.dropout3, self.norm3)
        return y


@replaces(torch.nn.TransformerDecoder)
class TransformerDecoder(torch.nn.TransformerDecoder):
    """torch.nn.TransformerDecoder; finds out once, not once a layer, that tgt_mask is causal."""

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> Tensor:
        if tgt_is_causal is None and not tgt.is_nested:
            length = sequence_length(tgt, self.layers[0].self_attn.batch_first)
            tgt_is_causal = detect_causal(tgt_mask, length)
        return torch.nn.TransformerDecoder.forward(
            self, tgt, memory, tgt_mask, memory_mask, tgt_key_padding_mask,
            memory_key_padding_mask, tgt_is_causal, memory_is_causal,
        )  # fmt: skip
