"""What a compiler made of the Triton kernels, without a GPU.

Each op of the Triton backend names the forms of its kernels (`compilations`). Here they go through
Triton and ptxas for a given architecture; registers, spills, shared memory, occupancy and the
instructions that matter are read from what comes out. The tools are those in Triton's own wheel.
Nothing here says how long a kernel runs.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from llmkern import dispatch
from llmkern.errors import ArgumentError, BackendError

OPS = ("norm", "attention", "linear", "dropout", "activation")


class Architecture(NamedTuple):
    """What one multiprocessor has (CUDA C++ Programming Guide, table of compute capabilities)."""

    threads: int
    programs: int
    shared_bytes: int  # of a multiprocessor
    shared_bytes_program: int  # of one program, opted in


REGISTERS = 65536  # of a multiprocessor, on all of these
REGISTERS_WARP_UNIT = 256  # a warp's registers are a multiple of this
SHARED_RESERVED_BYTES = 1024  # the system's, in each program
TENSOR_MEMORY_COLUMNS = 512

ARCHITECTURES = {
    80: Architecture(2048, 32, 164 << 10, 163 << 10),
    86: Architecture(1536, 16, 100 << 10, 99 << 10),
    89: Architecture(1536, 24, 100 << 10, 99 << 10),
    90: Architecture(2048, 32, 228 << 10, 227 << 10),
    100: Architecture(2048, 32, 228 << 10, 227 << 10),
    120: Architecture(1536, 24, 100 << 10, 99 << 10),
}

# Opcodes as nvdisasm writes them, by what they tell.
TENSOR = re.compile(r"(HMMA|IMMA|QMMA|OMMA|DMMA|[HIQ]GMMA|UTC\w*MMA)\b")
ASYNC_COPY = re.compile(r"(LDGSTS|UTMALDG|UTMASTG|UBLKCP)\b")
LOAD_16 = re.compile(r"LDG(STS)?\..*\b128\b")
STORE_16 = re.compile(r"STG\..*\b128\b")
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)


@dataclass(frozen=True)
class Compiled:
    """One kernel, compiled for one architecture. Counts of instructions are static, in SASS."""

    target: str
    backend: str
    op: str
    kernel: str
    num_warps: int
    num_stages: int | None  # None: written into the kernel
    registers: int  # a thread
    spill_bytes: int  # stores and loads of all threads' spilled registers, per thread
    shared_bytes: int
    occupancy: float  # resident warps over the most there can be
    programs: int  # resident on one multiprocessor
    instructions: int
    tensor: int
    async_copies: int
    loads_16: int  # 16-byte global loads, to registers or straight to shared memory
    stores_16: int

    def row(self) -> dict[str, Any]:
        return asdict(self)


def capability_of(target: str) -> int:
    """90 for "sm_90".

    Raises:
        ArgumentError: it is not one of ARCHITECTURES.
    """
    known = {f"sm_{capability}": capability for capability in ARCHITECTURES}
    if target not in known:
        raise ArgumentError(f"kernels: target must be one of {', '.join(known)}, got {target!r}")
    return known[target]


def forms(capability: int) -> Iterator[tuple[str, Any]]:
    """(op, compilation) of every form that the Triton backend names."""
    for op in OPS:
        module = dispatch.module_of("triton", op)
        if module is not None:
            for compilation in module.compilations(capability):
                yield op, compilation


def inspect(op: str, form: Any, capability: int) -> Compiled:
    """Compile one form and read what came out.

    Raises:
        BackendError: triton or one of its tools is missing, or its interpreter is on.
    """
    built = _build(form, capability)
    registers, spill_bytes, _ = _assembled(built.asm["ptx"], capability)
    counts = instructions(built.asm["cubin"], triton_tool("nvdisasm"))
    metadata = built.metadata
    programs = resident(
        capability,
        metadata.num_warps,
        registers,
        metadata.shared,
        getattr(metadata, "tmem_size", None) or 0,
    )
    return row_of(
        counts,
        target=f"sm_{capability}",
        backend="triton",
        op=op,
        kernel=form.name,
        num_warps=metadata.num_warps,
        num_stages=form.num_stages,
        registers=registers,
        spill_bytes=spill_bytes,
        shared_bytes=metadata.shared,
        programs=programs,
    )


def row_of(counts: Counter[str], *, target: str, num_warps: int, programs: int, **known: Any):
    """The row of a kernel whose opcodes were counted."""
    most = ARCHITECTURES[capability_of(target)].threads // 32
    return Compiled(
        target=target,
        num_warps=num_warps,
        programs=programs,
        occupancy=programs * num_warps / most,
        instructions=sum(n for name, n in counts.items() if name != "NOP"),
        tensor=_matching(counts, TENSOR),
        async_copies=_matching(counts, ASYNC_COPY),
        loads_16=_matching(counts, LOAD_16),
        stores_16=_matching(counts, STORE_16),
        **known,
    )


class Code(NamedTuple):
    """What ptxas makes of PTX."""

    registers: int
    spill_bytes: int
    instructions: int


def assemble(ptx: str, capability: int) -> Code:
    """Assemble PTX that Triton wrote.

    Raises:
        BackendError: triton or one of its tools is missing.
    """
    registers, spill_bytes, cubin = _assembled(ptx, capability)
    counts = instructions(cubin, triton_tool("nvdisasm"))
    return Code(registers, spill_bytes, counts.total() - counts["NOP"])


def resident(
    capability: int, num_warps: int, registers: int, shared_bytes: int, tensor_columns: int = 0
) -> int:
    """Programs that one multiprocessor holds at a time."""
    limits = ARCHITECTURES[capability]
    of_warp = -(-32 * registers // REGISTERS_WARP_UNIT) * REGISTERS_WARP_UNIT
    found = [
        limits.programs,
        limits.threads // (32 * num_warps),
        REGISTERS // (num_warps * max(1, of_warp)),
        limits.shared_bytes // (shared_bytes + SHARED_RESERVED_BYTES),
    ]
    if tensor_columns:
        found.append(TENSOR_MEMORY_COLUMNS // tensor_columns)
    return min(found)


def _triton() -> Any:
    try:
        import triton.compiler
        import triton.runtime.jit
    except ModuleNotFoundError as missing:
        raise BackendError(f"kernels: {missing.name} is not installed") from missing
    return triton


def _build(form: Any, capability: int) -> Any:
    """Triton's CompiledKernel."""
    triton = _triton()
    kernel = form.kernel()
    if not isinstance(kernel, triton.runtime.jit.JITFunction):
        raise BackendError("kernels: TRITON_INTERPRET is set; kernels are compiled only without it")
    names = kernel.arg_names
    place = {name: (number,) for number, name in enumerate(names)}
    source = triton.compiler.ASTSource(
        kernel,
        {name: form.signature[name] for name in names},
        {place[name]: value for name, value in form.constexprs.items()},
        {place[name]: [["tt.divisibility", 16]] for name in form.divisible},
    )
    card = triton.backends.compiler.GPUTarget("cuda", capability, 32)
    options = {"num_warps": form.num_warps, "num_stages": form.num_stages}
    options["enable_fp_fusion"] = form.fuse
    return triton.compile(source, target=card, options=options)


