"""accelerate(model): torch.nn modules become llmkern.nn modules, in place and reversibly.

A replacement is a change of `__class__` from llmkern.nn's type table. Nothing else of a module
moves: parameters, buffers, hooks, mode, and what refers to them (optimizers, other modules) stay.
"""

import difflib
import inspect
import weakref
from collections.abc import Collection

import torch
from torch.nn import Module, Parameter
from torch.nn.utils import parametrize

from llmkern import rerouted
from llmkern.errors import ArgumentError
from llmkern.nn.table import REPLACEMENTS
from llmkern.override import NAMES, Rerouting
from llmkern.report import Left, Replaced, Report, shares, title

_CONTAINERS = (torch.nn.ModuleList, torch.nn.ModuleDict, torch.nn.Sequential, torch.nn.Identity)
_COMPILED = "_orig_mod"  # attribute of torch.compile's wrapper: the model


def accelerate(
    model: Module,
    *,
    functional: bool = False,
    exclude: str | type[Module] | Collection[str | type[Module]] = (),
) -> Report:
    """Replace torch.nn modules of `model` by their llmkern.nn forms, in place.

    Parameters, hooks, dtype, device, mode, state_dict, deepcopy, pickle and optimizers go on as
    before; a torch.compile'd model recompiles. Done twice it is as once.

    Args:
        model: any module; it is replaced itself if it is one of torch.nn's.
        functional: also reroute the torch.nn.functional calls that the model's modules make, as
            `llmkern.override` does, whenever the model or any module in it is called. Calls that a
            method makes outside any module call (F.linear in a training_step) are not reached:
            `with llmkern.override()` in it, or around it, is.
        exclude: names of modules (with all below them) and exact types to leave as they are. With
            functional, calls that they make while the model runs are rerouted nonetheless.

    Returns:
        A report; `report.undo()` takes everything back.

    Raises:
        ArgumentError: exclude has a name that no module has, or what is neither name nor type;
            nothing is changed then.
    """
    excluded = _excluded(model, exclude)
    modules = list(model.named_modules())
    report = Report(shares(modules))
    for name, module in modules:
        reason = "excluded" if id(module) in excluded else _reason(module)
        replacement = REPLACEMENTS.get(type(module))
        if reason is None and replacement is not None:
            report.replaced.append(Replaced(name, type(module), replacement))
            report._undo.append((weakref.ref(module), type(module), replacement))
            module.__class__ = replacement
        elif reason is not None:
            report.left.append(Left(name, type(module), reason))
    if functional:
        _reroute(getattr(model, _COMPILED, model), excluded, report)
    return report


def _excluded(model: Module, exclude: str | type[Module] | Collection) -> set[int]:
    """The ids of the modules that `exclude` names, under whichever of their names, and of those
    below them."""
    entries = [exclude] if isinstance(exclude, str | type) or exclude is None else list(exclude)
    by_name: dict[str, Module] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        by_name.setdefault(name, module)
        by_name.setdefault(".".join(p for p in name.split(".") if p != _COMPILED), module)
    found: set[int] = set()
    for entry in entries:
        if isinstance(entry, str):
            if entry not in by_name:
                raise ArgumentError(_unknown_name(entry, by_name))
            found |= {id(module) for module in by_name[entry].modules()}
        elif isinstance(entry, type):
            found |= {id(module) for module in model.modules() if type(module) is entry}
        else:
            raise ArgumentError(
                "accelerate: exclude must hold names of modules and module classes, got a "
                f"{type(entry).__name__}: {entry!r}"
            )
    return found


def _unknown_name(entry: str, by_name: dict[str, Module]) -> str:
    text = f"accelerate: exclude: no module is named {entry!r}"
    for module in by_name.values():
        if entry in (type(module).__name__, title(type(module))):
            return f"{text}; to leave a class as it is give the class itself, {title(type(module))}"
    last = entry.rpartition(".")[2]
    near = difflib.get_close_matches(entry, by_name, 5)
    ends = difflib.get_close_matches(last, {name.rpartition(".")[2] for name in by_name}, 3)
    near += [name for name in by_name if name.rpartition(".")[2] in ends and name not in near]
    return f"{text}; near it: {', '.join(near[:5])}" if near else text


def _reason(module: Module) -> str | None:
    """Why a module is left as it is; None for those that are replaced, those that llmkern made, and
    containers."""
    cls = rerouted.base(type(module)) or type(module)
    if cls in REPLACEMENTS:
        if "forward" in module.__dict__:
            return "its forward is set on the instance"
        for name, parameter in module.named_parameters(recurse=False):
            if type(parameter) is not Parameter:
                return f"its {name} is a {type(parameter).__name__}"
        return None
    if cls in REPLACEMENTS.values() or cls in _CONTAINERS:
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
            return f"a subclass of {title(torch_type)}, {own}"
    if cls.__module__.startswith("torch.nn.") and not module._modules:
        return "no kernel for it"
    return None if _only_calls_others(module, cls) else "runs its own forward"


def _only_calls_others(module: Module, cls: type[Module]) -> bool:
    """Whether a module of `cls` is there for the modules in it: it has some, no parameter of its
    own, and a forward that names no function which `override` knows."""
    if not module._modules or any(p is not None for p in module._parameters.values()):
        return False
    code = getattr(inspect.unwrap(cls.forward), "__code__", None)
    named = set(code.co_names if code is not None else ())
    return NAMES.isdisjoint(named - module._modules.keys() - module.__dict__.keys())


def _reroute(model: Module, excluded: set[int], report: Report) -> None:
    """Reroute the model, and the modules in it whose class is not torch's or llmkern's own."""
    mode = rerouted.mode_of(model) or Rerouting()
    for name, module in list(model.named_modules()):
        cls = type(module)
        kind = cls.__bases__[0] if parametrize.is_parametrized(module) else cls
        ours = cls in REPLACEMENTS.values() or cls in _CONTAINERS or hasattr(module, _COMPILED)
        outside = ours or kind.__module__.startswith("torch.nn.") or id(module) in excluded
        if rerouted.base(cls) is not None or (outside and module is not model):
            continue
        refusal = rerouted.reroute(module, mode)
        if refusal is None:
            report._rerouted.append(weakref.ref(module))
        else:
            report.left.append(Left(name, cls, f"calls in it are not rerouted: {refusal}"))
    if rerouted.mode_of(model) is mode or report._rerouted:
        report.rerouting = mode
