"""Loads llmkern._C_emulator."""

import functools
import importlib
from types import ModuleType

from llmkern.errors import BackendError


@functools.cache
def load() -> ModuleType:
    """The extension.

    Raises:
        BackendError: it is not built, or does not load.
    """
    try:
        return importlib.import_module("llmkern._C_emulator")
    except ImportError as error:
        raise BackendError(f"llmkern._C_emulator does not load: {error}") from error
