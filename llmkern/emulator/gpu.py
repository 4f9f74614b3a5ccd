"""The emulated device: which architecture, which checks, what its launches counted."""

import contextlib
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from llmkern import target
from llmkern.emulator.counters import Counters
from llmkern.emulator.program import Options, Program, Row, tensor_row
from llmkern.errors import ArgumentError

# Bytes of shared memory that a CTA may ask for.
MAX_SHARED = {
    80: 163 * 1024,
    86: 99 * 1024,
    87: 163 * 1024,
    89: 99 * 1024,
    90: 227 * 1024,
    100: 227 * 1024,
    120: 99 * 1024,
}

_stack: list["Device"] = []
# Called with the capability that is emulated from now on, or None.
on_change: list[Callable[[int | None], None]] = []


class Launch(NamedTuple):
    """A launch as `Device.instead` is given it."""

    program: Program
    kernel: str
    block: tuple[int, ...]
    shared_bytes: int


class Device:
    """An emulated GPU. Made by device(); launches on it add to its counters."""

    def __init__(self, capability: int, options: Options):
        self.capability = capability
        self.options = options
        self.max_shared_bytes = MAX_SHARED[capability]
        self._counts: dict[tuple[str, Program], tuple[int, torch.Tensor]] = {}
        self._memory: dict[int, tuple[str, torch.Tensor, torch.Tensor | None]] = {}
        self.instead: Callable[[Launch], None] | None = None  # what launches do and do not run
        self.printed = ""  # by printf and tl.device_print, since the device was made
        self.failure: Exception | None = None  # of a launch by a library, which saw an error code

    def register(self, tensor: torch.Tensor, name: str = "registered") -> torch.Tensor:
        """Let kernels touch a tensor that reaches them in another way than as an argument."""
        self._memory[tensor.data_ptr()] = (name, tensor, None)
        return tensor

    def empty(
        self, *size: int, dtype: torch.dtype = torch.float32, name: str = "empty"
    ) -> torch.Tensor:
        """A CPU tensor that nothing has written: kernels that read it first are stopped.

        Its bytes are 0xff: NaN in every float dtype. unwritten() tells what no kernel has written.
        Not followed in kernels that compare-and-swap global memory.
        """
        tensor = torch.zeros(size, dtype=dtype)
        tensor.view(torch.uint8).fill_(255) if tensor.dim() else tensor.fill_(-1)
        flags = torch.zeros(tensor.numel(), dtype=torch.uint8)
        self._memory[tensor.data_ptr()] = (name, tensor, flags)
        return tensor

    def unwritten(self, tensor: torch.Tensor) -> int:
        """Elements of a tensor made by empty() that no kernel has stored to."""
        flags = self._memory.get(tensor.data_ptr(), ("", tensor, None))[2]
        if flags is None:
            raise ArgumentError("unwritten() is about tensors made by empty()")
        return int((flags == 0).sum())

    def raise_failure(self) -> None:
        """Raise what stopped the last launch that a library made, once.

        Raises:
            EmulatorError, PtxError, ArgumentError: as the launch did.
        """
        failure, self.failure = self.failure, None
        if failure is not None:
            raise failure

    def launch(
        self,
        program: Program,
        kernel: str,
        grid: int | Sequence[int],
        block: int | Sequence[int],
        arguments: Sequence[Any],
        *,
        shared_bytes: int = 0,
        memory: Sequence[Row] = (),
    ) -> None:
        """Program.run with this device's options; counts are kept.

        Raises:
            EmulatorError: a check failed.
        """
        if shared_bytes > self.max_shared_bytes:
            limit = f"sm_{self.capability} has {self.max_shared_bytes}"
            raise ArgumentError(f"{kernel}: {shared_bytes} bytes of shared memory, {limit}")
        if self.instead is not None:
            block = (block,) if isinstance(block, int) else tuple(block)
            return self.instead(Launch(program, kernel, block, shared_bytes))
        known = [tensor_row(*entry) for entry in self._memory.values()]
        launches, counts = self._counts.get((kernel, program), (0, None))
        counts = program.run(
            kernel,
            grid,
            block,
            arguments,
            shared_bytes=shared_bytes,
            memory=[*known, *memory],
            options=self.options,
            counts=counts,
            output=self._print,
        )
        self._counts[kernel, program] = launches + 1, counts

    def _print(self, text: str) -> None:
        self.printed += text
        sys.stdout.write(text)

    def counters(self, kernel: str | None = None) -> Counters:
        """What launches counted since the device was made or reset: of one kernel, or of all."""
        total = Counters()
        for (name, program), (launches, counts) in self._counts.items():
            if kernel is None or kernel == name:
                total.add_launches(launches, program.rows(name, counts))
        return total

    def kernels(self) -> list[str]:
        """Names of the kernels that ran."""
        return list(dict.fromkeys(name for name, _ in self._counts))

    def programs(self, kernel: str) -> list[Program]:
        """The programs of that kernel that ran: one for each form that was compiled."""
        return [program for name, program in self._counts if name == kernel]

    def reset_counters(self) -> None:
        self._counts.clear()

    def report(self, sources: int = 10) -> str:
        """A text: the counters of each kernel that ran, with its busiest source lines."""
        parts = [
            f"{kernel}: {c.launches} launches on the emulated sm_{self.capability}\n"
            + c.table(sources)
            for kernel in self.kernels()
            for c in [self.counters(kernel)]
        ]
        return "\n\n".join(parts) or "nothing was launched"


