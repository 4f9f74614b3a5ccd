"""The GPU architecture that stands in for a device while kernels are emulated. A leaf.

`llmkern.emulator.device` sets it; the GPU backends read it: while it is set they serve CPU tensors.
Kernels that get bare addresses may touch the tensors that their backend has shown.
"""

from torch import Tensor

_emulated: int | None = None
_shown: list[Tensor] = []


def emulated() -> int | None:
    """Compute capability (major * 10 + minor) that is emulated now, or None."""
    return _emulated


def set_emulated(capability: int | None) -> int | None:
    """Set it and return what was set before."""
    global _emulated
    before, _emulated = _emulated, capability
    return before


def show(tensor: Tensor) -> None:
    """Let the launches until `hide_all` touch a tensor that reaches them as an address."""
    _shown.append(tensor)


def shown() -> list[Tensor]:
    return _shown


def hide_all() -> None:
    _shown.clear()
