"""Dropout."""

import torch
from torch import Tensor

from llmkern import dispatch, functional
from llmkern.nn.modes import outside_modes
from llmkern.nn.table import replaces


@replaces(torch.nn.Dropout)
class Dropout(torch.nn.Dropout):
    """torch.nn.Dropout on `llmkern.functional.dropout`: the same law, another random mask."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or dispatch.unserved(input):
            return torch.nn.Dropout.forward(self, input)
        return outside_modes(functional.dropout, input, self.p, True, self.inplace)
