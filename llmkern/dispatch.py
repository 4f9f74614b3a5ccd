"""Which backend serves a call.

A call is described by its op's name and spec. Backends are asked in the order of BACKENDS; the
first whose `supports(spec)` returns None serves. For CUDA tensors llmkern/choice.py sets the order,
by what `llmkern tune` measured on the card if it did. `use_backend` or an op's `backend=` argument
names one: if that one cannot serve, BackendError is raised, whatever the policy. The fallback
policy is about calls for which nobody named a backend and that only the reference serves, where the
device has fused backends: "error", "warn" or "silent" (the default is "warn"); each fallback is
counted in `fallbacks()`.
"""

import contextlib
import contextvars
import functools
import importlib
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from llmkern import choice, recompute, target, tuned
from llmkern.errors import BackendError, FallbackWarning
from llmkern.numerics import FLOOR
from llmkern.torch_private import compiler_traces, constant_in_graph, exported_kinds

BACKENDS = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}
NAMES = ("cpu", "triton", "cuda", "reference")
POLICIES = ("error", "warn", "silent")


class _Settings(NamedTuple):
    """What the context managers below set."""

    preferred: str | None = None
    policy: str = "warn"
    records: list | None = None


_DEFAULTS = _Settings()
_settings: contextvars.ContextVar[_Settings] = contextvars.ContextVar("settings", default=_DEFAULTS)
_fallbacks: Counter[str] = Counter()
_choices: dict[tuple, ModuleType] = {}
_fused: dict[str, bool] = {}


class Decision(NamedTuple):
    """How a call was decided: the backend, the reason of each one that was passed over, and why
    they were asked in that order, where they could have been in another."""

    backend: str
    rejected: tuple[tuple[str, str], ...]
    reason: str = ""


def check_name(name: str) -> str:
    if name not in NAMES:
        raise BackendError(f"backend must be one of {', '.join(NAMES)}, got {name!r}")
    return name


@contextlib.contextmanager
def _set(**changed) -> Iterator[None]:
    token = _settings.set(_settings.get()._replace(**changed))
    try:
        yield
    finally:
        _settings.reset(token)


def _prefer(name: str | None) -> contextlib.AbstractContextManager:
    return _set(preferred=name)


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Every llmkern call inside runs on backend `name`, one of NAMES, or raises; so does what
    torch.utils.checkpoint recomputes of them in backward."""
    recompute.carry("backend", lambda: _settings.get().preferred, _prefer, None)
    with _set(preferred=check_name(name)):
        yield


@contextlib.contextmanager
def fallback_policy(policy: str) -> Iterator[None]:
    """What happens inside when no fused backend serves a call: "error", "warn" or "silent"."""
    if policy not in POLICIES:
        raise BackendError(f"fallback policy must be one of {', '.join(POLICIES)}, got {policy!r}")
    with _set(policy=policy):
        yield


def fallbacks() -> dict[str, int]:
    """Calls that no fused backend served, by "op: reason", since the process started."""
    return dict(_fallbacks)


@contextlib.contextmanager
def recording() -> Iterator[list[tuple[str, tuple, Decision]]]:
    """Collects (op, spec, decision) of every call resolved inside."""
    records: list[tuple[str, tuple, Decision]] = []
    with _set(records=records):
        yield records


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
        TuneFileError: the card's tune file is broken.
    """
    named = check_name(backend) if backend is not None else _settings.get().preferred
    device = spec.device
    if named is not None:
        candidates, why = (named,), ""
    else:
        candidates, why = _preference(op, spec, BACKENDS.get(device, ("reference",)))
    rejected = []
    for name in candidates:
        reason = refusal(name, op, spec)
        if reason is None:
            return Decision(name, tuple(rejected), why)
        rejected.append((name, reason))
    reasons = "; ".join(f"{name}: {reason}" for name, reason in rejected)
    raise BackendError(f"{op}: no backend serves this call on {device} ({reasons})")


def _preference(op: str, spec: tuple, backends: tuple[str, ...]) -> choice.Preference:
    found = _measured() if spec.device == "cuda" else None
    if found is None:
        return choice.prefer(op, spec, backends)
    return choice.prefer(op, spec, backends, found[0].rows, str(found[1]))


@functools.cache
def _measured() -> tuple[tuned.Tuned, Path] | None:
    """The tune file of the card that is current at the first call on CUDA tensors."""
    card = card_name()
    return None if card is None else tuned.load(card)


