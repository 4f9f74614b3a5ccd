"""LayerNorm and RMSNorm."""

import torch
from torch import Tensor

from llmkern import dispatch, functional
from llmkern.nn.modes import outside_modes, parameter
from llmkern.nn.table import replaces


@replaces(torch.nn.LayerNorm)
class LayerNorm(torch.nn.LayerNorm):
    """torch.nn.LayerNorm on `llmkern.functional.layer_norm`."""

    def forward(self, input: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            found = self._parameters  # without those that a parametrization computes
            if "weight" in found and "bias" in found:
                weight, bias = found["weight"], found["bias"]
                y = functional.repeat_norm(
                    "layer_norm", input, self.normalized_shape, weight, bias, self.eps
                )
                if y is not None:
                    return y
        weight, bias = parameter(self, "weight"), parameter(self, "bias")
        if dispatch.unserved(input, weight, bias):
            return torch.nn.LayerNorm.forward(self, input)
        return outside_modes(
            functional.layer_norm, input, self.normalized_shape, weight, bias, self.eps
        )


@replaces(torch.nn.RMSNorm)
class RMSNorm(torch.nn.RMSNorm):
    """torch.nn.RMSNorm on `llmkern.functional.rms_norm`."""

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling() and "weight" in self._parameters:
            weight = self._parameters["weight"]
            y = functional.repeat_norm("rms_norm", x, self.normalized_shape, weight, None, self.eps)
            if y is not None:
                return y
        weight = parameter(self, "weight")
        if dispatch.unserved(x, weight) or promotes(x, weight):
            return torch.nn.RMSNorm.forward(self, x)
        return outside_modes(functional.rms_norm, x, self.normalized_shape, weight, self.eps)


def promotes(x: Tensor, weight: Tensor | None) -> bool:
    """True for a pair of dtypes that torch's RMSNorm takes and the kernel does not, which wants
    one dtype, or a float32 weight beside a 16-bit x."""
    if weight is None or weight.dtype == x.dtype:
        return False
    return weight.dtype != torch.float32 or x.dtype == torch.float64
