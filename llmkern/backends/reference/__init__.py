"""Plain torch, on every device and in float64: what the other backends are checked against."""

import torch


def status() -> tuple[bool, str]:
    """(usable here, what it runs on)."""
    return True, f"torch {torch.__version__}"
