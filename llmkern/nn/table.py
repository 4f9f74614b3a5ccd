"""The type table: which llmkern.nn class stands for which torch.nn class.

A replacement subclasses the class it stands for and adds no state of its own, so that changing
`module.__class__` is all it takes to put it in, or to take it out again.

For torch.fx a replacement is what it replaces: a leaf. A Tracer, and tracers derived from it, take
for leaves the modules whose `module.__module__` starts with "torch.nn"; tracing into one would
freeze its mode (train or eval) into the graph.
"""

from collections.abc import Callable, Container

from torch.nn import Module

REPLACEMENTS: dict[type[Module], type[Module]] = {}


class _ModuleName(str):
    """`__module__` of a replacement: read from the class it is the class's own, by which pickle
    finds it; read from an instance it starts as that of torch's modules does."""

    def __get__(self, instance: object, owner: type | None = None) -> str:
        return self if instance is None else f"torch.nn, for which stands {self}"

    def __reduce_ex__(self, protocol: object) -> tuple:  # pickle reads back plain strings only
        return str, (str(self),)


def replaces(torch_type: type[Module]) -> Callable[[type[Module]], type[Module]]:
    """Class decorator: enter the class into the table under the class it stands for."""

    def enter(replacement: type[Module]) -> type[Module]:
        replacement.__module__ = _ModuleName(replacement.__module__)
        REPLACEMENTS[torch_type] = replacement
        return replacement

    return enter


def adopt(module: Module, leave: Container[Module] = ()) -> None:
    """Replace all descendants of a module that torch's constructor has just built."""
    for child in module.children():
        if child in leave:
            continue
        replacement = REPLACEMENTS.get(type(child))
        if replacement is not None:
            child.__class__ = replacement
        adopt(child, leave)
