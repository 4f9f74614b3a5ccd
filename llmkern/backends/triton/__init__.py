"""Triton kernels for NVIDIA GPUs, sm_80 and newer.

<op>.py: supports, forward, backward and the launches; importable without triton.
<op>_kernels.py: the @triton.jit kernels, imported at the first launch.
tiles_*.py: which tile sizes a call gets; data and pure functions, importable without triton.
"""

import torch

from llmkern.backends.triton import _launch


def status() -> tuple[bool, str]:
    """(usable here, the card or what is missing)."""
    version = _launch.version()
    if version is None:
        return False, "triton is not installed"
    if torch.cuda.is_available():
        return True, f"triton {version}, {torch.cuda.get_device_name()}"
    if _launch.unavailable("cpu") is None:
        how = "the interpreter" if _launch.interpreted() else "the emulator"
        return True, f"triton {version}, {how} on CPU tensors"
    return False, f"triton {version} is installed, but torch finds no CUDA device"
