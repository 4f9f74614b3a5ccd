"""accelerate(model): torch.nn modules become llmkern.nn modules, in place and reversibly.

A replacement is a change of `__class__` from llmkern.nn's type table. Nothing else of a module
moves: parameters, buffers, hooks, mode, and what refers to them (optimizers, other modules) stay.
"""

import copyreg
import functools
import types
import weakref
from collections import Counter
from collections.abc import Collection
from typing import NamedTuple

import torch
from torch.nn import Module, Parameter
from torch.nn.utils import parametrize

from llmkern.nn.table import REPLACEMENTS
from llmkern.override import Rerouting

_MODE = "_llmkern_rerouting"  # attribute of a model accelerated with functional=True
_CONTAINERS = (torch.nn.ModuleList, torch.nn.ModuleDict, torch.nn.Sequential, torch.nn.Identity)


class Replaced(NamedTuple):
    name: str  # in the model; "" is the model itself
    before: type[Module]
    after: type[Module]


class Left(NamedTuple):
    name: str
    type: type[Module]
    reason: str


class Report:
    """What `accelerate` did. As a context manager it undoes it at the end.

    Attributes:
        replaced, left: every module that got a llmkern class, and every other one but containers,
            with the reason.
        rerouting: with functional=True, the counts of rerouted calls (see `llmkern.override`).
    """

    def __init__(self) -> None:
        self.replaced: list[Replaced] = []
        self.left: list[Left] = []
        self.rerouting: Rerouting | None = None
        self._undo: list[tuple[weakref.ref[Module], type[Module], type[Module]]] = []
        self._rerouted: weakref.ref[Module] | None = None

    def undo(self) -> None:
        """Give every module the class that it had. A module whose class somebody else has changed
        since then is left as it is; undoing twice is as once."""
        model = self._rerouted() if self._rerouted is not None else None
        if model is not None and _base(type(model)) is not None:
            model.__class__ = _base(type(model))
            del model.__dict__[_MODE]
        for reference, before, after in self._undo:
            module = reference()
            if type(module) is after:
                module.__class__ = before
            elif _base(type(module)) is after:  # rerouted by a later accelerate
                module.__class__ = _rerouted(before)
        self._rerouted = None
        self._undo.clear()

    def __enter__(self) -> "Report":
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()

    def __str__(self) -> str:
        lines = [
            f"llmkern: {len(self.replaced)} modules replaced, {len(self.left)} left as they are"
        ]
        lines += [f"  {n:4d} x {what}" for what, n, _ in self._rows()]
        if self.rerouting is not None:
            lines += [f"  {line}" for line in str(self.rerouting).splitlines()]
        return "\n".join(lines)

    __repr__ = __str__

    def __rich__(self):
        """A table, for rich.print."""
        from rich.table import Table

        table = Table(title=str(self).splitlines()[0])
        for column in ("modules", "count", "first"):
            table.add_column(column)
        for what, n, name in self._rows():
            table.add_row(what, str(n), name)
        return table

    def _rows(self) -> list[tuple[str, int, str]]:
        """(what happened, to how many, name of the first), the frequent ones first."""
        outcomes = [(f"{_title(r.before)} -> {_title(r.after)}", r.name) for r in self.replaced]
        outcomes += [(f"{_title(m.type)} left: {m.reason}", m.name) for m in self.left]
        counts = Counter(what for what, _ in outcomes)
        first = dict(reversed(outcomes))
        return [(what, n, first[what] or "the model itself") for what, n in counts.most_common()]


