"""Whether an installed llmkern works here: each compiled part loads from where it was installed,
and calls on it agree with torch. For a wheel in an environment of its own. CUDA kernels that were
not built are an error where LLMKERN_CUDA=on asked for them, as cibuildwheel's configuration does.

    python tools/smoke.py
"""

import os
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

import llmkern
from llmkern import emulator
from llmkern.backends.cuda import _ext as cuda

ROOT = Path(__file__).resolve().parent.parent


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def main() -> int:
    installed = Path(llmkern.__file__).parent
    if installed == ROOT / "llmkern":
        print("this is the source tree's llmkern, not an installed one", file=sys.stderr)
        return 2
    print(f"llmkern {llmkern.__version__} in {installed}")
    for status in llmkern.backends():
        print(f"  {status.name}: {status.detail}")
    x, weight = torch.randn(8, 64), torch.randn(32, 64)
    close(llmkern.functional.layer_norm(x, 64, backend="cpu"), F.layer_norm(x, (64,)))
    print("cpu kernels: right")
    reason = cuda.load().reason
    if reason is not None:
        print(f"cuda kernels: {reason}")
        return 1 if os.environ.get("LLMKERN_CUDA") == "on" else 0
    with emulator.device("sm_80"):
        reason = cuda.unavailable("cpu")
    if reason is not None:  # as beside a torch that maps the CUDA runtime itself
        print(f"cuda kernels: they load; not tried in the emulator, {reason}")
        return 0
    with emulator.device("sm_80"), llmkern.use_backend("cuda"):
        close(llmkern.functional.layer_norm(x, 64), F.layer_norm(x, (64,)))
        close(llmkern.functional.linear(x, weight), F.linear(x, weight))
    print("cuda kernels, in the emulator: right")
    return 0


if __name__ == "__main__":
    sys.exit(main())
