"""The type table: which llmkern.nn class stands for which torch.nn class.

A replacement subclasses the class it stands for and adds no state of its own, so that changing
`module.__class__` is all it takes to put it in, or to take it out again.
"""

from collections.abc import Callable, Container

from torch.nn import Module

REPLACEMENTS: dict[type[Module], type[Module]] = {}


def replaces(torch_type: type[Module]) -> Callable[[type[Module]], type[Module]]:
    """Class decorator: enter the class into the table under the class it stands for."""

    def enter(replacement: type[Module]) -> type[Module]:
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
