"""The GPU architecture that stands in for a device while kernels are emulated. A leaf.

`llmkern.emulator.device` sets it; the GPU backends read it: while it is set they serve CPU tensors.
Kernels that get bare addresses may touch the tensors that their backend has shown.
"""

from collections.abc import Callable

from torch import Tensor

_emulated: int | None = None
_shown: list[Tensor] = []
_load_cuda_runtime: Callable[[], object] | None = None


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


def provide_cuda_runtime(load: Callable[[], object]) -> None:
    """`load` maps a libcudart.so.13 into the process whose launches are emulated."""
    global _load_cuda_runtime
    _load_cuda_runtime = load


def load_cuda_runtime() -> bool:
    """Map the emulator's CUDA runtime; False where no emulator is imported.

    Raises:
        BackendError: it was not built, or does not load.
    """
    if _load_cuda_runtime is None:
        return False
    _load_cuda_runtime()
    return True
