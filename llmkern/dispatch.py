"""Which backend serves a call.

A call is described by its op's name and spec. Backends are asked in the order of BACKENDS; the
first whose `supports(spec)` returns None serves. `use_backend` or an op's `backend=` argument name
one: if that one cannot serve, BackendError is raised, whatever the policy. The fallback policy is
about calls for which nobody named a backend and the device's fused backend says no: "error", "warn"
or "silent" (the default is "warn"); each fallback is counted in `fallbacks()`.
"""

import contextlib
import contextvars
import importlib
import warnings
from collections import Counter
from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from llmkern import target
from llmkern.errors import BackendError, FallbackWarning
from llmkern.numerics import FLOOR

BACKENDS = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}
NAMES = ("cpu", "triton", "cuda", "reference")
POLICIES = ("error", "warn", "silent")

_preferred: contextvars.ContextVar[str | None] = contextvars.ContextVar("preferred", default=None)
_policy: contextvars.ContextVar[str] = contextvars.ContextVar("policy", default="warn")
_records: contextvars.ContextVar[list | None] = contextvars.ContextVar("records", default=None)
_fallbacks: Counter[str] = Counter()
_choices: dict[tuple, ModuleType] = {}
_fused: dict[str, bool] = {}


class Decision(NamedTuple):
    """How a call was decided: the backend, and the reason of each one that was passed over."""

    backend: str
    rejected: tuple[tuple[str, str], ...]


def check_name(name: str) -> str:
    if name not in NAMES:
        raise BackendError(f"backend must be one of {', '.join(NAMES)}, got {name!r}")
    return name


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Every llmkern call inside runs on backend `name`, one of NAMES, or raises."""
    token = _preferred.set(check_name(name))
    try:
        yield
    finally:
        _preferred.reset(token)


@contextlib.contextmanager
def fallback_policy(policy: str) -> Iterator[None]:
    """What happens inside when no fused backend serves a call: "error", "warn" or "silent"."""
    if policy not in POLICIES:
        raise BackendError(f"fallback policy must be one of {', '.join(POLICIES)}, got {policy!r}")
    token = _policy.set(policy)
    try:
        yield
    finally:
        _policy.reset(token)


def fallbacks() -> dict[str, int]:
    """Calls that no fused backend served, by "op: reason", since the process started."""
    return dict(_fallbacks)


@contextlib.contextmanager
def recording() -> Iterator[list[tuple[str, tuple, Decision]]]:
    """Collects (op, spec, decision) of every call resolved inside."""
    records: list[tuple[str, tuple, Decision]] = []
    token = _records.set(records)
    try:
        yield records
    finally:
        _records.reset(token)


def module_of(backend: str, op: str) -> ModuleType | None:
    """The module of `op` in `backend`, or None where the backend has no such op."""
    name = f"llmkern.backends.{backend}.{op}"
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as missing:
        if missing.name is not None and name.startswith(missing.name):
            return None
        raise


def refusal(backend: str, op: str, spec: tuple) -> str | None:
    """None if `backend` serves the call, else why not."""
    module = module_of(backend, op)
    if module is None:
        return f"the {backend} backend has no {op}"
    return module.supports(spec)


def decide(op: str, spec: tuple, backend: str | None = None) -> Decision:
    """Choose without running: the first candidate that supports `spec`.

    Raises:
        BackendError: the backend that was named cannot serve, or none can.
    """
    named = check_name(backend) if backend is not None else _preferred.get()
    device = spec.device
    candidates = (named,) if named is not None else BACKENDS.get(device, ("reference",))
    rejected = []
    for name in candidates:
        reason = refusal(name, op, spec)
        if reason is None:
            return Decision(name, tuple(rejected))
        rejected.append((name, reason))
    reasons = "; ".join(f"{name}: {reason}" for name, reason in rejected)
    raise BackendError(f"{op}: no backend serves this call on {device} ({reasons})")


def resolve(op: str, spec: tuple, backend: str | None = None) -> ModuleType:
    """The backend module that serves the call; counts and reports a fallback."""
    key = (op, spec, backend, _preferred.get(), target.emulated())
    records = _records.get()
    if records is None:
        module = _choices.get(key)
        if module is not None:
            return module
    decision = decide(op, spec, backend)
    if records is not None:
        records.append((op, spec, decision))
    module = module_of(decision.backend, op)
    if decision.rejected and decision.backend == "reference":
        _report_fallback(op, decision)
    elif len(_choices) < 4096:  # specs hold sizes: a stream of new ones must not grow it for ever
        _choices[key] = module
    else:
        _choices.clear()
    return module


class BackendStatus(NamedTuple):
    """Whether a backend can be used in this process, and if not, why."""

    name: str
    available: bool
    detail: str  # what it is running on, or what is missing


def backends() -> list[BackendStatus]:
    """Every backend, with the reason for each one that is missing."""
    return [status(name) for name in NAMES]


def status(name: str) -> BackendStatus:
    """Whether one backend can be used here, and what it runs on or lacks."""
    try:
        package = importlib.import_module(f"llmkern.backends.{name}")
    except ModuleNotFoundError as missing:
        if missing.name != f"llmkern.backends.{name}":
            return BackendStatus(name, False, f"{missing.name} is not installed")
        return BackendStatus(name, False, "not part of this version of llmkern")
    return BackendStatus(name, *package.status())


def unserved(input: Tensor, *others: Tensor | None) -> str | None:
    """Why a call on these tensors is not for llmkern's kernels, or None if it is.

    Drop-in modules and rerouted calls ask this first and leave the rest to torch: nested, sparse,
    quantised and complex tensors, subclasses with rules of their own (DTensor), devices for which
    there is no fused backend here, and torch.jit.trace, whose graphs should hold torch's ops. What
    passes may still break a rule of the op, which then says so.
    """
    for tensor in (input, *others):
        kind = type(tensor)
        if kind is not Tensor and kind is not Parameter and tensor is not None:
            return f"{kind.__name__} has rules of its own"
    if input.dtype not in FLOOR:
        return f"dtype {str(input.dtype).removeprefix('torch.')}"
    if input.layout is not torch.strided or input.is_nested:
        return "nested tensor" if input.is_nested else f"layout {input.layout}"
    device = "cpu" if input.is_cpu else input.device.type
    if not has_fused(device):
        return f"no fused backend serves {device} here"
    return "torch.jit is tracing" if torch.jit.is_tracing() else None


def has_fused(device: str) -> bool:
    """True where a backend other than the reference is available for tensors on `device`."""
    fused = _fused.get(device)
    if fused is None:
        names = [name for name in BACKENDS.get(device, ()) if name != "reference"]
        fused = _fused[device] = any(status(name).available for name in names)
    return fused


has_fused._dynamo_marked_constant = True  # what torch.compiler.assume_constant_result sets


def _report_fallback(op: str, decision: Decision) -> None:
    name, reason = decision.rejected[-1]  # the last fused backend that was asked
    policy = _policy.get()
    message = f"{op}: {name} cannot serve this call ({reason}); {decision.backend} serves it"
    if policy == "error":
        raise BackendError(message)
    _fallbacks[f"{op}: {reason}"] += 1
    if policy == "warn":
        warnings.warn(message, FallbackWarning, stacklevel=4)
