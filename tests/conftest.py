"""Shared fixtures: every op test runs on every backend that is here, with torch.empty filled with
NaN."""

import pytest
import torch

from llmkern import dispatch
from llmkern.backends.cpu import _ext


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


@pytest.fixture(params=["reference", "cpu"])
def backend(request):
    """Name of a backend; calls inside the test that name none run on it."""
    if request.param == "cpu" and _ext.load().module is None:
        pytest.fail(f"the cpu extension must be built for the tests: {_ext.load().reason}")
    with dispatch.use_backend(request.param):
        yield request.param
