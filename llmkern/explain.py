"""Says what a call does: the backend that serves each op, those passed over and why, the cost."""

from collections.abc import Callable
from typing import NamedTuple

from llmkern import cards, cost, dispatch


class OpReport(NamedTuple):
    """One op of the explained call."""

    op: str
    backend: str
    detail: str  # what the backend runs on: instruction set or torch version
    spec: tuple
    rejected: tuple[tuple[str, str], ...]  # (backend, why not)
    flops: int
    bytes: int
    forward_bounds: tuple[cards.Bound, ...]  # the least time by each card's data sheet
    backward_bounds: tuple[cards.Bound, ...]
    reason: str = ""  # why the backends were asked in that order, where there is a choice


class Explanation(NamedTuple):
    """The ops of a call in the order they ran. `str()` of it is for people."""

    ops: tuple[OpReport, ...]

    def __str__(self) -> str:
        if not self.ops:
            return "no llmkern op ran in this call"
        lines = []
        for op in self.ops:
            lines.append(f"{op.op}: {op.backend}, {op.detail}")
            lines += [f"  asked {op.reason}"] if op.reason else []
            lines += [f"  passed over {name}: {reason}" for name, reason in op.rejected]
            lines.append(f"  {op.flops / 1e9:.4g} GFLOP, {op.bytes / 1e6:.4g} MB at the least")
            lines.append("  a bound from data sheets, not a measurement; forward / backward, us:")
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
        llmkern/cards.py.

    Raises:
        Whatever the call itself raises.
    """
    with dispatch.recording() as records:
        function(*args, **kwargs)
    return Explanation(tuple(_report(op, spec, decision) for op, spec, decision in records))


def _report(op: str, spec: tuple, decision: dispatch.Decision) -> OpReport:
    forward, backward = cost.of(op, spec), cost.backward(op, spec)
    return OpReport(
        op,
        decision.backend,
        dispatch.status(decision.backend).detail,
        spec,
        decision.rejected,
        *forward,
        cost.bounds(op, spec, forward),
        cost.bounds(op, spec, backward),
        decision.reason,
    )