def current() -> Device:
    """The innermost device() that is open.

    Raises:
        ArgumentError: there is none.
    """
    if not _stack:
        raise ArgumentError(
            "a kernel compiled for the emulator runs inside llmkern.emulator.device"
        )
    return _stack[-1]


@contextlib.contextmanager
def device(
    architecture: str = "sm_80",
    *,
    bounds: bool = True,
    uninitialised: bool = True,
    races: bool = True,
    warp_races: bool = True,
    global_races: bool = True,
    async_copies: bool = True,
    collectives: bool = True,
    counters: bool = True,
    threads: int | None = None,
    seed: int = 0,
    budget: int = 1 << 28,
) -> Iterator[Device]:
    """Kernels launched inside run on an emulated GPU, on CPU tensors.

    Args:
        architecture: "sm_80", "sm_86", "sm_89", "sm_90", "sm_100" or "sm_120"; of the instructions
            that came with sm_90 and later only some are known.
        bounds: stop at accesses outside the arguments' tensors, and misaligned ones. Shared and
            local memory are always checked.
        uninitialised: stop at reads of shared memory and uses of registers that nothing has set.
        races: stop at unordered accesses of two warps to shared memory.
        warp_races: the same for two lanes of one warp, between which __syncwarp is missing.
        global_races: stop where two CTAs touch one element, one of them storing another value, and
            no atomics, with releases or fences before them, order the two.
        async_copies: stop where bytes are touched that a cp.async has under way.
        collectives: stop at shfl, mma, bar ... that not all lanes reach; off, those that are there
            go on.
        counters: count sectors and wavefronts (warp instructions are always counted).
        threads: host threads, torch.get_num_threads() by default. Results and reports do not
            depend on it.
        seed: other than 0: CTAs and warps run in an order shuffled by it.
        budget: warp instructions after which a warp is stopped.

    Raises:
        ArgumentError: unknown architecture.
    """
    found = re.fullmatch(r"sm_(\d+)a?", architecture)
    capability = int(found.group(1)) if found else 0
    if capability not in MAX_SHARED:
        known = ", ".join(f"sm_{c}" for c in MAX_SHARED)
        raise ArgumentError(f"architecture must be one of {known}, got {architecture!r}")
    options = Options(
        bounds,
        uninitialised,
        races,
        warp_races,
        global_races,
        async_copies,
        collectives,
        counters,
        threads or torch.get_num_threads(),
        seed,
        budget,
    )
    dev = Device(capability, options)
    _stack.append(dev)
    before = _switch(capability)
    try:
        with _triton():
            yield dev
    finally:
        _stack.pop()
        _switch(before)
    dev.raise_failure()


def _switch(capability: int | None) -> int | None:
    """Emulate another architecture, or none; returns what was emulated before."""
    before = target.set_emulated(capability)
    for tell in on_change:
        tell(capability)
    return before


def _triton() -> contextlib.AbstractContextManager:
    """Triton's driver replaced, where triton is installed."""
    try:
        from llmkern.emulator import triton_driver
    except ModuleNotFoundError as missing:
        if missing.name != "triton":
            raise
        return contextlib.nullcontext()
    return triton_driver.installed()
