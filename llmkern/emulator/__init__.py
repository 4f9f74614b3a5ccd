"""Executes GPU kernels on the CPU: the PTX that Triton and nvcc emit, checked and counted.

    with llmkern.emulator.device("sm_80") as dev:
        kernel[grid](x, y, out, n, BLOCK=1024)      # any @triton.jit kernel, on CPU tensors
    print(dev.report())

Inside, Triton compiles for the emulated architecture and launches here. A launch stops with
EmulatorError at the first access out of bounds or misaligned, read of shared memory or registers
that nothing has written, race between warps or lanes in shared memory or between CTAs in global
memory, touch of bytes that a cp.async has under way, collective or barrier that not all lanes
reach, deadlock.

What it cannot tell: PTX is not machine code, so spills, scheduling, caches and time are out of
reach. Approximate functions (ex2, rcp, tanh) and the order of additions inside mma are not the
hardware's. Memory is sequentially consistent: of a missing fence only the race between CTAs shows.
"""

from llmkern.emulator.counters import Counters
from llmkern.emulator.cudart import load_library
from llmkern.emulator.gpu import Device, current, device
from llmkern.emulator.program import EmulatorError, Program, PtxError

__all__ = ["Counters", "Device", "EmulatorError", "Program", "PtxError", "current", "device",
           "load_library"]  # fmt: skip
