"""Loads llmkern._C_cuda, or says why not; where a launch goes; what becomes of its errors.

The kernels exist in two modules made of the same objects. _C_cuda holds the CUDA runtime and serves
CUDA tensors. _C_cuda_emulated leaves libcudart.so.13 open; under llmkern.emulator.device it is
loaded on top of the emulator's runtime and serves CPU tensors.
"""

import contextlib
import functools
import importlib
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from llmkern import target
from llmkern.errors import BackendError

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
OLDEST = 80  # compute capability * 10: bf16 mma and cp.async
INT32_MAX = 2**31 - 1
MAX_COLS = 65535 * 512  # grid dim y ends at 65535 blocks; those of linear_bwd have 512 floats


class Loaded(NamedTuple):
    """The extension, or None and the reason."""

    module: ModuleType | None
    reason: str | None


def _import(name: str) -> Loaded:
    try:
        return Loaded(importlib.import_module(f"llmkern.{name}"), None)
    except ModuleNotFoundError as missing:
        if missing.name != f"llmkern.{name}":
            raise
        return Loaded(
            None,
            f"llmkern.{name} was not built: it needs nvcc 13 (CUDA_HOME, PATH), "
            "or an install with LLMKERN_CUDA=on, which brings one",
        )
    except ImportError as error:
        return Loaded(None, f"llmkern.{name} does not load: {error}")


@functools.cache
def load() -> Loaded:
    """The module for CUDA tensors."""
    return _import("_C_cuda")


@functools.cache
def load_emulated() -> Loaded:
    """The module for CPU tensors under the emulator, on top of the emulator's CUDA runtime."""
    try:
        if not target.load_cuda_runtime():
            return Loaded(None, "llmkern.emulator, whose CUDA runtime it needs, is not imported")
    except BackendError as error:
        return Loaded(None, str(error))
    return _import("_C_cuda_emulated")


def unavailable(device: str) -> str | None:
    """Why the backend cannot serve tensors on `device` at all; None if it can."""
    if device == "cpu" and target.emulated():
        return load_emulated().reason
    if device != "cuda":
        return f"it serves cuda tensors, and {device} ones only under llmkern.emulator.device"
    if load().reason is None and torch.cuda.is_available():
        return _too_old() or _refused_by(torch.cuda.current_device())
    return load().reason


@functools.cache
def _too_old() -> str | None:
    """Of all cards: what serves a call is decided, and remembered, for "cuda" whichever it is."""
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        if major * 10 + minor < OLDEST:
            return f"its kernels need compute capability 8.0, card {index} has {major}.{minor}"
    return None


@functools.cache
def _refused_by(index: int) -> str | None:
    """Why a card cannot run the kernels: its driver or what they were compiled for. Only asked of
    the current one: it is then in use, which costs memory on the card."""
    try:
        load().module.require_kernels((index, 0))
    except RuntimeError as error:
        return f"its kernels cannot run on this card: {error}"
    return None


def refusal(device: str, *dtypes: torch.dtype) -> str | None:
    """Why tensors on `device` of these dtypes cannot be served; None if they can."""
    for dtype in dtypes:
        if dtype not in DTYPE_CODES:
            return f"it has no kernels for {str(dtype).removeprefix('torch.')}"
    return unavailable(device)


class Launch:
    """A module's functions on the device and the current stream of a tensor.

        with Launch(x, spec) as launch:
            launch.norm_fwd(shown(x), ...)

    Raises:
        BackendError: a launch failed; names the kernel, the call and what the runtime said.
    """

    def __init__(self, on: Tensor, spec: tuple) -> None:
        self.spec = spec
        self.guard = contextlib.nullcontext()
        if on.is_cuda:
            self.module = load().module
            self.place = (on.device.index, torch.cuda.current_stream(on.device).cuda_stream)
            if on.device.index != torch.cuda.current_device():
                self.guard = torch.cuda.device(on.device)
        else:
            self.module, self.place = load_emulated().module, (0, 0)

    def __enter__(self) -> "Launch":
        self.guard.__enter__()
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self.guard.__exit__(kind, error, traceback)
        target.hide_all()

    def __getattr__(self, name: str):
        function = getattr(self.module, name)

        def run(*arguments) -> None:
            try:
                function(self.place, *arguments)
            except RuntimeError as error:
                raise BackendError(f"cuda: {error} ({self.spec})") from error

        return run


def shown(t: Tensor | None) -> Tensor | None:
    """`t`, which until the Launch ends emulated kernels may touch. The bindings take the tensor
    itself, so that it lives until the call is over."""
    if t is not None and t.is_cpu:
        target.show(t)
    return t


def rows_of(t: Tensor, rows: int, cols: int) -> tuple[Tensor, int]:
    """`t` as [rows, cols] with column stride 1, and its row stride; a copy only if no view can."""
    if t.is_contiguous():
        return t, cols
    flat = t.reshape(rows, cols)
    if flat.stride(1) != 1 and cols > 1:
        flat = flat.contiguous()
    return flat, flat.stride(0)


def contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()
