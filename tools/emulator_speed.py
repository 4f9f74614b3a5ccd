"""Times the emulator, all checks on, on three ops and on launches of next to no work.

    python tools/emulator_speed.py [--threads N] [--repeat N] [--backend triton|cuda]

Milliseconds, the best of the runs and their median: CPU time of the process with one thread, the
clock's otherwise. The first run, which compiles, is left out.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch

import llmkern
from llmkern import emulator
from llmkern.functional import layer_norm, linear, scaled_dot_product_attention


def attention(seq: int, dim: int, heads: int) -> Callable[[], object]:
    q, k, v = (torch.randn(1, heads, seq, dim).bfloat16().requires_grad_() for _ in range(3))

    def forward_and_backward():
        out = scaled_dot_product_attention(q, k, v, is_causal=True)
        return torch.autograd.grad(out, (q, k, v), out)

    return forward_and_backward


def cases() -> dict[str, Callable[[], object]]:
    a, w = torch.randn(512, 512).bfloat16(), torch.randn(512, 512).bfloat16()
    x, ones = torch.randn(512, 1024).bfloat16(), torch.ones(1024).bfloat16()
    row = torch.randn(1, 64).bfloat16()
    return {
        "linear 512 x 512 x 512 bf16": lambda: linear(a, w),
        "layer_norm 512 x 1024 bf16": lambda: layer_norm(x, (1024,), ones, ones),
        "attention forward + backward B1 H2 S256 D64 bf16 causal": attention(256, 64, 2),
        "layer_norm 1 x 64 bf16": lambda: layer_norm(row, (64,), ones[:64], ones[:64]),
        "attention forward + backward B1 H1 S16 D16 bf16 causal": attention(16, 16, 1),
    }


def times(call: Callable[[], object], repeat: int, clock: Callable[[], float]) -> list[float]:
    call()
    found = []
    for _ in range(repeat):
        begin = clock()
        call()
        found.append(1e3 * (clock() - begin))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=30)
    parser.add_argument("--backend", choices=["triton", "cuda"], default="triton")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    clock = time.process_time if options.threads == 1 else time.perf_counter
    device = emulator.device("sm_80", threads=options.threads)
    with device, llmkern.use_backend(options.backend):
        for name, call in cases().items():
            found = times(call, options.repeat, clock)
            print(f"{name:57}{min(found):9.2f}{statistics.median(found):9.2f}", flush=True)


if __name__ == "__main__":
    main()
