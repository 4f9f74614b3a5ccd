"""Says what a call does: the backend that serves each op, those passed over and why, the cost."""

from collections.abc import Callable
from typing import NamedTuple

from llmkern import cost, dispatch


class OpReport(NamedTuple):
    """One op of the explained call."""

    op: str
    backend: str
    detail: str  # what the backend runs on: instruction set or torch version
    spec: tuple
    rejected: tuple[tuple[str, str], ...]  # (backend, why not)
    flops: int
    bytes: int


class Explanation(NamedTuple):
    """The ops of a call in the order they ran. `str()` of it is for people."""

    ops: tuple[OpReport, ...]

    def __str__(self) -> str:
        if not self.ops:
            return "no llmkern op ran in this call"
        lines = []
        for op in self.ops:
            lines.append(f"{op.op}: {op.backend}, {op.detail}")
            lines += [f"  passed over {name}: {reason}" for name, reason in op.rejected]
            lines.append(f"  {op.flops / 1e9:.4g} GFLOP, {op.bytes / 1e6:.4g} MB at the least")
            fields = ", ".join(f"{k}={v}" for k, v in op.spec._asdict().items())
            lines.append(f"  {fields}")
        return "\n".join(lines)


def explain(function: Callable, *args, **kwargs) -> Explanation:
    """Run `function(*args, **kwargs)` once and report each llmkern op in it.

    Args:
        function: anything callable: a function of llmkern.functional, a module, a training step.

    Returns:
        Explanation: per op the backend that served, the ones passed over with the reason, the
        runtime it uses, FLOPs and minimum bytes (every input read once, every output written once).

    Raises:
        Whatever the call itself raises.
    """
    with dispatch.recording() as records:
        function(*args, **kwargs)
    return Explanation(tuple(_report(op, spec, decision) for op, spec, decision in records))


def _report(op: str, spec: tuple, decision: dispatch.Decision) -> OpReport:
    flops, nbytes = cost.of(op, spec)
    detail = dispatch.status(decision.backend).detail
    return OpReport(op, decision.backend, detail, spec, decision.rejected, flops, nbytes)
