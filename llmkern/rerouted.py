"""Modules whose calls run under a Rerouting: a change of class, as a replacement is.

The class is a subclass of the module's own that goes by its name. It enters the mode in `__call__`,
which also covers a forward that somebody has set on the instance (Hugging Face Accelerate), and in
`forward`, for those who call that or have kept an earlier `__call__` (torch.compile).
"""

import copyreg
import functools
import types

import torch
import torch.fx
from torch.nn import Module
from torch.nn.utils import parametrize

from llmkern.override import Rerouting

_MODE = "_llmkern_rerouting"  # attribute of a rerouted module
_BASE = "_llmkern_base"  # attribute of its class


def reroute(module: Module, mode: Rerouting) -> str | None:
    """Run the module's calls under `mode`; None, or why that cannot be."""
    cls = type(module)
    if isinstance(module, torch.jit.ScriptModule):
        return "compiled by torch.jit"
    if isinstance(module, torch.fx.GraphModule):
        return "torch.fx writes its class anew; with llmkern.override() around a call they are"
    if parametrize.is_parametrized(module):  # torch takes its class for the one it made
        return "parametrized"
    try:
        module.__class__ = stand_in(cls)
    except TypeError as refused:
        return f"its class has no subclass: {refused}"
    module.__dict__[_MODE] = mode
    return None


def restore(module: Module) -> None:
    """Take `reroute` back. Where somebody has changed the class since then it is left, and what is
    left of ours in it does nothing from now on."""
    module.__dict__.pop(_MODE, None)
    own = base(type(module))
    if own is not None:
        module.__class__ = own


def mode_of(module: Module) -> Rerouting | None:
    return module.__dict__.get(_MODE)


def base(cls: type[Module]) -> type[Module] | None:
    """The class that a rerouted class stands for; None for any other."""
    return cls.__dict__.get(_BASE)


@functools.cache
def stand_in(cls: type[Module]) -> type[Module]:
    """The rerouted class of `cls`. It is pickled and copied by way of cls, which can be found by
    name.

    Raises:
        TypeError: cls cannot be subclassed.
    """

    def __reduce_ex__(self, protocol):
        make, arguments, *state = cls.__reduce_ex__(self, protocol)
        if make is copyreg.__newobj__ and arguments[0] is type(self):
            make, arguments = _rebuild, (cls, *arguments[1:])
        return make, arguments, *state

    members = {
        "__call__": _under_mode(cls, "__call__"),
        "forward": _under_mode(cls, "forward"),
        "__reduce_ex__": __reduce_ex__,
        "__module__": cls.__dict__.get("__module__", cls.__module__),
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        _BASE: cls,
    }
    if all("__init_subclass__" not in c.__dict__ for c in cls.__mro__[:-1]):
        return types.new_class(cls.__name__, (cls,), exec_body=lambda body: body.update(members))
    # cls keeps a register of its subclasses, or wants arguments of them: it is not told of this.
    made = type(cls)(cls.__name__, (Module,), members)
    made.__bases__ = (cls,)
    return made


def _under_mode(cls: type[Module], name: str):
    """The method `name` of cls, under the module's mode unless that is on already."""

    @functools.wraps(getattr(cls, name))
    def method(self, *args, **kwargs):
        mode = self.__dict__.get(_MODE)
        if mode is None or mode.is_on():
            return getattr(cls, name)(self, *args, **kwargs)  # torch.fx patches it for a while
        with mode:
            return getattr(cls, name)(self, *args, **kwargs)

    # torch.compile keeps its work, and counts it against a limit, by code object.
    method.__code__ = method.__code__.replace()
    return method


def _rebuild(cls: type[Module], *arguments: object) -> Module:
    return cls.__new__(stand_in(cls), *arguments)
