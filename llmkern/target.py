"""The GPU architecture that stands in for a device while kernels are emulated. A leaf.

`llmkern.emulator.device` sets it; the GPU backends read it: while it is set they serve CPU tensors.
"""

_emulated: int | None = None


def emulated() -> int | None:
    """Compute capability (major * 10 + minor) that is emulated now, or None."""
    return _emulated


def set_emulated(capability: int | None) -> int | None:
    """Set it and return what was set before."""
    global _emulated
    before, _emulated = _emulated, capability
    return before
