"""Small PTX kernels for the emulator's tests: text around a few instructions, and their launch."""

import torch

from llmkern.emulator import Program
from llmkern.emulator.program import Options

HEADER = ".version 8.7\n.target sm_100a\n.address_size 64\n"
REGISTERS = """
  .reg .pred %p<16>;
  .reg .b16 %h<32>;
  .reg .b32 %r<64>;
  .reg .b64 %d<64>;
"""
SUFFIX = {1: "8", 2: "16", 4: "32", 8: "64"}
PREFIX = {1: "h", 2: "h", 4: "r", 8: "d"}


def kernel(body: str, parameters: int, *, module: str = "", threads: int | None = None) -> str:
    """A module with one kernel `k` that takes pointers; %d40.. hold them, %r40 is %tid.x."""
    names = ", ".join(f".param .u64 p{i}" for i in range(parameters))
    loads = "\n".join(f"  ld.param.u64 %d{40 + i}, [p{i}];" for i in range(parameters))
    need = f".reqntid {threads}" if threads else ""
    return f"""{HEADER}
{module}
.visible .entry k({names}) {need}
{{{REGISTERS}
{loads}
  mov.u32 %r40, %tid.x;
{body}
  ret;
}}
"""


def launch(ptx: str, *tensors, grid=1, block=32, shared_bytes=0, **options):
    """Runs kernel `k`; returns the rows of counts."""
    return Program(ptx).launch(
        "k", grid, block, tensors, shared_bytes=shared_bytes, options=Options(**options)
    )


def lanes(body: str, *inputs: torch.Tensor, out: torch.dtype) -> torch.Tensor:
    """`body` on one warp: input i is in %h, %r or %d<i>, the result in %h20, %r20 or %d20.

    Inputs hold 32 elements each.
    """
    lines = []
    for i, tensor in enumerate(inputs):
        size = tensor.element_size()
        register = f"%{PREFIX[size]}{i}"
        lines.append(f"  mad.wide.u32 %d30, %r40, {size}, %d{40 + i};")
        lines.append(f"  ld.global.b{SUFFIX[size]} {register}, [%d30];")
    size = torch.empty(0, dtype=out).element_size()
    lines.append(body)
    lines.append(f"  mad.wide.u32 %d30, %r40, {size}, %d{40 + len(inputs)};")
    lines.append(f"  st.global.b{SUFFIX[size]} [%d30], %{PREFIX[size]}20;")
    result = torch.zeros(32, dtype=out)
    launch(kernel("\n".join(lines), len(inputs) + 1), *inputs, result)
    return result


def compute(opcode: str, *inputs: torch.Tensor, out: torch.dtype) -> torch.Tensor:
    """One instruction with a plain destination on 32 lanes."""
    sources = ", ".join(f"%{PREFIX[t.element_size()]}{i}" for i, t in enumerate(inputs))
    size = torch.empty(0, dtype=out).element_size()
    return lanes(f"  {opcode} %{PREFIX[size]}20, {sources};", *inputs, out=out)
