"""Says what a call does: the backend that serves each op, those passed over and why, the cost."""

from collections.abc import Callable
from typing import NamedTuple

from torch.nn import Module

from llmkern import cards, cost, dispatch
from llmkern.nn.table import REPLACEMENTS
from llmkern.rerouted import mode_of

_GPU_BACKENDS = ("triton", "cuda")


class OpReport(NamedTuple):
    """One op of the explained call."""

    op: str
    backend: str
    detail: str  # what the backend runs on: instruction set or torch version, and whose product
    spec: tuple
    rejected: tuple[tuple[str, str], ...]  # (backend, why not)
    flops: int
    bytes: int
    forward_bounds: tuple[cards.Bound, ...]  # the least time by each card's data sheet
    backward_bounds: tuple[cards.Bound, ...]
    reason: str = ""  # why the backends were asked in that order, where there is a choice


class Explanation(NamedTuple):
    """The ops of a call in the order they ran. `str()` of it is for people: it leaves the cards'
    bounds to calls for a GPU, and says what to do where no op ran."""

    ops: tuple[OpReport, ...]
    advice: str = ""  # where no op ran

    def __str__(self) -> str:
        if not self.ops:
            return f"no llmkern op ran in this call{self.advice and ': '}{self.advice}"
        lines = []
        for op in self.ops:
            lines.append(f"{op.op}: {op.backend}, {op.detail}")
            lines += [f"  asked {op.reason}"] if op.reason else []
            lines += [f"  passed over {name}: {reason}" for name, reason in op.rejected]
            lines.append(f"  {op.flops / 1e9:.4g} GFLOP, {op.bytes / 1e6:.4g} MB at the least")
            if op.spec.device == "cuda" or op.backend in _GPU_BACKENDS:
                lines.append(
                    "  a bound from data sheets, not a measurement; forward / backward, us:"
                )
                lines.append(f"    {_bounds(op)}")
            fields = ", ".join(f"{k}={v}" for k, v in op.spec._asdict().items())
            lines.append(f"  {fields}")
        return "\n".join(lines)


def _bounds(op: OpReport) -> str:
    pairs = zip(op.forward_bounds, op.backward_bounds, strict=True)
    return ", ".join(
        f"{forward.card} {forward.seconds * 1e6:.3g} / {backward.seconds * 1e6:.3g}"
        for forward, backward in pairs
    )


def explain(function: Callable, *args, **kwargs) -> Explanation:
    """Run `function(*args, **kwargs)` once and report each llmkern op in it.

    Args:
        function: anything callable: a function of llmkern.functional, a module, a training step.

    Returns:
        Explanation: per op the backend that served, the ones passed over with the reason, why they
        were asked in that order, the runtime it uses, FLOPs and minimum bytes (every input read
        once, every output written once), and the least time that these allow on the GPUs of
        llmkern/cards.py. Where no op ran, what to do.

    Raises:
        Whatever the call itself raises.
    """
    with dispatch.recording() as records:
        function(*args, **kwargs)
    ops = tuple(_report(op, spec, decision) for op, spec, decision in records)
    return Explanation(ops, "" if ops else _advice(function))


def _advice(function: Callable) -> str:
    """What makes llmkern's ops run in a call that had none."""
    model = getattr(function, "__self__", function)  # of a bound method
    if not isinstance(model, Module):
        return (
            "torch.nn modules run on llmkern after llmkern.accelerate(model), calls of "
            "torch.nn.functional inside llmkern.override()"
        )
    ours = tuple(REPLACEMENTS.values())
    if not any(isinstance(m, ours) or mode_of(m) is not None for m in model.modules()):
        return "the model is not accelerated; llmkern.accelerate(model) first"
    return (
        "the model is accelerated, but what it ran is left to torch; llmkern.accelerate's report "
        "says why, and functional=True reroutes calls of torch.nn.functional"
    )


def _report(op: str, spec: tuple, decision: dispatch.Decision) -> OpReport:
    forward, backward = cost.of(op, spec), cost.backward(op, spec)
    detail = dispatch.status(decision.backend).detail
    describe = getattr(dispatch.module_of(decision.backend, op), "describe", None)
    if describe is not None:  # what a backend has to say of this call
        detail = f"{detail}, {describe(spec)}"
    return OpReport(
        op,
        decision.backend,
        detail,
        spec,
        decision.rejected,
        *forward,
        cost.bounds(op, spec, forward),
        cost.bounds(op, spec, backward),
        decision.reason,
    )
