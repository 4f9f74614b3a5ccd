"""CUDA C++ kernels for NVIDIA GPUs (csrc/cuda), sm_80 and newer, built by nvcc.

Importing this needs neither a GPU nor a driver. A call on a machine that lacks one fails with the
kernel's name and what the CUDA runtime says.
"""

import torch

from llmkern.backends.cuda import _ext


def status() -> tuple[bool, str]:
    """(usable here, the card or what is missing)."""
    if torch.cuda.is_available():
        reason = _ext.unavailable("cuda")
        return reason is None, reason or torch.cuda.get_device_name()
    if _ext.target.emulated():
        reason = _ext.unavailable("cpu")
        return reason is None, reason or "the emulator on CPU tensors"
    reason = _ext.load().reason
    return False, reason or "llmkern._C_cuda is built, but torch finds no CUDA device"
