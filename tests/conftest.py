"""Shared fixtures: every op test runs on every backend that is here, with torch.empty filled with
NaN.

Markers for the triton backend, whose kernels run under Triton's interpreter here, thousands of
times slower than compiled:
    light(name=[values ...])  parameters with which it takes part in the short run; others are slow
    computes_in(dtype, ...)   dtypes that the test uses besides its parameters
    without(backend, reason)  the test is not for this backend
"""

import os

import pytest
import torch

from llmkern import dispatch
from llmkern.backends.cpu import _ext
from llmkern.backends.triton import _launch

# Before a kernel is imported: it is what makes the triton backend serve CPU tensors.
os.environ["TRITON_INTERPRET"] = "1"

if _launch.version() is not None:
    import interpreter

    interpreter.put_right()


def _poisoned(allocate):
    def allocate_and_fill(*args, **kwargs):
        out = allocate(*args, **kwargs)
        if type(out) is torch.Tensor and out.is_floating_point():
            out.fill_(float("nan"))
        return out

    return allocate_and_fill


@pytest.fixture(autouse=True)
def poisoned_empty(request, monkeypatch):
    """An output element that a kernel forgets to write shows up as NaN."""
    torch.manual_seed(0)
    if "compile" not in request.node.name:  # dynamo must see the real torch.empty
        for name in ("empty", "empty_like"):
            monkeypatch.setattr(torch, name, _poisoned(getattr(torch, name)))


def pytest_collection_modifyitems(items):
    for item in items:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        if parameters.get("backend") != "triton":
            continue
        for marker in item.iter_markers("light"):
            if any(parameters[name] not in values for name, values in marker.kwargs.items()):
                item.add_marker(pytest.mark.slow)


@pytest.fixture(params=["reference", "cpu", "triton"])
def backend(request):
    """Name of a backend; calls inside the test that name none run on it."""
    if request.param == "cpu" and _ext.load().module is None:
        pytest.fail(f"the cpu extension must be built for the tests: {_ext.load().reason}")
    reason = _triton_lacks(request) if request.param == "triton" else None
    for marker in request.node.iter_markers("without"):
        if marker.args[0] == request.param:
            reason = marker.args[1]
    if reason:
        pytest.skip(reason)
    with dispatch.use_backend(request.param):
        yield request.param


def _triton_lacks(request) -> str | None:
    """Why the test's op, or a dtype that it uses, is not for the triton backend here."""
    reason = _launch.unavailable("cpu")
    if reason:
        return reason
    op = request.node.path.stem.removeprefix("test_").split("_")[0]
    if dispatch.module_of("triton", op) is None:
        return f"the triton backend has no {op}"
    values = list(request.node.callspec.params.values())
    for marker in request.node.iter_markers("computes_in"):
        values += marker.args
    reasons = [_launch.unsupported(value) for value in values if isinstance(value, torch.dtype)]
    return next(filter(None, reasons), None)
