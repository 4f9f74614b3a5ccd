"""ReLU, GELU and SiLU."""

import torch
from torch import Tensor

from llmkern import dispatch, functional
from llmkern.nn.modes import outside_modes
from llmkern.nn.table import replaces


@replaces(torch.nn.ReLU)
class ReLU(torch.nn.ReLU):
    """torch.nn.ReLU on `llmkern.functional.relu`; inplace=True stays torch's."""

    def forward(self, input: Tensor) -> Tensor:
        if self.inplace or dispatch.unserved(input):
            return torch.nn.ReLU.forward(self, input)
        return outside_modes(functional.relu, input)


@replaces(torch.nn.GELU)
class GELU(torch.nn.GELU):
    """torch.nn.GELU on `llmkern.functional.gelu`."""

    def forward(self, input: Tensor) -> Tensor:
        if dispatch.unserved(input):
            return torch.nn.GELU.forward(self, input)
        return outside_modes(functional.gelu, input, self.approximate)


@replaces(torch.nn.SiLU)
class SiLU(torch.nn.SiLU):
    """torch.nn.SiLU on `llmkern.functional.silu`; inplace=True stays torch's."""

    def forward(self, input: Tensor) -> Tensor:
        if self.inplace or dispatch.unserved(input):
            return torch.nn.SiLU.forward(self, input)
        return outside_modes(functional.silu, input)
