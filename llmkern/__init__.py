"""Fused attention, norm and GEMM kernels for PyTorch Transformers, as drop-in torch.nn modules."""

from llmkern import functional
from llmkern.dispatch import fallback_policy, fallbacks, use_backend
from llmkern.version import __version__

__all__ = ["__version__", "fallback_policy", "fallbacks", "functional", "use_backend"]
