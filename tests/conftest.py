"""Shared fixtures: every op test runs on every backend that is here, with torch.empty filled with
NaN.

The GPU backends, triton and cuda, run in llmkern's emulator (sm_80) with all its checks on: a race
or an access out of bounds fails the test. LLMKERN_TEST_INTERPRETER=1 runs triton under Triton's own
interpreter instead. Markers for them, thousands of times slower than a GPU either way:
    light(name=[values ...])  parameters with which they take part in the short run; others are slow
    computes_in(dtype, ...)   dtypes that the test uses besides its parameters
    without(backend, reason)  the test is not for this backend
`make test-isa` runs all but off_cpu, which is set here: what runs on GPU backends, and OFF_CPU.
"""

import contextlib
import getpass
import os
import tempfile

import pytest
import torch

from llmkern import dispatch, emulator
from llmkern.backends.cpu import _ext, tiles
from llmkern.backends.cuda import _ext as cuda_ext
from llmkern.backends.triton import _launch

GPU_BACKENDS = ("triton", "cuda")
# Words in the names of test files in which no CPU kernel computes. A new file is not among them.
OFF_CPU = {"emulator", "triton", "cuda", "gpu", "architecture", "build", "cards", "install"}
OFF_CPU |= {"kernel", "profile", "simd", "tune"}
INTERPRETED = os.environ.get("LLMKERN_TEST_INTERPRETER") == "1"

# inductor's cache does not know for which of torch's instruction sets it holds code.
if "ATEN_CPU_CAPABILITY" in os.environ:
    folder = f"torchinductor_llmkern_{getpass.getuser()}_{os.environ['ATEN_CPU_CAPABILITY']}"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.path.join(tempfile.gettempdir(), folder))

if INTERPRETED and _launch.version() is not None:
    # Before a kernel is imported: it is what makes the triton backend serve CPU tensors.
    os.environ["TRITON_INTERPRET"] = "1"
    import interpreter

    interpreter.put_right()


def _poisoned(allocate):
    def allocate_and_fill(*args, **kwargs):
        out = allocate(*args, **kwargs)
        if type(out) is torch.Tensor and out.is_floating_point():
            with torch.no_grad():
                out.fill_(float("nan"))
        return out

    return allocate_and_fill


@pytest.fixture(autouse=True)
def poisoned_empty(request, monkeypatch):
    """An output element that a kernel forgets to write shows up as NaN."""
    torch.manual_seed(0)
    if "compile" not in request.node.name:  # dynamo must see the real torch.empty
        for name in ("empty", "empty_like", "empty_strided"):
            monkeypatch.setattr(torch, name, _poisoned(getattr(torch, name)))


def pytest_collectstart(collector):
    """What a file draws while it is imported does not depend on the files before it."""
    if isinstance(collector, pytest.Module):
        torch.manual_seed(0)


def pytest_collection_modifyitems(items):
    for item in items:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        on_gpu = parameters.get("backend") in GPU_BACKENDS
        emulated = {"emulated_triton", "emulated_cuda"} & set(item.fixturenames)
        if on_gpu or emulated or OFF_CPU & set(item.path.stem.split("_")):
            item.add_marker(pytest.mark.off_cpu)
        if not on_gpu:
            continue
        for marker in item.iter_markers("light"):
            if any(parameters[name] not in values for name, values in marker.kwargs.items()):
                item.add_marker(pytest.mark.slow)


@pytest.fixture(params=["reference", "cpu", *GPU_BACKENDS])
def backend(request):
    """Name of a backend; calls inside the test that name none run on it."""
    name = request.param
    if name == "cpu" and _ext.load().module is None:
        pytest.fail(f"the cpu extension must be built for the tests: {_ext.load().reason}")
    for marker in request.node.iter_markers("without"):
        if marker.args[0] == name:
            pytest.skip(marker.args[1])
    if name not in GPU_BACKENDS:
        with dispatch.use_backend(name):
            yield name
        return
    with gpu(name):
        reason = _gpu_lacks(request, name)
        if reason:
            pytest.skip(reason)
        _skip_what_is_refused(request.getfixturevalue("monkeypatch"), name)
        with dispatch.use_backend(name):
            yield name


def _skip_what_is_refused(monkeypatch, name: str) -> None:
    """A GPU backend may leave calls to another: `supports` says which, and so does the skip."""
    refusal = dispatch.refusal

    def ask(backend, op, spec):
        reason = refusal(backend, op, spec)
        if reason is not None and backend == name:
            pytest.skip(f"{name}: {reason}")
        return reason

    monkeypatch.setattr(dispatch, "refusal", ask)


def gpu(name: str) -> contextlib.AbstractContextManager:
    """Where CPU tensors can be served by a GPU backend."""
    if name == "triton" and INTERPRETED:
        return contextlib.nullcontext()
    if name == "triton" and (_launch.version() or "").startswith("3.8."):
        pytest.skip("the emulator cannot drive triton 3.8 yet")
    return emulator.device("sm_80")


@pytest.fixture
def own_product(monkeypatch):
    """The cpu backend computes all matrix products itself. What a test says of bits holds for our
    kernels, not for oneDNN's and MKL's."""
    for key in tiles.GEMM:
        monkeypatch.setitem(tiles.GEMM, key, tiles.OWN)


@pytest.fixture
def emulated_triton():
    """For tests of the triton kernels alone, wherever they call them."""
    with gpu("triton"):
        yield


@pytest.fixture
def emulated_cuda():
    """For tests of the cuda kernels alone; gives the emulated device."""
    with gpu("cuda") as device:
        reason = cuda_ext.unavailable("cpu")
        if reason:
            pytest.skip(reason)
        yield device


def _gpu_lacks(request, name: str) -> str | None:
    """Why the test's op, or a dtype that it uses, is not for this GPU backend here."""
    lacking = (cuda_ext if name == "cuda" else _launch).unavailable("cpu")
    if lacking:
        return lacking
    op = request.node.path.stem.removeprefix("test_").split("_")[0]
    if dispatch.module_of(name, op) is None:
        return f"the {name} backend has no {op}"
    values = list(request.node.callspec.params.values())
    for marker in request.node.iter_markers("computes_in"):
        values += marker.args
    reasons = [_launch.unsupported(value) for value in values if isinstance(value, torch.dtype)]
    return next(filter(None, reasons), None)
