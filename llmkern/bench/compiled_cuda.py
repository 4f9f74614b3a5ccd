"""What ptxas made of the CUDA C++ kernels, beside compiled.py's Triton kernels.

Calls of the ops on the cuda backend name the forms. Under the emulator each tells which kernels it
launches, with how many threads and how much shared memory; they are not run. Their PTX, taken from
the extension, then goes through ptxas for a given architecture, as a driver would take it.
"""

from __future__ import annotations

import functools
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from llmkern import dispatch, emulator, functional
from llmkern.bench import compiled
from llmkern.bench.compiled import Compiled
from llmkern.emulator.gpu import Launch
from llmkern.errors import BackendError

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Rows, in, out: small tiles, large ones, and few of them with a long sum to share.
PRODUCTS = ((256, 256, 256), (2048, 2048, 2048), (64, 2048, 2048))
COLUMNS = (768, 1024, 1000, 1001, 4096, 65536)  # in whole lines or not; long
_ROWS = 256


class Form(NamedTuple):
    """A kernel as one call launches it."""

    op: str
    name: str  # "norm_fwd<bf16, bf16> 4096 columns"
    launch: Launch


def forms(capability: int) -> Iterator[Form]:
    """Each kernel that such a card runs, once for each number of threads and amount of shared
    memory.

    Raises:
        BackendError: the CUDA kernels or the emulator were not built.
    """
    status = _status()
    if status is not None:
        raise BackendError(f"kernels: {status}")
    seen = set()
    for op, words, call in _calls():
        for launch in _launches(call, capability):
            key = (launch.kernel, launch.block, launch.shared_bytes)
            if key not in seen:
                seen.add(key)
                yield Form(op, f"{readable(launch.kernel)} {words}", launch)


def _status() -> str | None:
    with emulator.device("sm_80"):
        return dispatch.status("cuda").detail if not dispatch.status("cuda").available else None


def _launches(call: Callable[[], torch.Tensor], capability: int) -> list[Launch]:
    """What a call and its backward launch."""
    found: list[Launch] = []
    with emulator.device(f"sm_{capability}") as dev, dispatch.use_backend("cuda"):
        dev.instead = found.append
        out = call()
        if out.requires_grad:
            out.backward(torch.zeros_like(out))
    return found


