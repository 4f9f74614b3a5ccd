"""A GPT-like byte-level language model of nothing but torch.nn layers.

Radford et al., "Language Models are Unsupervised Multitask Learners", 2019: learned positions,
pre-norm blocks with GELU, a final norm. The blocks are torch.nn.TransformerEncoderLayer under a
causal mask, which is what a decoder-only model is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmkern.bench.workloads.corpus import VOCABULARY


@dataclass(frozen=True)
class GPTConfig:
    layers: int = 4
    d_model: int = 256
    heads: int = 4
    d_ff: int = 1024
    context: int = 256
    dropout: float = 0.0


class GPT(nn.Module):
    """Tokens int64 [B, S] to logits [B, S, 256]."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.token = nn.Embedding(VOCABULARY, config.d_model)
        self.position = nn.Embedding(config.context, config.d_model)
        self.dropout = nn.Dropout(config.dropout)
        layer = nn.TransformerEncoderLayer(
            config.d_model,
            config.heads,
            config.d_ff,
            config.dropout,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        self.blocks = nn.TransformerEncoder(
            layer, config.layers, norm=nn.LayerNorm(config.d_model), enable_nested_tensor=False
        )
        self.head = nn.Linear(config.d_model, VOCABULARY, bias=False)
        mask = nn.Transformer.generate_square_subsequent_mask(config.context)
        self.register_buffer("mask", mask, persistent=False)
        for table in (self.token, self.position):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        positions = torch.arange(length, device=tokens.device)
        x = self.dropout(self.token(tokens) + self.position(positions))
        x = self.blocks(x, mask=self.mask[:length, :length], is_causal=True)
        return self.head(x)