def card_name() -> str | None:
    """What torch calls the current CUDA device; None where there is none."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def resolve(op: str, spec: tuple, backend: str | None = None) -> ModuleType:
    """The backend module that serves the call; counts and reports a fallback."""
    settings = _settings.get()
    key = (op, spec, backend, settings.preferred, target.emulated())
    if settings.records is None:
        module = _choices.get(key)
        if module is not None:
            return module
    decision = decide(op, spec, backend)
    if settings.records is not None:
        settings.records.append((op, spec, decision))
    module = module_of(decision.backend, op)
    if decision.rejected and decision.backend == "reference":
        _report_fallback(op, decision)
    else:
        if len(_choices) >= 4096:  # specs hold sizes: new ones must not make it grow for ever
            _choices.clear()
        _choices[key] = module
    return module


class Choice:
    """`resolve` of one call that is made again and again.

    The answer is kept while no context manager of this module and no emulated device has come or
    gone: comparing that is cheaper than hashing a spec. Fallbacks and recorded calls are resolved
    each time, because each is counted.
    """

    __slots__ = ("op", "spec", "backend", "_kept")

    def __init__(self, op: str, spec: tuple, backend: str | None) -> None:
        self.op, self.spec, self.backend = op, spec, backend
        self._kept: tuple = (None, None, None, None, None)

    def module(self) -> ModuleType:
        """The backend module that serves the call now."""
        return self._now()[3]

    def forward(self) -> Callable:
        """`module().forward` for this spec, less the spec: what its `bind(spec)` gives where the
        backend has one, which need not look at the spec again at each call."""
        kept = self._kept  # as in _now
        if kept[0] is _settings.get() and kept[1] == target.emulated() and kept[2] is _choices:
            return kept[4]
        return self._now()[4]

    def _now(self) -> tuple:
        settings, emulated = _settings.get(), target.emulated()
        kept = self._kept  # one tuple: other threads, with other settings, replace it whole
        if kept[0] is settings and kept[1] == emulated and kept[2] is _choices:
            return kept
        module = resolve(self.op, self.spec, self.backend)
        if hasattr(module, "bind"):
            forward = module.bind(self.spec)
        else:
            forward = functools.partial(module.forward, self.spec)
        key = (self.op, self.spec, self.backend, settings.preferred, emulated)
        kept = (settings, emulated, _choices, module, forward)
        if settings.records is None and _choices.get(key) is module:
            self._kept = kept
        return kept


def foresee(op: str, describe: Callable[[], tuple], backend: str | None) -> None:
    """Record, where `recording` is on, how a call on fake tensors would be decided.

    `describe` gives the spec. A compiler's tracing is no call and records nothing.
    """
    records = _settings.get().records
    if records is not None and not compiler_traces():
        spec = describe()
        records.append((op, spec, decide(op, spec, backend)))


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
    there is no fused backend here, and torch.jit.trace and ONNX's exporter, whose graphs should
    hold torch's ops. What passes may still break a rule of the op, which then says so.
    """
    for tensor in (input, *others):
        kind = type(tensor)
        if kind is not Tensor and kind is not Parameter and tensor is not None:
            if isinstance(tensor, exported_kinds) and _exporting():
                continue  # stands for the plain tensor that the exported program will get
            return f"{kind.__name__} has rules of its own"
    if input.dtype not in FLOOR:
        return f"dtype {str(input.dtype).removeprefix('torch.')}"
    if input.layout is not torch.strided or input.is_nested:
        return "nested tensor" if input.is_nested else f"layout {input.layout}"
    device = "cpu" if input.is_cpu else input.device.type
    if not has_fused(device):
        return f"no fused backend serves {device} here"
    return "torch.jit is tracing" if torch.jit.is_tracing() else None


def _exporting() -> bool:
    """Whether torch.export makes a program that may hold llmkern's ops, as ONNX's may not."""
    return torch.compiler.is_exporting() and not torch.onnx.is_in_onnx_export()


def has_fused(device: str) -> bool:
    """True where a backend other than the reference is available for tensors on `device`."""
    fused = _fused.get(device)
    if fused is None:
        if torch.compiler.is_dynamo_compiling():  # traced, not run: the op finds out when it runs
            return True
        names = [name for name in BACKENDS.get(device, ()) if name != "reference"]
        fused = _fused[device] = any(status(name).available for name in names)
    return fused


constant_in_graph(has_fused)


def _report_fallback(op: str, decision: Decision) -> None:
    name, reason = decision.rejected[-1]  # the last fused backend that was asked
    policy = _settings.get().policy
    message = f"{op}: {name} cannot serve this call ({reason}); {decision.backend} serves it"
    if policy == "error":
        raise BackendError(message)
    _fallbacks[f"{op}: {reason}"] += 1
    if policy == "warn":
        warnings.warn(message, FallbackWarning, stacklevel=4)
