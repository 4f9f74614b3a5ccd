"""Optional libraries, asked for where they are used and by name."""

from __future__ import annotations

import importlib
from types import ModuleType

from llmkern.errors import BackendError


def require(name: str, purpose: str) -> ModuleType:
    """Import `name`, or say what it is for and how to get it.

    Raises:
        BackendError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as missing:
        root = (missing.name or "").partition(".")[0]
        raise BackendError(
            f'{purpose} needs {root}, which is not installed: pip install "llmkern[bench]"'
        ) from missing
