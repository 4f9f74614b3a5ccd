"""The threads of the CPU kernels: torch's own, through whichever OpenMP runtime it uses."""

import ctypes
import glob
import os
import shlex
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import llmkern
from llmkern.backends.cpu import _ext, _threads
from llmkern.backends.cpu.activation import CODES

PROC = Path("/proc/self/task")
needs_proc = pytest.mark.skipif(not PROC.exists(), reason="/proc lists a process's threads")

# A runtime with clang's way in alone, which gives a team of two to whoever asks for three.
STAND_IN = r"""
#include <cstdarg>
#include <cstdint>
#include <thread>
thread_local int number = 0, size = 1, wanted = 1;
extern "C" {
int omp_in_parallel() { return size > 1; }
int omp_get_max_threads() { return 3; }
int omp_get_thread_num() { return number; }
int omp_get_num_threads() { return size; }
int32_t __kmpc_global_thread_num(void*) { return 41; }
void __kmpc_push_num_threads(void*, int32_t thread, int32_t threads) {
  wanted = thread == 41 ? threads : -1;
}
void __kmpc_fork_call(void*, int32_t n, void (*body)(int32_t*, int32_t*, void*, void*), ...) {
  if (n != 2 || wanted < 1) __builtin_trap();
  va_list list;
  va_start(list, body);
  void* a = va_arg(list, void*);
  void* b = va_arg(list, void*);
  va_end(list);
  const int team = wanted < 2 ? wanted : 2;
  const auto run = [=](int i) {
    number = i;
    size = team;
    body(nullptr, nullptr, a, b);
    size = 1;
  };
  std::thread other(run, 1);
  run(0);
  other.join();
}
}
"""


@pytest.fixture
def module():
    loaded = _ext.load()
    assert loaded.module is not None, loaded.reason
    return loaded.module


@pytest.fixture
def set_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def own_threads(module):
    """use_threads, and afterwards torch's threads again."""
    yield lambda entries: module.use_threads(entries, torch.get_num_threads)
    module.use_threads(_threads.find().entries, torch.get_num_threads)


def _results() -> list[torch.Tensor]:
    """Of kernels with tasks taken one by one, ranges dealt out, and partial sums."""
    torch.manual_seed(3)
    x = torch.randn(301, 1024, requires_grad=True)
    weight = torch.randn(1024, requires_grad=True)
    q = torch.randn(2, 4, 150, 32, requires_grad=True)
    w = torch.randn(96, 1024)
    with llmkern.use_backend("cpu"):
        found = [
            llmkern.functional.layer_norm(x, (1024,), weight),
            llmkern.functional.scaled_dot_product_attention(q, q, q, is_causal=True),
            llmkern.functional.linear(x.detach(), w, activation="gelu"),
            llmkern.functional.gelu(x.detach()),
        ]
        (found[0].square().sum() + found[1].square().sum()).backward()
    return [*(f.detach() for f in found), x.grad, weight.grad, q.grad]