def accelerate(
    model: Module,
    *,
    functional: bool = False,
    exclude: Collection[str | type[Module]] = (),
) -> Report:
    """Replace torch.nn modules of `model` by their llmkern.nn forms, in place.

    Parameters, hooks, dtype, device, mode, state_dict, deepcopy, pickle and optimizers go on as
    before; a torch.compile'd model recompiles. Done twice it is as once.

    Args:
        model: any module; it is replaced itself if it is one of torch.nn's.
        functional: while model's forward runs, also reroute the torch.nn.functional calls in it, as
            `llmkern.override` does.
        exclude: names of modules (with all below them) and exact types to leave as they are.

    Returns:
        A report; `report.undo()` takes everything back.
    """
    report = Report()
    for name, module in list(model.named_modules()):
        reason = _excluded(name, module, exclude) or _reason(module)
        replacement = REPLACEMENTS.get(type(module))
        if reason is None and replacement is not None:
            report.replaced.append(Replaced(name, type(module), replacement))
            report._undo.append((weakref.ref(module), type(module), replacement))
            module.__class__ = replacement
        elif reason is not None:
            report.left.append(Left(name, type(module), reason))
    if functional:
        _reroute(getattr(model, "_orig_mod", model), report)  # what torch.compile wraps
    return report


def _excluded(name: str, module: Module, exclude: Collection[str | type[Module]]) -> str | None:
    parts = name.split(".")
    prefixes = {".".join(parts[:n]) for n in range(1, len(parts) + 1)}
    if type(module) in exclude or not prefixes.isdisjoint(e for e in exclude if isinstance(e, str)):
        return "excluded"
    return None


def _reason(module: Module) -> str | None:
    """Why a module is left as it is; None for those that are replaced, those that llmkern made, and
    containers."""
    cls = type(module)
    if cls in REPLACEMENTS:
        if "forward" in module.__dict__:
            return "its forward is set on the instance"
        for name, parameter in module.named_parameters(recurse=False):
            if type(parameter) is not Parameter:
                return f"its {name} is a {type(parameter).__name__}"
        return None
    if _base(cls) in REPLACEMENTS.values() or cls in REPLACEMENTS.values() or cls in _CONTAINERS:
        return None
    if isinstance(module, torch.jit.ScriptModule):
        return "compiled by torch.jit"
    if parametrize.is_parametrized(module) and cls.__bases__[0] in REPLACEMENTS:
        return "parametrized"
    for torch_type in REPLACEMENTS:
        if isinstance(module, torch_type):
            own = (
                "with its own forward"
                if cls.forward is not torch_type.forward
                else "not known here"
            )
            return f"a subclass of {_title(torch_type)}, {own}"
    if cls.__module__.startswith("torch.nn."):
        return "no kernel for it"
    return "runs its own forward"


def _reroute(model: Module, report: Report) -> None:
    cls = type(model)
    if _base(cls) is None:
        if isinstance(model, torch.jit.ScriptModule) or "forward" in model.__dict__:
            report.left.append(Left("", cls, "calls in it are not rerouted: its forward is fixed"))
            return
        model.__dict__[_MODE] = Rerouting()
        model.__class__ = _rerouted(cls)
        report._rerouted = weakref.ref(model)
    report.rerouting = model.__dict__[_MODE]


@functools.cache
def _rerouted(base: type[Module]) -> type[Module]:
    """A subclass of `base` that runs base's forward under the model's Rerouting. It goes by base's
    name, and is pickled and copied by way of base, which can be found by name."""

    @functools.wraps(base.forward)
    def forward(self, *args, **kwargs):
        with self.__dict__[_MODE]:
            return base.forward(self, *args, **kwargs)

    def __reduce_ex__(self, protocol):
        make, arguments, *state = base.__reduce_ex__(self, protocol)
        if make is copyreg.__newobj__ and arguments[0] is type(self):
            make, arguments = _rebuild, (base, *arguments[1:])
        return make, arguments, *state

    members = {
        "forward": forward,
        "__reduce_ex__": __reduce_ex__,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "_llmkern_base": base,
    }
    return types.new_class(base.__name__, (base,), exec_body=lambda body: body.update(members))


def _rebuild(base: type[Module], *arguments: object) -> Module:
    return base.__new__(_rerouted(base), *arguments)


def _base(cls: type[Module]) -> type[Module] | None:
    """The class that a rerouted class stands for; None for any other."""
    return cls.__dict__.get("_llmkern_base")


def _title(cls: type[Module]) -> str:
    for package in ("torch.nn", "llmkern.nn"):
        if cls.__module__.startswith(f"{package}."):
            return f"{package}.{cls.__name__}"
    return cls.__qualname__
