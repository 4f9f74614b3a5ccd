"""Models as users write them: torch.nn and torch.nn.functional mixed, subclasses of their own."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MyAttention(nn.MultiheadAttention):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x, x, x, need_weights=False)[0]


class MyLinear(nn.Linear):
    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.02)
        nn.init.zeros_(self.bias)


class LayerNorm(nn.Module):
    """nanoGPT's: LayerNorm with an optional bias."""

    def __init__(self, size: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class CausalSelfAttention(nn.Module):
    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.c_attn = nn.Linear(size, 3 * size)
        self.c_proj = nn.Linear(size, size)
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.size()
        q, k, v = self.c_attn(x).split(c, dim=2)
        q, k, v = (y.view(b, t, self.heads, c // self.heads).transpose(1, 2) for y in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).contiguous().view(b, t, c))


class Block(nn.Module):
    def __init__(self, size: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(size, bias=False)
        self.attn = CausalSelfAttention(size, heads)
        self.ln_2 = LayerNorm(size, bias=True)
        self.c_fc = nn.Linear(size, 4 * size)
        self.c_proj = nn.Linear(4 * size, size)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        y = self.c_proj(F.gelu(self.c_fc(self.ln_2(x))))
        return x + (F.dropout(y, self.dropout, self.training) if self.dropout else y)


class NanoGPT(nn.Module):
    def __init__(self, vocabulary: int = 50, size: int = 16, heads: int = 2, dropout: float = 0.0):
        super().__init__()
        self.wte = nn.Embedding(vocabulary, size)
        self.wpe = nn.Embedding(64, size)
        self.h = nn.ModuleList(Block(size, heads, dropout) for _ in range(2))
        self.ln_f = LayerNorm(size, bias=True)

    def forward(self, idx: Tensor) -> Tensor:
        x = self.wte(idx) + self.wpe(torch.arange(idx.size(1), device=idx.device))
        for block in self.h:
            x = block(x)
        return F.linear(self.ln_f(x), self.wte.weight)