def _all_equal(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def _python(code: str, **environment: str) -> str:
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


@pytest.mark.parametrize("threads", [2, 3, 5])
def test_results_are_the_same_for_any_thread_count(set_threads, module, threads):
    set_threads(1)
    want = _results()
    set_threads(threads)
    assert module.max_threads() == threads
    assert _all_equal(_results(), want)


# torch's pool is filled first; what is printed: the threads that our calls add, whose they are.
SHARE = """
import os, sys, ctypes, torch
if len(sys.argv) > 1:
    ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)
import llmkern
from llmkern.backends.cpu import _ext
torch.set_num_threads(3)
x = torch.randn(4096, 512)
torch.nn.functional.gelu(x)
before = set(os.listdir("/proc/self/task"))
with llmkern.use_backend("cpu"):
    llmkern.functional.layer_norm(x, (512,))
    llmkern.functional.linear(x, x[:300])
    q = x.view(8, 4, 1024, 64)
    llmkern.functional.scaled_dot_product_attention(q, q, q)
assert _ext.load().module.max_threads() == 3
print(len(set(os.listdir("/proc/self/task")) - before), len(before) >= 3)
"""


@needs_proc
def test_kernels_start_no_threads_beside_those_of_torch():
    assert _python(SHARE).split() == ["0", "True"]


def _other_runtimes() -> list[str]:
    """OpenMP runtimes of this system that torch did not bring."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    found = glob.glob("/usr/lib/llvm*/lib/libomp.so.5")
    if shutil.which(compiler[0]):
        asked = subprocess.run(
            [*compiler, "-print-file-name=libgomp.so.1"], capture_output=True, text=True
        ).stdout.strip()
        found += [asked] if os.path.isabs(asked) else []
    return found


@needs_proc
@pytest.mark.parametrize("how", ["preloaded", "loaded later"])
def test_of_two_runtimes_kernels_use_the_one_that_torch_uses(how):
    others = _other_runtimes()
    if not others:
        pytest.skip("this system has no OpenMP runtime beside torch's")
    for other in others:
        if how == "preloaded":
            printed = _python(SHARE, LD_PRELOAD=other)
        else:
            code = f"import sys; sys.argv.append({other!r})\n{SHARE}"
            printed = _python(code)
        assert printed.split() == ["0", "True"], other


def test_number_of_threads_holds_in_a_thread_that_torch_has_not_seen(set_threads, module):
    """torch tells the runtime its number when its own code first runs in a thread."""
    set_threads(1)
    found = []
    other = threading.Thread(target=lambda: found.append(module.max_threads()))
    other.start()
    other.join()
    assert found == [1]


def test_kernel_inside_a_parallel_region_runs_serially(set_threads, module):
    entries = _threads.find().entries
    if "GOMP_parallel" not in entries:
        pytest.skip("the region of this test is entered as GCC's code does")
    set_threads(2)
    want, found = _results(), []
    body = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    enter = ctypes.CFUNCTYPE(None, body, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    x = torch.randn(301, 1024)

    def inside(_):
        y = llmkern.functional.layer_norm(x, (1024,), backend="cpu")
        found.append((module.max_threads(), y))

    enter(entries["GOMP_parallel"])(body(inside), None, 2, 0)
    outside = llmkern.functional.layer_norm(x, (1024,), backend="cpu")
    assert [threads for threads, _ in found] == [1, 1]
    assert all(torch.equal(y, outside) for _, y in found)
    assert module.max_threads() == 2 and _all_equal(_results(), want)


def test_without_a_runtime_kernels_are_serial_and_info_says_so(monkeypatch, module, set_threads):
    set_threads(3)
    want = _results()
    monkeypatch.setattr(torch.__config__, "parallel_info", lambda: "parallel backend: native")
    _ext.load.cache_clear()
    try:
        usable, detail = llmkern.backends.cpu.status()
        assert usable and "on one thread: this torch does not use OpenMP" in detail
        assert module.max_threads() == 1
        assert _all_equal(_results(), want)
    finally:
        monkeypatch.undo()
        _ext.load.cache_clear()
    assert "one thread" not in llmkern.backends.cpu.status()[1]
    assert module.max_threads() == 3


def test_runtime_that_is_not_torchs_is_not_used(monkeypatch):
    found = _threads.find().entries
    assert found
    monkeypatch.setattr(_threads, "_max_threads", lambda entries: torch.get_num_threads() + 7)
    assert not _threads.find().entries
    assert "no OpenMP runtime was found" in str(_threads.find().reason)


def test_extension_loads_and_computes_without_torch_and_without_a_runtime(module):
    code = f"""
import array, importlib.machinery, importlib.util, sys
loader = importlib.machinery.ExtensionFileLoader("llmkern._C_cpu", {module.__file__!r})
kernels = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
loader.exec_module(kernels)
class Floats(array.array):
    def data_ptr(self):
        return self.buffer_info()[0]
x, y = Floats("f", [-1.0, 2.0] * 40000), Floats("f", [7.0] * 80000)
kernels.activation_fwd(0, {CODES["relu"]}, 1, 80000, x, 80000, y, 80000)
assert y.tolist() == [0.0, 2.0] * 40000 and kernels.max_threads() == 1
print("torch" in sys.modules)
"""
    assert _python(code).strip() == "False"


def test_clangs_way_into_a_region_gives_the_same_results(tmp_path, own_threads, module):
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    if shutil.which(compiler[0]) is None:
        pytest.skip("no C++ compiler")
    source, library = tmp_path / "runtime.cpp", tmp_path / "runtime.so"
    source.write_text(STAND_IN)
    flags = ["-std=c++17", "-shared", "-fPIC", "-pthread"]
    subprocess.run([*compiler, *flags, source, "-o", library], check=True)
    own_threads({})
    want = _results()
    entries = _threads._entries(ctypes.CDLL(str(library)))
    assert entries is not None and "__kmpc_fork_call" in entries
    own_threads(entries)
    assert module.max_threads() == 3
    assert _all_equal(_results(), want)


# As macOS's libomp is entered. Here torch runs on libomp as well, preloaded.
FORK_CALL = """
import ctypes, llmkern, torch
from llmkern.backends.cpu import _ext, _threads
_threads.WAYS_IN = _threads.WAYS_IN[1:]
torch.set_num_threads(3)
x = torch.randn(4096, 512)
y = llmkern.functional.layer_norm(x, (512,), backend="cpu")
assert _ext.load().module.max_threads() == 3 and _ext.load().serial is None
torch.set_num_threads(1)
assert torch.equal(y, llmkern.functional.layer_norm(x, (512,), backend="cpu"))
print(*_threads.find().entries)
"""


def test_libomp_is_entered_as_clang_enters_it():
    libraries = glob.glob("/usr/lib/llvm*/lib/libomp.so.5")
    if not libraries:
        pytest.skip("LLVM's libomp is not installed")
    assert "__kmpc_fork_call" in _python(FORK_CALL, LD_PRELOAD=libraries[0])
