"""Finds the OpenMP runtime that torch uses, so that kernels run on torch's threads.

Its entry points are looked up where the loader finds them for torch's own libraries: among the
names of the whole process (LD_PRELOAD), and in torch with all it depends on. No runtime is loaded.
"""

import ctypes
import sys
from typing import NamedTuple

import torch

from llmkern.torch_private import extension_file

# Of every runtime; then the way into a parallel region as GCC's code takes it (libgomp, and on most
# systems libiomp5 and libomp), or clang's.
COMMON = ("omp_in_parallel", "omp_get_max_threads", "omp_get_thread_num", "omp_get_num_threads")
WAYS_IN = (
    ("GOMP_parallel",),
    ("__kmpc_fork_call", "__kmpc_push_num_threads", "__kmpc_global_thread_num"),
)


class Runtime(NamedTuple):
    """Addresses of entry points by name; none, and the reason, where there is no runtime."""

    entries: dict[str, int]
    reason: str | None


def _entries(library: ctypes.CDLL) -> dict[str, int] | None:
    for names in (COMMON + way for way in WAYS_IN):
        if all(hasattr(library, name) for name in names):
            address = ctypes.c_void_p
            return {n: ctypes.cast(getattr(library, n), address).value or 0 for n in names}
    return None


def _max_threads(entries: dict[str, int]) -> int:
    return ctypes.CFUNCTYPE(ctypes.c_int)(entries["omp_get_max_threads"])()


def _follows_torch(entries: dict[str, int]) -> bool:
    """Whether it is this runtime that torch.set_num_threads speaks to."""
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        return _max_threads(entries) == before + 1
    finally:
        torch.set_num_threads(before)


def find() -> Runtime:
    """The runtime of torch's threads. It changes nothing but where two runtimes are mapped: then
    torch.set_num_threads is called, to see which of them follows, and called back."""
    if "parallel backend: OpenMP" not in torch.__config__.parallel_info():
        return Runtime({}, "this torch does not use OpenMP")
    if sys.platform == "win32":
        return Runtime({}, "torch's OpenMP runtime is not looked for on Windows")
    places = (ctypes.CDLL(None), ctypes.CDLL(extension_file))
    found = {e["omp_get_max_threads"]: e for place in places if (e := _entries(place))}
    usable = [e for e in found.values() if len(found) == 1 or _follows_torch(e)]
    if not usable or _max_threads(usable[0]) != torch.get_num_threads():
        return Runtime({}, "no OpenMP runtime was found that torch's threads belong to")
    return Runtime(usable[0], None)
