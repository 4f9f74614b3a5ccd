"""A corpus that every machine with Python has: the sources of the standard library, as bytes."""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

VOCABULARY = 256
_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "__pycache__", "idlelib"}


def load(limit_bytes: int = 4 * 2**20) -> Tensor:
    """The first `limit_bytes` of the .py files, folder by folder in order of name, uint8 [N].

    Raises:
        FileNotFoundError: this Python has no sources on disk (a frozen or zipped library).
    """
    root = sysconfig.get_path("stdlib")
    text = bytearray()
    for path in _sources(root):
        text += path.read_bytes()
        if len(text) >= limit_bytes:
            break
    if not text:
        raise FileNotFoundError(f"no .py files under {root}")
    return torch.frombuffer(text[:limit_bytes], dtype=torch.uint8)


def _sources(root: str) -> Iterator[Path]:
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(set(folders) - _LEFT_OUT)  # os.walk follows what is left
        for name in sorted(files):
            if name.endswith(".py"):
                yield Path(folder, name)


def batch(corpus: Tensor, batch_size: int, context: int, seed: int) -> tuple[Tensor, Tensor]:
    """(inputs, targets), int64 [batch_size, context], at random places decided by `seed`."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(corpus) - context - 1, (batch_size,), generator=generator)
    windows = corpus[starts[:, None] + torch.arange(context + 1)].long()
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
