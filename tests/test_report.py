"""The report of accelerate: what matters most stands first, containers not at all."""

import io

import pytest
import torch
import torch.nn.functional as F
from models import NanoGPT
from torch import nn

import llmkern

E, H = 16, 2


class Conv1D(nn.Module):
    """As GPT-2's linear layers are in Hugging Face's library."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x):
        return torch.addmm(self.bias, x.flatten(0, -2), self.weight).view(*x.shape[:-1], -1)


class Rotate(nn.Module):
    def forward(self, x):
        return x.roll(1)


class Block(nn.Module):
    """Only calls others."""

    def __init__(self):
        super().__init__()
        self.norm, self.up, self.rotate = nn.LayerNorm(E), Conv1D(E, 4 * E), Rotate()
        self.down = Conv1D(4 * E, E)

    def forward(self, x):
        return x + self.down(self.rotate(self.up(self.norm(x))))


class Attention(nn.Module):
    """Has no parameter of its own, but does the work between its projections itself."""

    def __init__(self):
        super().__init__()
        self.q = nn.Linear(E, E)

    def forward(self, x):
        return F.scaled_dot_product_attention(self.q(x), x, x)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(1000, E)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.attention = Attention()
        self.head = nn.Linear(E, 1000, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, idx):
        x = self.embedding(idx)
        for block in self.blocks:
            x = block(x)
        return self.head(self.attention(x))


def test_containers_are_not_listed():
    report = llmkern.accelerate(Model())
    assert {left.name for left in report.left} == {
        "embedding", "attention",
        *(f"blocks.{i}.{name}" for i in range(3) for name in ("up", "down", "rotate")),
    }  # fmt: skip
    assert {left.name for left in llmkern.accelerate(NanoGPT()).left} >= {"", "h.0", "h.1.attn"}
    assert not llmkern.accelerate(torch.compile(nn.Sequential(nn.Linear(E, E)))).left


@pytest.mark.parametrize("functional", [False, True])
def test_what_is_left_and_big_comes_first(functional):
    model = Model()
    report = llmkern.accelerate(model, functional=functional)
    products = 3 * 8 * E * E + E * E + 1000 * E
    parameters = sum(p.numel() for p in model.parameters())
    conv = 3 * (8 * E * E + 5 * E)
    lines = str(report).splitlines()
    assert lines[0] == "llmkern: 5 modules replaced, 11 left as they are"
    assert lines[1] == (
        f"     1 x torch.nn.Embedding left: no kernel for it ({1000 * E / parameters:.0%}".replace(
            "%", " % of parameters)"
        )
    )
    assert lines[2] == (
        f"     6 x Conv1D left: runs its own forward ({100 * conv / parameters:.0f} % of "
        f"parameters, {100 * 24 * E * E / products:.0f} % of weight FLOPs)"
    )
    assert lines[3].startswith("     2 x torch.nn.Linear -> llmkern.nn.Linear (1 % of parameters, ")
    assert lines[4] == "     3 x torch.nn.LayerNorm -> llmkern.nn.LayerNorm"
    assert {lines[5], lines[6]} == {
        "     3 x Rotate left: runs its own forward",
        "     1 x Attention left: runs its own forward",
    }
    if functional:
        assert lines[7] == "  rerouted: nothing"
    again = llmkern.accelerate(model, functional=functional)
    assert [left[::2] for left in again.left] == [left[::2] for left in report.left]


def test_a_model_of_nothing_has_a_report():
    for model in (nn.Sequential(), nn.LazyLinear(3)):
        assert "0 modules replaced" in str(llmkern.accelerate(model))


def test_the_table_has_names_and_shares():
    rich = pytest.importorskip("rich.console")
    model = Model()
    console = rich.Console(file=io.StringIO(), width=140)
    console.print(llmkern.accelerate(model))
    text = console.file.getvalue()
    assert "blocks.0.up" in text and "weight FLOPs" in text