def triton_tool(name: str) -> str:
    """Path of one of the programs in Triton's wheel."""
    path = Path(_triton().__file__).parent / "backends" / "nvidia" / "bin" / name
    if not path.exists():
        raise BackendError(f"kernels: {name} is missing: triton's wheel should have it at {path}")
    return str(path)


def _run(command: list[str]) -> tuple[str, str]:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BackendError(f"kernels: {' '.join(command)} failed: {done.stderr.strip()}")
    return done.stdout, done.stderr


def _assembled(ptx: str, capability: int) -> tuple[int, int, bytes]:
    """(registers, spill bytes, cubin), the first two as `ptxas -v` tells them under the flags that
    Triton gives it. The register count of the finished file alone would not show spills."""
    ptxas = triton_tool("ptxas-blackwell" if capability >= 100 else "ptxas")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        chip = f"sm_{capability}{'a' if capability >= 90 else ''}"
        registers, spill_bytes = ptxas_figures(
            [ptxas, "-v", "-lineinfo", "--regAllocOptLevel=2", f"--gpu-name={chip}",
             str(source), "-o", str(source.with_suffix(".cubin"))])  # fmt: skip
        return registers, spill_bytes, source.with_suffix(".cubin").read_bytes()


def ptxas_figures(command: list[str]) -> tuple[int, int]:
    """(registers, spill bytes) as a run of `ptxas -v` on one kernel tells them."""
    _, log = _run(command)
    registers = re.search(r"Used (\d+) registers", log)
    if registers is None:
        raise BackendError(f"kernels: ptxas said nothing of registers: {log.strip()}")
    return int(registers[1]), sum(map(int, re.findall(r"(\d+) bytes spill", log)))


def instructions(cubin: bytes, nvdisasm: str) -> Counter[str]:
    """How often each opcode, with its modifiers, stands in the code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        listing, _ = _run([nvdisasm, "-c", file.name])
    return Counter(_INSTRUCTION.findall(listing))


def _matching(counts: Counter[str], pattern: re.Pattern[str]) -> int:
    return sum(n for name, n in counts.items() if pattern.match(name))
