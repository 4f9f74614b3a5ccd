"""Times what a call of the Triton backend costs the host, with launches that do nothing.

    python tools/launch_cost.py [--repeat N]

The emulator's device stands for the card, its launcher for the driver's; the latter is replaced by
one that returns at once. What is left is what a call does on a card as well, before the driver:
checks, choice, allocation, Triton's own look at the arguments. Microseconds of CPU time, best of
the runs, for a length seen before and for a new one (all that llmkern keeps by length forgotten
before each run); in brackets what is not Triton's own. The first line says what the machine's
clock does meanwhile.
"""

import argparse
import functools
import gc
import time
from collections.abc import Callable

import torch
from triton.runtime.jit import JITFunction

import llmkern
from llmkern import dispatch, emulator
from llmkern.emulator import triton_driver
from llmkern.functional import layer_norm, linear, scaled_dot_product_attention
from llmkern.ops.library import Plans


def cases() -> dict[str, Callable[[int], object]]:
    w, ones = torch.randn(256, 256).bfloat16(), torch.ones(256).bfloat16()
    norm_in, q = torch.randn(4096, 256).bfloat16(), torch.randn(1, 4, 4096, 64).bfloat16()

    def norm_both(n: int):
        x = norm_in[:n].detach().requires_grad_()
        y = layer_norm(x, (256,), ones, ones)
        return torch.autograd.grad(y, x, y)

    return {
        "two allocations": lambda n: (torch.empty(n, 256), torch.empty(n)),
        "layer_norm": lambda n: layer_norm(norm_in[:n], (256,), ones, ones),
        "layer_norm, forward + backward": norm_both,
        "linear": lambda n: linear(norm_in[:n], w),
        "attention": lambda n: scaled_dot_product_attention(q[:, :, :n], q[:, :, :n], q[:, :, :n]),
    }


def kept_by_length() -> list[Callable[[], None]]:
    """What empties the bounded caches of the package."""
    clear = [dispatch._choices.clear]
    for kept in gc.get_objects():
        if type(kept) is functools._lru_cache_wrapper:
            ours = (kept.__module__ or "").startswith("llmkern.")
            if ours and kept.cache_parameters()["maxsize"] is not None:
                clear.append(kept.cache_clear)
        elif type(kept) is Plans:
            clear.append(kept.clear)
    return clear


def best(call: Callable[[int], object], repeat: int, forget: list[Callable[[], None]]) -> float:
    """Microseconds of a call, ten lengths a run; before each run, `forget`."""
    found = []
    for i in range(repeat):
        n = 16 * (i % 8 + 1) + i % 3
        for clear in forget:
            clear()
        begin = time.thread_time()
        for k in range(10):
            call(n + k)
        found.append(1e5 * (time.thread_time() - begin))
    return min(found)


def measure(call: Callable[[int], object], repeat: int) -> str:
    for n in range(1, 160):  # every form that lengths can take is compiled
        call(n)
    launch, columns = JITFunction.run, []
    for forget in ([], kept_by_length()):
        whole = best(call, repeat, forget)
        JITFunction.run = lambda self, *args, **options: None
        try:
            own = best(call, repeat, forget)
        finally:
            JITFunction.run = launch
        columns.append(f"{whole:8.1f} ({own:5.1f})")
    return "".join(f"{column:>20}" for column in columns)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeat", type=int, default=200)
    options = parser.parse_args()
    torch.set_num_threads(1)
    triton_driver.Launcher.__call__ = lambda self, *args: None
    print(f"{'us (without Triton)':34}{'seen':>20}{'new length':>20}")
    with emulator.device("sm_80"), llmkern.use_backend("triton"):
        for name, call in cases().items():
            print(f"{name:34}{measure(call, options.repeat)}", flush=True)


if __name__ == "__main__":
    main()
