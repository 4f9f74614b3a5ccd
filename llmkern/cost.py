"""FLOPs and minimum bytes of an op's forward, from its spec alone.

Bytes: every input read once, every output written once. It bounds a call, it does not measure it.
"""

from typing import NamedTuple

from llmkern.specs import NormSpec


class Cost(NamedTuple):
    flops: int
    bytes: int


def of(op: str, spec: tuple) -> Cost:
    """The cost of one call of `op` as dispatch names it."""
    return _COSTS[op](spec)


def _norm(spec: NormSpec) -> Cost:
    elements = spec.rows * spec.cols
    reads = 2 if spec.add else 1
    writes = 2 if spec.keep_z else 1
    # Mean, centred square, scale and shift: about 8 operations an element, 4 without the mean.
    flops = elements * ((4 if spec.rms else 8) + (1 if spec.add else 0))
    return Cost(flops, elements * spec.dtype.itemsize * (reads + writes))


_COSTS = {"norm": _norm}
