"""PTX modules and their launches, below Triton: text in, errors and counts out."""

import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from llmkern.emulator import _ext
from llmkern.errors import ArgumentError, LlmkernError

_FLOAT_FORMATS = {2: "e", 4: "f", 8: "d"}


class PtxError(LlmkernError, ValueError):
    """The text is no PTX, or holds an instruction that the emulator does not know."""


class EmulatorError(LlmkernError, RuntimeError):
    """What stopped a kernel.

    Attributes:
        check: "out of bounds", "misaligned", "shared race", "global race", "async copy in flight",
            "uninitialised shared memory", "uninitialised global memory", "unset register",
            "divergent collective", "divergent barrier", "divergent branch", "barrier deadlock",
            "instruction budget", "assertion", "trap", ...
        message: what happened, with the address as tensor + offset.
        kernel, source, line, text: where: "file.py:12", the PTX line and its text.
        other_source, other_line, other_text: the other access of a race.
        cta, warp, lane: who; -1 where it is not one warp or lane.
    """

    def __init__(self, report: dict[str, Any]):
        super().__init__(report["str"])
        self.check: str = report["check"]
        self.message: str = report["message"]
        self.kernel: str = report["kernel"]
        self.source: str = report["source"]
        self.line: int = report["line"]
        self.text: str = report["text"]
        self.other_source: str = report["other_source"]
        self.other_line: int = report["other_line"]
        self.other_text: str = report["other_text"]
        self.cta: tuple[int, int, int] = report["cta"]
        self.warp: int = report["warp"]
        self.lane: int = report["lane"]


class Options(NamedTuple):
    """What a launch checks, and how it runs."""

    bounds: bool = True
    uninitialised: bool = True
    races: bool = True
    global_races: bool = True
    counters: bool = True
    threads: int = 1
    seed: int = 0
    budget: int = 1 << 28


class Named(NamedTuple):
    """An argument under the name that reports give it."""

    name: str
    value: Any


def extent(tensor: torch.Tensor) -> int:
    """Bytes from a tensor's first element to past its last one."""
    if tensor.numel() == 0:
        return 0
    span = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return (span + 1) * tensor.element_size()


Row = tuple[str, int, int, int, int]


def tensor_row(name: str, tensor: torch.Tensor, written: torch.Tensor | None = None) -> Row:
    """A tensor as the extension takes it: name, address, bytes, bytes of an element, flags.

    The flags are 0 or the address of `written`, a byte for each element that stores set.
    """
    flags = 0 if written is None else written.data_ptr()
    return name, tensor.data_ptr(), extent(tensor), tensor.element_size(), flags


def pack(value: Any, size: int) -> bytes:
    """The bytes of one parameter of `size` bytes."""
    if isinstance(value, bytes):
        raw = value
    elif value is None:
        raw = bytes(size)
    elif isinstance(value, torch.Tensor):
        raw = struct.pack("<Q", value.data_ptr())
    elif isinstance(value, float):
        raw = struct.pack("<" + _FLOAT_FORMATS.get(size, "d"), value)
    elif hasattr(value, "data_ptr"):
        raw = struct.pack("<Q", value.data_ptr())
    else:
        raw = (int(value) & ((1 << 8 * size) - 1)).to_bytes(size, "little")
    if len(raw) != size:
        raise ArgumentError(f"a parameter of {size} bytes got {len(raw)} bytes")
    return raw


def _triple(v: int | Sequence[int]) -> tuple[int, int, int]:
    values = (v,) if isinstance(v, int) else tuple(int(x) for x in v)
    if not 1 <= len(values) <= 3 or min(values) < 0:
        raise ArgumentError(f"a grid or block has 1 to 3 sizes, got {v}")
    return (*values, 1, 1)[:3]


