"""TransformerEncoderLayer and TransformerEncoder.

With norm_first (z is the residual stream, sublayers read its norms):

    a = self_attn(norm1(z));  n, z = norm2(z + dropout1(a)), the sum;  z = z + dropout2(ff(n))

else

    z = norm1(z + dropout1(self_attn(z)));  z = norm2(z + dropout2(ff(z)))

Each "sum and norm" is one pass, and the last residual of the first form is the epilogue of linear2.
"""

import functools

import torch
from torch import Tensor

from llmkern import dispatch
from llmkern.nn.attention import MultiheadAttention
from llmkern.nn.fusion import add_linear, add_norm, bypassable, feed_forward, ours
from llmkern.nn.masks import detect_causal, float_mask, sequence_length
from llmkern.nn.table import adopt, replaces

_BLOCKS = {
    name: getattr(torch.nn.TransformerEncoderLayer, name) for name in ("_sa_block", "_ff_block")
}


@replaces(torch.nn.TransformerEncoderLayer)
class TransformerEncoderLayer(torch.nn.TransformerEncoderLayer):
    """torch.nn.TransformerEncoderLayer with its residual additions, norms, activations and dropouts
    fused into the kernels beside them, in training and evaluation alike."""

    @functools.wraps(torch.nn.TransformerEncoderLayer.__init__)
    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        adopt(self)

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        if not ours(self, TransformerEncoderLayer, _BLOCKS) or dispatch.unserved(src):
            return torch.nn.TransformerEncoderLayer.forward(
                self, src, src_mask, src_key_padding_mask, is_causal
            )
        if self.norm_first:
            attended = self._attend(self.norm1(src), src_mask, src_key_padding_mask, is_causal)
            y, z = add_norm(attended, src, self.dropout1, self.norm2, prenorm=True)
            return add_linear(self.linear2, feed_forward(self, y), self.dropout2, z)
        attended = self._attend(src, src_mask, src_key_padding_mask, is_causal)
        y = add_norm(attended, src, self.dropout1, self.norm1)
        y = add_norm(self.linear2(feed_forward(self, y)), y, self.dropout2, self.norm2)
        return y

    def _attend(
        self, x: Tensor, mask: Tensor | None, padding: Tensor | None, is_causal: bool
    ) -> Tensor:
        if not bypassable(self.self_attn, (MultiheadAttention,)):  # what torch's layer hands on
            mask, padding = float_mask(mask, x.dtype), float_mask(padding, x.dtype)
        return self.self_attn(
            x,
            x,
            x,
            attn_mask=mask,
            key_padding_mask=padding,
            need_weights=False,
            is_causal=is_causal,
        )[0]


@replaces(torch.nn.TransformerEncoder)
class TransformerEncoder(torch.nn.TransformerEncoder):
    """torch.nn.TransformerEncoder without its nested-tensor detour.

    Where torch would take that detour (evaluation, key padding on the right, no mask) its output is
    0 at padded positions, before the final norm; so it is here.
    """

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        if (
            not ours(self, TransformerEncoder)
            or dispatch.unserved(src)
            or not all(bypassable(layer, (TransformerEncoderLayer,)) for layer in self.layers)
        ):
            return torch.nn.TransformerEncoder.forward(
                self, src, mask, src_key_padding_mask, is_causal
            )
        if is_causal is None:
            length = sequence_length(src, self.layers[0].self_attn.batch_first)
            is_causal = detect_causal(mask, length)
        output = src
        for layer in self.layers:
            output = layer(output, mask, src_key_padding_mask, is_causal)
        if self._zeroes_padding(src, mask, src_key_padding_mask):
            padding = float_mask(src_key_padding_mask, src.dtype) != 0
            output = output.masked_fill(padding[..., None], 0.0)
        return output if self.norm is None else self.norm(output)

    def _zeroes_padding(self, src: Tensor, mask: Tensor | None, padding: Tensor | None) -> bool:
        """The conditions of torch's TransformerEncoder.forward for nested tensors."""
        first = self.layers[0]
        if (
            padding is None
            or mask is not None
            or first.training
            or src.dim() != 3
            or not getattr(self, "use_nested_tensor", False)
            or not torch.backends.mha.get_fastpath_enabled()
            or torch.is_autocast_enabled()
        ):
            return False
        checked = getattr(self, "mask_check", True)
        if checked and torch.compiler.is_compiling():
            return False
        modules = (first.self_attn, first.self_attn.out_proj, first.norm1, first.norm2)
        modules += (first.linear1, first.linear2)
        if torch.is_grad_enabled() and (
            src.requires_grad
            or any(p.requires_grad for m in modules for p in m.parameters(recurse=False))
        ):
            return False
        keep = float_mask(padding, src.dtype) == 0
        return not checked or bool((keep[:, 1:] <= keep[:, :-1]).all())  # left-aligned
