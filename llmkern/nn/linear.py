"""Linear, with an activation in its epilogue on request."""

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Module
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from llmkern import dispatch, functional
from llmkern.errors import ArgumentError
from llmkern.nn.modes import outside_modes, parameter
from llmkern.nn.table import replaces

_ACTIVATIONS = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}


class _QConfig:
    """`qconfig`, which torch.ao.quantization sets on every module of a model. It finds those that
    it quantises by their exact class, so it passes over llmkern's: not without a word."""

    def __get__(self, module: Module | None, owner: type | None = None) -> object:
        if module is None:
            return self
        try:
            return module.__dict__["qconfig"]
        except KeyError:
            raise AttributeError("qconfig") from None

    def __set__(self, module: Module, value: object) -> None:
        warnings.warn(
            "torch.ao.quantization knows torch.nn.Linear, and leaves llmkern.nn.Linear as it is: "
            "call undo() of llmkern.accelerate's report first, or quantise before accelerate",
            stacklevel=4,  # past Module.__setattr__: where torch sets it
        )
        module.__dict__["qconfig"] = value

    def __delete__(self, module: Module) -> None:
        module.__dict__.pop("qconfig", None)


@replaces(torch.nn.Linear)
class Linear(torch.nn.Linear):
    """torch.nn.Linear on `llmkern.functional.linear`.

    activation: None, "relu", "gelu", "gelu_tanh" or "silu", applied while the output tile is still
    in registers.
    """

    fused_activation: str | None = None  # on the class: a replaced torch.nn.Linear has none
    qconfig = _QConfig()

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str | None = None,
    ) -> None:
        if activation is not None and activation not in _ACTIVATIONS:
            raise ArgumentError(
                f"Linear: activation must be None or one of {', '.join(_ACTIVATIONS)}, "
                f"got {activation!r}"
            )
        super().__init__(in_features, out_features, bias, device, dtype)
        if activation is not None:
            self.fused_activation = activation

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = parameter(self, "weight"), parameter(self, "bias")
        ours = isinstance(self, Linear)  # not where an undone module's forward has been kept
        if ours and not dispatch.unserved(input, weight, bias):
            return outside_modes(
                functional.linear, input, weight, bias, activation=self.fused_activation
            )
        output = torch.nn.Linear.forward(self, input)
        name = self.fused_activation if ours else None
        return output if name is None else _ACTIVATIONS[name](output)

    def extra_repr(self) -> str:
        text, name = super().extra_repr(), self.fused_activation
        return text if name is None else f"{text}, activation={name}"


@replaces(NonDynamicallyQuantizableLinear)
class OutProjection(NonDynamicallyQuantizableLinear):
    """The out_proj of MultiheadAttention, which reads its weight and bias and seldom calls it."""

    qconfig = _QConfig()

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias
        if dispatch.unserved(input, weight, bias):
            return NonDynamicallyQuantizableLinear.forward(self, input)
        return outside_modes(functional.linear, input, weight, bias)
