"""Libraries that nvcc built with --cudart=shared, run in the emulator.

    with llmkern.emulator.device("sm_80") as dev:
        library = llmkern.emulator.load_library("libkernels.so")
        dev.register(x), dev.register(y)              # what its kernels may touch
        library.scale(ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(y.data_ptr()), x.numel())

Build with `-gencode arch=compute_80,code=compute_80 --compress-mode=none -lineinfo`. A stand-in for
libcudart.so.13 (csrc/emulator/cudart) is loaded first, so the library's launches, copies and
allocations come here. cudaMalloc gives memory that kernels may touch; tensors are registered.

A launch that a check stops returns cudaErrorLaunchFailure to the library, and device() raises the
EmulatorError at its end unless `dev.raise_failure()` did before.
"""

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from llmkern import target
from llmkern.emulator import gpu
from llmkern.emulator.program import EmulatorError, Program, PtxError, Row, tensor_row
from llmkern.errors import ArgumentError, BackendError

STAND_IN = "libcudart.so.13"
_SUCCESS, _INVALID_VALUE, _INVALID_SYMBOL = 0, 1, 13
_INVALID_KERNEL_IMAGE, _LAUNCH_FAILURE = 200, 719


class _LaunchCall(ctypes.Structure):
    """LlmkernLaunch of csrc/emulator/cudart/hooks.h."""

    _fields_ = (
        ("ptx", ctypes.c_void_p),
        ("ptx_bytes", ctypes.c_size_t),
        ("kernel", ctypes.c_char_p),
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("shared_bytes", ctypes.c_uint64),
        ("arguments", ctypes.POINTER(ctypes.c_void_p)),
    )


class _FunctionInfo(ctypes.Structure):
    """LlmkernFunction."""

    _fields_ = (
        ("shared_bytes", ctypes.c_uint64),
        ("local_bytes", ctypes.c_uint64),
        ("max_threads", ctypes.c_int32),
    )


_LAUNCH = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(_LaunchCall))
_VARIABLE = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_char_p,
    ctypes.POINTER(ctypes.c_uint64),
)
_FUNCTION = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_char_p,
    ctypes.POINTER(_FunctionInfo),
)


class _Hooks(ctypes.Structure):
    """LlmkernHooks."""

    _fields_ = (
        ("capability", ctypes.c_int32),
        ("launch", _LAUNCH),
        ("variable", _VARIABLE),
        ("function", _FUNCTION),
    )


class StandIn(NamedTuple):
    """The loaded stand-in and the callbacks that it calls, which must stay alive."""

    library: ctypes.CDLL
    hooks: _Hooks


_programs: dict[tuple[int, int], Program] = {}


def _program(ptx: int, size: int) -> Program:
    """The program at an address of the stand-in, which keeps its images for ever."""
    if (ptx, size) not in _programs:
        _programs[ptx, size] = Program(ctypes.string_at(ptx, size).decode())
    return _programs[ptx, size]


def _fail(code: int, error: Exception) -> int:
    """Remember why, for the library's cudaGetErrorString and for the device."""
    gpu.current().failure = error
    stand_in().library.llmkern_cudart_set_detail(str(error).encode())
    return code


def _guarded(function: Callable[..., int]) -> Callable[..., int]:
    """An exception cannot pass through the library's C frames: it becomes an error code."""

    @functools.wraps(function)
    def run(*arguments) -> int:
        try:
            return function(*arguments)
        except EmulatorError as error:
            return _fail(_LAUNCH_FAILURE, error)
        except PtxError as error:
            return _fail(_INVALID_KERNEL_IMAGE, error)
        except ArgumentError as error:
            return _fail(_INVALID_VALUE, error)

    return run


@_guarded
def _launch(call) -> int:
    call = call.contents
    program, kernel = _program(call.ptx, call.ptx_bytes), call.kernel.decode()
    parameters = program.describe(kernel)["parameters"]
    arguments = [
        ctypes.string_at(call.arguments[i], size) for i, (_, _, size) in enumerate(parameters)
    ]
    shown = [tensor_row(f"tensor {list(t.shape)}", t) for t in target.shown()]
    gpu.current().launch(
        program,
        kernel,
        tuple(call.grid),
        tuple(call.block),
        arguments,
        shared_bytes=call.shared_bytes,
        memory=[*shown, *_allocations()],
    )
    return _SUCCESS


@_guarded
def _variable(ptx, size, name, out) -> int:
    found = _program(ptx, size).variables().get(name.decode())
    if found is None:
        return _INVALID_SYMBOL
    out[0] = found[0]
    return _SUCCESS


@_guarded
def _function(ptx, size, name, out) -> int:
    facts = _program(ptx, size).describe(name.decode())
    out[0] = _FunctionInfo(facts["static_shared"], facts["local_bytes"], facts["threads_max"])
    return _SUCCESS


def _allocations() -> list[Row]:
    """What the library got from cudaMalloc and has not freed."""
    list_of = stand_in().library.llmkern_cudart_allocations
    capacity = list_of(None, None, 0)
    begins, sizes = (ctypes.c_uint64 * capacity)(), (ctypes.c_uint64 * capacity)()
    count = min(capacity, list_of(begins, sizes, capacity))
    return [(f"cudaMalloc #{i}", begins[i], sizes[i], 1, 0) for i in range(count)]


def _mapped() -> list[Path]:
    """Files mapped into this process."""
    with open("/proc/self/maps") as maps:
        return [Path(line.split(maxsplit=5)[-1].strip()) for line in maps if "/" in line]


@functools.cache
def stand_in() -> StandIn:
    """Load libcudart's stand-in for this process, before anything that needs libcudart.so.13.

    Raises:
        BackendError: it was not built, or does not load.
    """
    path = Path(__file__).parents[1] / STAND_IN
    real = [p for p in _mapped() if p.name == STAND_IN and p != path]
    if real:
        raise BackendError(
            f"{real[0]} is loaded already, and launches would go there: emulate libraries in a "
            "process whose torch has no CUDA"
        )
    try:
        library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise BackendError(f"the emulator's CUDA runtime does not load: {error}") from error
    library.llmkern_cudart_allocations.restype = ctypes.c_size_t
    library.llmkern_cudart_set_detail.argtypes = (ctypes.c_char_p,)
    hooks = _Hooks(0, _LAUNCH(_launch), _VARIABLE(_variable), _FUNCTION(_function))
    gpu.on_change.append(_follow)
    made = StandIn(library, hooks)
    _install(made, target.emulated())
    return made


def _install(made: StandIn, capability: int | None) -> None:
    """Give the stand-in the emulated device, or take it away."""
    made.hooks.capability = capability or 0
    pointer = ctypes.byref(made.hooks) if capability else None
    made.library.llmkern_cudart_set_hooks(pointer)


def _follow(capability: int | None) -> None:
    _install(stand_in(), capability)


def load_library(path: str | Path) -> ctypes.CDLL:
    """Load a shared library that nvcc built with --cudart=shared; its launches run in the emulator.

    Raises:
        BackendError: the library or the stand-in does not load.
    """
    stand_in()
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise BackendError(f"{path} does not load: {error}") from error


target.provide_cuda_runtime(stand_in)
