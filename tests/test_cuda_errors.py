"""What the CUDA runtime refuses is a BackendError: the kernel, the call, the runtime's words."""

import re

import pytest
import torch

from llmkern import dispatch, emulator, functional
from llmkern.backends.cuda import _ext, linear
from llmkern.errors import BackendError
from llmkern.specs import LinearSpec, NormSpec

SPEC = NormSpec(torch.float32, None, "cpu", 4, 8, 1e-5, True, False, False, 0.0, False,
                torch.float32)  # fmt: skip
SHAPE = (0, 0, 0, 4, 8, 1e-5, True, False, 0)


@pytest.fixture
def device():
    with emulator.device("sm_80") as dev:
        reason = _ext.unavailable("cpu")
        if reason:
            pytest.skip(reason)
        yield dev
        dev.failure = None  # the tests saw it as a BackendError


@pytest.fixture
def without_driver(device, monkeypatch):
    """The module for CUDA tensors in the emulated one's place: its own runtime finds no driver."""
    if torch.cuda.is_available():
        pytest.skip("there is a driver here")
    monkeypatch.setattr(_ext, "load_emulated", _ext.load)


def _norm_fwd(x, y) -> None:
    with _ext.Launch(x, SPEC) as launch:
        arguments = (_ext.shown(x), 8, None, 0, None, None, None, _ext.shown(y), None)
        launch.norm_fwd(SHAPE, None, *arguments)


def test_a_kernel_that_a_check_stops_is_an_error_with_kernel_shape_and_reason(device):
    x, short = torch.randn(4, 8), torch.zeros(3, 8)
    with pytest.raises(BackendError) as caught:
        _norm_fwd(x, short)
    said = str(caught.value)
    assert said.startswith("cuda: norm_fwd: cudaErrorLaunchFailure") and "out of bounds" in said
    assert "rows=4, cols=8" in said


def test_a_launch_that_is_refused_is_an_error_with_kernel_shape_and_reason(device):
    device.max_shared_bytes = 1024
    q = torch.randn(1, 1, 64, 64).bfloat16()
    with pytest.raises(BackendError) as caught, dispatch.use_backend("cuda"):
        functional.scaled_dot_product_attention(q, q, q)
    said = str(caught.value)
    assert re.match(r"cuda: attention_fwd: cudaErrorInvalidValue .*shared memory", said), said
    assert "q_len=64, kv_len=64, head_dim=64" in said


def test_the_call_after_a_failed_one_starts_clean(device):
    x, y = torch.randn(4, 8), torch.zeros(4, 8)
    with pytest.raises(BackendError):
        _norm_fwd(x, torch.zeros(3, 8))
    _norm_fwd(x, y)
    torch.testing.assert_close(y, torch.nn.functional.rms_norm(x, (8,), eps=1e-5))


def _norm(x):
    return functional.layer_norm(x, 64)


def _attention(x):
    return functional.scaled_dot_product_attention(x, x, x)


def _linear(x):
    return functional.linear(x, x[0, 0], activation="gelu")


def _exact_linear(x):
    return functional.linear(x.float(), x[0, 0].float())


@pytest.mark.parametrize(
    "function, kernel",
    [(_norm, "norm_fwd"), (_attention, "attention_fwd"), (_linear, "gemm"),
     (_exact_linear, "gemm_ieee")],
)  # fmt: skip
def test_without_a_driver_a_call_fails_with_one_sentence(without_driver, function, kernel):
    x = torch.randn(1, 1, 64, 64).bfloat16()
    with dispatch.use_backend("cuda"), pytest.raises(BackendError) as caught:
        function(x)
    said = str(caught.value)
    assert re.match(rf"cuda: {kernel}: CUDA driver version is insufficient", said), said
    assert "\n" not in said and "Spec(" in said


def test_widest_product_that_is_served_has_a_backward_grid(device):
    spec = LinearSpec(torch.float32, "cpu", 1, 65535 * 128 * 4, 1, None, False, True, False, 0.0,
                      False)  # fmt: skip
    assert linear.supports(spec) is None
    assert "outputs go up to" in linear.supports(spec._replace(out_features=1 << 25))


@pytest.fixture
def a_card(device, monkeypatch):
    """torch finds a card; the CUDA runtime of the module for CUDA tensors is the real one."""
    if torch.cuda.is_available():
        pytest.skip("there is a driver here")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 0))
    for answer in (_ext._refused_by, _ext._too_old):
        answer.cache_clear()
    yield monkeypatch
    for answer in (_ext._refused_by, _ext._too_old):
        answer.cache_clear()


def test_calls_are_left_to_others_where_the_driver_is_too_old(a_card):
    reason = dispatch.refusal("cuda", "norm", SPEC._replace(device="cuda"))
    said = r"its kernels cannot run on this card: \w+: CUDA driver version is insufficient"
    assert reason is not None and re.match(said, reason), reason


def test_calls_are_served_where_the_runtime_has_kernels_for_the_card(a_card):
    a_card.setattr(_ext, "load", _ext.load_emulated)
    assert _ext.unavailable("cuda") is None


def test_calls_are_left_to_others_where_any_card_is_too_old(a_card):
    a_card.setattr(_ext, "load", _ext.load_emulated)
    a_card.setattr(torch.cuda, "device_count", lambda: 2)
    a_card.setattr(torch.cuda, "get_device_capability", lambda index: [(8, 0), (7, 5)][index])
    assert _ext.unavailable("cuda") == "its kernels need compute capability 8.0, card 1 has 7.5"


@pytest.mark.parametrize(
    "function, kernel", [(_norm, "norm_bwd"), (_attention, "attention"), (_linear, "linear_bwd")]
)
def test_without_a_driver_a_backward_fails_as_a_forward_does(device, monkeypatch, function, kernel):
    if torch.cuda.is_available():
        pytest.skip("there is a driver here")
    x = torch.randn(1, 1, 64, 64).bfloat16().requires_grad_()
    with dispatch.use_backend("cuda"):
        y = function(x)
        monkeypatch.setattr(_ext, "load_emulated", _ext.load)
        with pytest.raises(BackendError, match=rf"cuda: {kernel}\w*: CUDA driver version"):
            y.sum().backward()