def _calls() -> Iterator[tuple[str, str, Callable[[], torch.Tensor]]]:
    """(op, what sets the call apart, the call), at sizes that make the kernels differ."""
    for dtype in DTYPES:
        for cols in COLUMNS:
            yield "norm", f"{cols} columns", functools.partial(_norm, dtype, cols)
            if dtype != torch.float32:  # a 16-bit branch on a float32 residual stream
                mixed = functools.partial(_add_norm, dtype, cols)
                yield "norm", f"{cols} columns, float32 residual", mixed
        if dtype != torch.float32:
            for dim in (64, 128):
                yield "attention", f"D{dim} causal", functools.partial(_attention, dtype, dim)
                some = functools.partial(_attention, dtype, dim, keys=_ROWS // 2)
                yield "attention", f"D{dim} causal, queries without keys", some
        for shape in PRODUCTS:
            words = "x".join(map(str, shape))
            yield "linear", f"{words} gelu", functools.partial(_linear, dtype, shape, False)
            yield "linear", f"{words} gated", functools.partial(_linear, dtype, shape, True)
    for shape in PRODUCTS:
        words = "x".join(map(str, shape))
        yield "linear", f"{words} tf32", functools.partial(_tf32_linear, shape)


def _leaf(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, requires_grad=True)


def _norm(dtype: torch.dtype, cols: int) -> torch.Tensor:
    x, weight = _leaf(_ROWS, cols, dtype=dtype), _leaf(cols, dtype=dtype)
    return functional.layer_norm(x, (cols,), weight, weight)


def _add_norm(dtype: torch.dtype, cols: int) -> torch.Tensor:
    x, residual = _leaf(_ROWS, cols, dtype=dtype), _leaf(_ROWS, cols, dtype=torch.float32)
    return functional.add_rms_norm(x, residual, (cols,), dropout_p=0.1)[0]


def _attention(dtype: torch.dtype, dim: int, keys: int = _ROWS) -> torch.Tensor:
    """The last query sees the last key; where there are fewer keys, the first queries see none."""
    q, k = _leaf(1, 2, _ROWS, dim, dtype=dtype), _leaf(1, 2, keys, dim, dtype=dtype)
    return functional.scaled_dot_product_attention(
        q, k, k, is_causal=True, causal_align="bottom_right"
    )


def _linear(dtype: torch.dtype, shape: tuple[int, int, int], gated: bool) -> torch.Tensor:
    rows, k, n = shape
    x, weight = _leaf(rows, k, dtype=dtype), _leaf(n, k, dtype=dtype)
    if gated:
        return functional.linear_gated(x, weight, weight)
    bias = _leaf(n, dtype=dtype)
    return functional.linear(x, weight, bias, activation="gelu", dropout_p=0.1)


def _tf32_linear(shape: tuple[int, int, int]) -> torch.Tensor:
    """Backward under the same setting: its products follow torch's switch too."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        y = _linear(torch.float32, shape, False)
        y.backward(torch.zeros_like(y))
    finally:
        torch.set_float32_matmul_precision(before)
    return y.detach()


_TYPES = {"f": "fp32", "NS_8BFloat16E": "bf16", "NS_7Float16E": "fp16"}
_ARGUMENT = re.compile(r"NS_8BFloat16E|NS_7Float16E|f|S\d*_|L[bi](\d+)E")


def readable(symbol: str) -> str:
    """norm_fwd<bf16, bf16> of a mangled name; the length before a name ends in a digit."""
    found = re.search(r"\d([a-z][a-z_]*)_kernel(?:I((?:NS_\d+\w*?E|f|S\d*_|L[bi]\d+E)+)E)?", symbol)
    if found is None:
        return symbol
    arguments, last = [], ""
    for argument in _ARGUMENT.finditer(found[2] or ""):
        # S_ and the like repeat a type that came before; our kernels name no more than one other.
        last = _TYPES.get(argument[0], last)
        arguments.append(last if argument[1] is None else argument[1])
    return found[1] + (f"<{', '.join(arguments)}>" if arguments else "")


def inspect(form: Form, capability: int) -> Compiled:
    """Assemble one kernel and read what came out.

    Raises:
        BackendError: ptxas or nvdisasm is missing or fails.
    """
    launch = form.launch
    registers, spill_bytes, cubin = _assembled(launch.program.ptx, launch.kernel, capability)
    counts = compiled.instructions(cubin, tool("nvdisasm"))
    threads = launch.block[0] * launch.block[1] * launch.block[2]
    warps = -(-threads // 32)
    programs = compiled.resident(capability, warps, registers, launch.shared_bytes)
    return compiled.row_of(
        counts,
        target=f"sm_{capability}",
        backend="cuda",
        op=form.op,
        kernel=form.name,
        num_warps=warps,
        num_stages=None,
        registers=registers,
        spill_bytes=spill_bytes,
        shared_bytes=launch.shared_bytes,
        programs=programs,
    )


@functools.cache
def tool(name: str) -> str:
    """The program on PATH, as nvcc comes with it, or the one in Triton's wheel that knows PTX of
    CUDA 13."""
    found = shutil.which(name)
    return found or compiled.triton_tool("ptxas-blackwell" if name == "ptxas" else name)


def _assembled(ptx: str, kernel: str, capability: int) -> tuple[int, int, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        source.write_text(ptx)
        registers, spill_bytes = compiled.ptxas_figures(
            [tool("ptxas"), "-v", "-lineinfo", f"--gpu-name=sm_{capability}", "--entry", kernel,
             str(source), "-o", str(cubin)]
        )  # fmt: skip
        return registers, spill_bytes, cubin.read_bytes()
