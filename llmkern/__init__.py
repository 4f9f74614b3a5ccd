"""Fused attention, norm and GEMM kernels for PyTorch Transformers, as drop-in torch.nn modules."""

import importlib
import types

from llmkern import backends, dispatch, functional, nn
from llmkern.accelerate import accelerate
from llmkern.allocator import tune_allocator, untune_allocator
from llmkern.dispatch import fallback_policy, fallbacks, use_backend
from llmkern.explain import explain
from llmkern.override import override
from llmkern.version import __version__

__all__ = [
    "__version__",
    "accelerate",
    "backends",
    "explain",
    "fallback_policy",
    "fallbacks",
    "functional",
    "nn",
    "override",
    "tune_allocator",
    "untune_allocator",
    "use_backend",
]


class _CallablePackage(types.ModuleType):
    """`llmkern.backends` is the package of backends; called, it gives their status."""

    def __call__(self) -> list[dispatch.BackendStatus]:
        return dispatch.backends()


backends.__class__ = _CallablePackage


def __getattr__(name: str) -> types.ModuleType:
    """`llmkern.emulator` is loaded when it is asked for: training needs none of it."""
    if name == "emulator":
        return importlib.import_module("llmkern.emulator")
    raise AttributeError(f"module 'llmkern' has no attribute {name!r}")
