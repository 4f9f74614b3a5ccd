"""Triton on the emulator: a driver that takes PTX as the binary and launches it here.

Triton asks its active driver for a target, a launcher and a loader, and its backend for the stages
of a compilation; both are replaced while installed() is open, so that compilation stops at PTX.
"""

import contextlib
import struct
from collections.abc import Iterator
from typing import Any

import torch
import triton
from triton.backends import Backend
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.backends.nvidia.driver import expand_signature, make_tensordesc_arg
from triton.runtime import _allocation

from llmkern.emulator import gpu
from llmkern.emulator.program import Named, Program
from llmkern.errors import ArgumentError

WARP = 32
MAX_THREADS = 1024


class PtxBackend(CUDABackend):
    """Triton's CUDA backend with PTX as its product."""

    def __init__(self, target: GPUTarget):
        super().__init__(target)
        self.binary_ext = "ptx"

    def add_stages(self, stages, options, language):
        super().add_stages(stages, options, language)
        stages.pop("cubin")

    def hash(self):
        return super().hash() + "-emulator"


class Loaded:
    """A loaded kernel: what Triton's launch passes back as the function."""

    def __init__(self, name: str, ptx: bytes | str):
        self.name = name
        self.program = Program(ptx.decode() if isinstance(ptx, bytes) else ptx)


class Utils:
    """The part of the driver that loads binaries and knows the card."""

    def get_device_properties(self, name: str) -> dict[str, int]:
        return {"max_shared_mem": gpu.MAX_SHARED[int(name.removeprefix("emulated sm_"))]}

    def load_binary(self, name, kernel, shared, name_of_device):
        loaded = Loaded(name, kernel)
        return loaded, loaded, 0, 0, MAX_THREADS


def _flatten(signature: Any, value: Any, name: str, out: list[tuple[str, str, Any]]) -> None:
    """(type, name, value) of each kernel argument: tuples opened, constants dropped."""
    if isinstance(signature, tuple):
        for i, (inner, part) in enumerate(zip(signature, value, strict=True)):
            _flatten(inner, part, f"{name}[{i}]", out)
    elif signature.startswith("tensordesc"):
        inner = expand_signature([signature], None)
        for kind, part in zip(inner, make_tensordesc_arg(value, None), strict=True):
            out.append((kind, name, part))
    elif signature != "constexpr":
        out.append((signature, name, value))


def _float_bits(kind: str, value: float) -> bytes:
    if kind == "bf16":
        bits = torch.tensor(value, dtype=torch.bfloat16).view(torch.int16).item()
        return struct.pack("<h", bits)
    return struct.pack({"fp16": "<e", "fp32": "<f", "f32": "<f", "fp64": "<d"}[kind], value)


class Launcher:
    """Called by Triton for each launch of one compiled kernel."""

    def __init__(self, src, metadata):
        self.names = list(src.fn.arg_names) if hasattr(src, "fn") else list(src.signature)
        self.signature = list(src.signature.values())
        self.metadata = metadata
        # (type, name, position) of the kernel's arguments, if they come one by one.
        self.plain = [
            (kind, name, i)
            for i, (kind, name) in enumerate(zip(self.signature, self.names, strict=True))
            if kind != "constexpr"
        ]
        if any(isinstance(kind, tuple) or kind.startswith("tensordesc") for kind, *_ in self.plain):
            self.plain = None

    def __call__(
        self,
        grid_x,
        grid_y,
        grid_z,
        stream,
        function,
        packed_metadata,
        launch_metadata,
        enter_hook,
        exit_hook,
        *args,
    ):
        flat: list[tuple[str, str, Any]] = []
        if self.plain is not None:
            flat = [(kind, name, args[i]) for kind, name, i in self.plain]
        else:
            for kind, name, value in zip(self.signature, self.names, args, strict=True):
                _flatten(kind, value, name, flat)
        arguments = [Named(name, self._argument(kind, value)) for kind, name, value in flat]
        ctas = grid_x * grid_y * grid_z
        arguments.append(Named("global scratch", self._scratch("global", ctas)))
        arguments.append(Named("profile scratch", self._scratch("profile", ctas)))
        if enter_hook is not None:
            enter_hook(launch_metadata)
        gpu.current().launch(
            function.program,
            function.name,
            (grid_x, grid_y, grid_z),
            self.metadata.num_warps * WARP,
            arguments,
            shared_bytes=self.metadata.shared,
        )
        if exit_hook is not None:
            exit_hook(launch_metadata)

    @staticmethod
    def _argument(kind: str, value: Any) -> Any:
        if kind.startswith("*"):
            return getattr(value, "base", value) if not isinstance(value, torch.Tensor) else value
        if kind in ("fp16", "bf16", "fp32", "f32", "fp64"):
            return _float_bits(kind, float(value))
        if kind[0] not in "iu":
            raise ArgumentError(f"arguments of type {kind} are not emulated")
        return int(value)

    def _scratch(self, which: str, ctas: int) -> torch.Tensor | None:
        size = getattr(self.metadata, f"{which}_scratch_size") * ctas
        if size == 0:
            return None
        if which == "profile":
            return torch.zeros(size, dtype=torch.uint8)
        align = self.metadata.global_scratch_align
        buffer = _allocation._allocator.get()(size, align, 0)
        if not isinstance(buffer, torch.Tensor):
            raise ArgumentError("triton.set_allocator must give tensors")
        return buffer


class Driver:
    """What Triton asks of an active driver."""

    launcher_cls = Launcher

    def __init__(self, capability: int):
        self.capability = capability
        self.utils = Utils()

    def get_current_device(self) -> str:
        # Triton keys its caches by device: each architecture is a device of its own.
        return f"emulated sm_{self.capability}"

    def set_current_device(self, name: str) -> None:
        pass

    def get_current_stream(self, name: str) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, WARP)

    def get_device_capability(self, name: str | None = None) -> tuple[int, int]:
        return divmod(self.capability, 10)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, kind: str) -> str:
        from triton.backends.nvidia.driver import ty_to_cpp

        return ty_to_cpp(kind)

    def get_benchmarker(self):
        """What autotuning compares: instructions, sectors and wavefronts."""

        def benchmark(call, *, quantiles=(0.5,), **_):
            dev = gpu.current()
            before = _cost(dev)
            call()
            cost = _cost(dev) - before
            return [cost] * len(quantiles)

        return benchmark


def _cost(dev: "gpu.Device") -> float:
    total = dev.counters().total
    return total.instructions + 2.0 * total.sectors + 1.0 * total.wavefronts


@contextlib.contextmanager
def installed() -> Iterator[None]:
    """Triton compiles to PTX and launches on gpu.current() inside."""
    backends, config = triton.backends.backends, triton.runtime.driver
    backend, driver = backends["nvidia"], config._active
    backends["nvidia"] = Backend(PtxBackend, backend.driver)
    config.set_active(Driver(gpu.current().capability))
    try:
        yield
    finally:
        backends["nvidia"] = backend
        config._active = driver