class Program:
    """A PTX module, parsed and decoded.

    Raises:
        PtxError: with the PTX line, for anything the emulator does not know.
    """

    def __init__(self, ptx: str):
        self.ptx = ptx
        extension = _ext.load()
        try:
            self._program = extension.Program(ptx)
        except extension.PtxError as error:
            raise PtxError(str(error)) from None

    def kernels(self) -> list[str]:
        """Names of the .entry functions."""
        return self._program.kernels()

    def describe(self, kernel: str) -> dict[str, Any]:
        """Parameters (name, offset, bytes), shared and local bytes, required threads."""
        return self._program.describe(kernel)

    def variables(self) -> dict[str, tuple[int, int]]:
        """Address and bytes of each .global and .const variable, by its PTX name."""
        return self._program.variables()

    def launch(
        self,
        kernel: str,
        grid: int | Sequence[int],
        block: int | Sequence[int],
        arguments: Sequence[Any] = (),
        *,
        shared_bytes: int = 0,
        memory: Sequence[Row] = (),
        options: Options | None = None,
    ) -> list[tuple]:
        """Run a kernel to its end; arguments as for run().

        Returns:
            Rows of counts, one for each instruction that ran; see Counters.
        """
        counts = self.run(
            kernel,
            grid,
            block,
            arguments,
            shared_bytes=shared_bytes,
            memory=memory,
            options=options,
        )
        return self.rows(kernel, counts)

    def rows(self, kernel: str, counts: torch.Tensor) -> list[tuple]:
        """What run() returned, joined with class, PTX line, text and source of what ran."""
        instructions = self._program.instructions(kernel)
        pairs = zip(instructions, counts.tolist(), strict=True)
        return [(*instruction, *row) for instruction, row in pairs if row[0] > 0]

    def run(
        self,
        kernel: str,
        grid: int | Sequence[int],
        block: int | Sequence[int],
        arguments: Sequence[Any] = (),
        *,
        shared_bytes: int = 0,
        memory: Sequence[Row] = (),
        options: Options | None = None,
    ) -> torch.Tensor:
        """Run a kernel to its end.

        Args:
            kernel: one of kernels().
            grid, block: sizes, 1 to 3 of them.
            arguments: a tensor, int, float, bytes or Named for each parameter. The kernel may touch
                the tensors' elements and nothing else.
            shared_bytes: dynamic shared memory.
            memory: further memory it may touch, as tensor_row() gives it; a tensor that is here and
                an argument too is known by the name given here.
            options: checks and order; defaults to Options().

        Returns:
            int64 [instructions, 7]: runs, lanes, bytes, sectors, ideal sectors, wavefronts, ideal
            wavefronts.

        Raises:
            EmulatorError: a check failed.
            ArgumentError: arguments that do not fit the parameters.
        """
        described = self.describe(kernel)
        parameters = described["parameters"]
        if len(arguments) != len(parameters):
            raise ArgumentError(f"{kernel} takes {len(parameters)} arguments, got {len(arguments)}")
        block_size, grid_size = _triple(block), _triple(grid)
        packed = bytearray(described["parameter_bytes"])
        known = list(memory)
        given = {row[1] for row in known if row[4]}
        for (name, offset, size), argument in zip(parameters, arguments, strict=True):
            if isinstance(argument, Named):
                name, argument = argument
            if isinstance(argument, torch.Tensor) and argument.data_ptr() not in given:
                known.append(tensor_row(name, argument))
            packed[offset : offset + size] = pack(argument, size)
        if 0 in grid_size:
            return torch.zeros(described["instructions"], 7, dtype=torch.int64)
        choices = (options or Options())._asdict()
        try:
            report, counts = self._program.launch(
                kernel, grid_size, block_size, shared_bytes, bytes(packed), known, choices
            )
        except ValueError as error:
            raise ArgumentError(f"{kernel}: {error}") from None
        if report is not None:
            raise EmulatorError(report)
        return torch.frombuffer(bytearray(counts), dtype=torch.int64).view(-1, 7)
