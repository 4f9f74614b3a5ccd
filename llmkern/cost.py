"""FLOPs and minimum bytes of an op's forward, from its spec alone.

Bytes: every input read once, every output written once. It bounds a call, it does not measure it.
"""

from typing import NamedTuple

from llmkern.specs import (
    UNBOUNDED,
    ActivationSpec,
    AttentionSpec,
    DropoutSpec,
    LinearSpec,
    NormSpec,
)


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


def visible_pairs(spec: AttentionSpec) -> int:
    """(query, key) pairs inside the band of one head, without element masks."""
    if spec.left >= UNBOUNDED and spec.right >= UNBOUNDED:
        return spec.q_len * spec.kv_len
    pairs = 0
    for i in range(spec.q_len):
        place = i + spec.shift
        first, last = max(0, place - spec.left), min(spec.kv_len - 1, place + spec.right)
        pairs += max(0, last - first + 1)
    return pairs


def _attention(spec: AttentionSpec) -> Cost:
    pairs = spec.batch * spec.heads * visible_pairs(spec)
    queries = spec.batch * spec.heads * spec.q_len * (spec.head_dim + spec.value_dim)
    keys = spec.batch * spec.kv_heads * spec.kv_len * (spec.head_dim + spec.value_dim)
    flops = 2 * pairs * (spec.head_dim + spec.value_dim)
    return Cost(flops, (queries + keys) * spec.dtype.itemsize)


def _linear(spec: LinearSpec) -> Cost:
    m, n, k = spec.rows, spec.out_features, spec.in_features
    parts = 2 if spec.gated else 1
    written = 1 + (parts if spec.keep_preact else 0)
    elements = m * k + parts * n * k + (written + spec.residual) * m * n
    return Cost(parts * 2 * m * n * k, elements * spec.dtype.itemsize)


def _dropout(spec: DropoutSpec) -> Cost:
    # A Philox call of 7 rounds, 10 integer operations each, serves 8 elements.
    return Cost(10 * spec.elements, 2 * spec.elements * spec.dtype.itemsize)


def _activation(spec: ActivationSpec) -> Cost:
    operations = {"relu": 1, "gelu": 30, "gelu_tanh": 25, "silu": 20}[spec.activation]
    return Cost(operations * spec.elements, 2 * spec.elements * spec.dtype.itemsize)


_COSTS = {
    "activation": _activation,
    "attention": _attention,
    "dropout": _dropout,
    "linear": _linear,
    "norm": _norm,
}
