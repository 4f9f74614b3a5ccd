"""What `accelerate` did to a model: its report, which also takes it back."""

import weakref
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch.nn import Module, parameter

from llmkern import rerouted
from llmkern.override import Rerouting

_LOOKUPS = (torch.nn.Embedding, torch.nn.EmbeddingBag)
_NOTABLE = 0.01  # share of parameters or FLOPs from which a module left alone comes first


class Replaced(NamedTuple):
    name: str  # in the model; "" is the model itself
    before: type[Module]
    after: type[Module]


class Left(NamedTuple):
    name: str
    type: type[Module]
    reason: str


class Share(NamedTuple):
    """Of the whole model's, 0 to 1. FLOPs are those of products with weights: 2 for each element of
    each weight of 2 or more dims and each token, none for an embedding, which is looked up."""

    parameters: float = 0.0
    flops: float = 0.0

    def __str__(self) -> str:
        parts = [
            f"{share:.0%} of {what}".replace("%", " %")
            for share, what in ((self.parameters, "parameters"), (self.flops, "weight FLOPs"))
            if share >= 0.005
        ]
        return f" ({', '.join(parts)})" if parts else ""


class Row(NamedTuple):
    """What happened, to how many modules, the name of the first, and their share of the model."""

    what: str
    count: int
    first: str
    share: Share


class Report:
    """What `accelerate` did. As a context manager it undoes it at the end.

    Attributes:
        replaced: every module that got a llmkern class.
        left: every other one that computes something, with the reason. Containers and modules that
            only call the modules in them are not listed.
        rerouting: with functional=True, the counts of rerouted calls (see `llmkern.override`).

    Its text has first what was left alone and holds 1 % or more of the parameters or of the FLOPs
    (`Share`), then what was replaced, then the rest, each by share.
    """

    def __init__(self, shares: dict[str, Share] | None = None) -> None:
        self.replaced: list[Replaced] = []
        self.left: list[Left] = []
        self.rerouting: Rerouting | None = None
        self._shares = shares or {}
        self._undo: list[tuple[weakref.ref[Module], type[Module], type[Module]]] = []
        self._rerouted: list[weakref.ref[Module]] = []

    def undo(self) -> None:
        """Give every module the class that it had. A module whose class somebody else has changed
        since then is left as it is; undoing twice is as once."""
        for reference in self._rerouted:
            module = reference()
            if module is not None:
                rerouted.restore(module)
        for reference, before, after in self._undo:
            module = reference()
            if type(module) is after:
                module.__class__ = before
            elif rerouted.base(type(module)) is after:  # rerouted by a later accelerate
                module.__class__ = rerouted.stand_in(before)
        self._rerouted.clear()
        self._undo.clear()

    def __enter__(self) -> "Report":
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()

    def __str__(self) -> str:
        lines = [
            f"llmkern: {len(self.replaced)} modules replaced, {len(self.left)} left as they are"
        ]
        lines += [f"  {row.count:4d} x {row.what}{row.share}" for row in self._rows()]
        if self.rerouting is not None:
            lines += [f"  {line}" for line in str(self.rerouting).splitlines()]
        return "\n".join(lines)

    __repr__ = __str__

    def __rich__(self):
        """A table, for rich.print."""
        from rich.table import Table

        table = Table(title=str(self).splitlines()[0])
        for column in ("modules", "count", "first", "parameters", "weight FLOPs"):
            table.add_column(column)
        for what, n, name, share in self._rows():
            table.add_row(what, str(n), name, f"{share.parameters:.0%}", f"{share.flops:.0%}")
        return table

    def _rows(self) -> list[Row]:
        replaced = [(f"{title(r.before)} -> {title(r.after)}", r.name) for r in self.replaced]
        left = [(f"{title(m.type)} left: {m.reason}", m.name) for m in self.left]
        rows = self._grouped(left)
        notable = [row for row in rows if max(row.share) >= _NOTABLE]
        return notable + self._grouped(replaced) + [row for row in rows if row not in notable]

    def _grouped(self, outcomes: list[tuple[str, str]]) -> list[Row]:
        counts = Counter(what for what, _ in outcomes)
        rows = []
        for what, count in counts.most_common():
            names = [name for other, name in outcomes if other == what]
            shares = [self._shares.get(name, Share()) for name in names]
            share = Share(*(sum(values) for values in zip(*shares, strict=True)))
            rows.append(Row(what, count, names[0] or "the model itself", share))
        return sorted(rows, key=lambda row: sum(row.share), reverse=True)  # stable: then by count


def shares(modules: Iterable[tuple[str, Module]]) -> dict[str, Share]:
    """The share of each module's own parameters, by its name. A tied weight is a parameter of the
    first module that has it, and multiplied by each."""
    seen: set[int] = set()
    found = {}
    for name, module in modules:
        numbers = flops = 0
        for p in module._parameters.values():
            if p is None or parameter.is_lazy(p):
                continue
            numbers += 0 if id(p) in seen else p.numel()
            product = p.dim() > 1 and p.shape[0] > 1 and not isinstance(module, _LOOKUPS)
            flops += 2 * p.numel() if product else 0
            seen.add(id(p))
        found[name] = numbers, flops
    all_numbers, all_flops = (max(sum(x), 1) for x in zip(*found.values(), strict=True))
    return {name: Share(n / all_numbers, f / all_flops) for name, (n, f) in found.items()}


def title(cls: type[Module]) -> str:
    """The name by which users know a class: torch.nn.Linear, not torch.nn.modules.linear.Linear."""
    for package in ("torch.nn", "llmkern.nn"):
        if cls.__module__.startswith(f"{package}."):
            return f"{package}.{cls.__name__}"
    return cls.__qualname__
