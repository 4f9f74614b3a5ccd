"""FLOPs and minimum bytes of an op, forward and backward, from its spec alone.

Bytes: every input read once, every output written once. It bounds a call, it does not measure it.
`bounds` holds that against the data sheets of llmkern/cards.py.
"""

from typing import NamedTuple

from llmkern import cards
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


def backward(op: str, spec: tuple) -> Cost:
    """The cost of all gradients of that call."""
    return _BACKWARD_COSTS[op](spec)


def bounds(op: str, spec: tuple, cost: Cost) -> tuple[cards.Bound, ...]:
    """The least time that work of `cost`, part of a call of `op`, takes on each card."""
    matrix = op in ("attention", "linear")
    return tuple(cards.bound(card, *cost, spec.dtype, matrix) for card in cards.CARDS)


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


def _norm_backward(spec: NormSpec) -> Cost:
    elements = spec.rows * spec.cols
    # dy, z and the gradient that reached z; dx, and the residual's where it is another.
    reads = 3 if spec.add and spec.keep_z else 2
    writes = 2 if spec.add and (spec.dropout_p or spec.x_dtype != spec.dtype) else 1
    return Cost(
        elements * (9 if spec.rms else 12), elements * spec.dtype.itemsize * (reads + writes)
    )


def _attention_backward(spec: AttentionSpec) -> Cost:
    pairs = spec.batch * spec.heads * visible_pairs(spec)
    queries, keys = spec.batch * spec.heads * spec.q_len, spec.batch * spec.kv_heads * spec.kv_len
    # Products: scores again, dP, dV, dQ, dK. Memory: q, k, v, out, dout; dq, dk, dv.
    flops = 2 * pairs * (3 * spec.head_dim + 2 * spec.value_dim)
    elements = 2 * (queries + keys) * (spec.head_dim + spec.value_dim)
    return Cost(flops, elements * spec.dtype.itemsize)


def _linear_backward(spec: LinearSpec) -> Cost:
    m, n, k = spec.rows, spec.out_features, spec.in_features
    parts = 2 if spec.gated else 1
    # dX = dY W and dW = dY^T X; reads dy, x, w and what went into the activation.
    read = m * n * (1 + (parts if spec.keep_preact else 0)) + m * k + parts * n * k
    return Cost(parts * 4 * m * n * k, (read + m * k + parts * n * k) * spec.dtype.itemsize)


def _activation_backward(spec: ActivationSpec) -> Cost:
    return Cost(2 * _activation(spec).flops, 3 * spec.elements * spec.dtype.itemsize)


_BACKWARD_COSTS = {
    "activation": _activation_backward,
    "attention": _attention_backward,
    "dropout": _dropout,  # its own gradient
    "linear": _linear_backward,
    "norm": _norm_backward,
}
_COSTS = {
    "activation": _activation,
    "attention": _attention,
    "dropout": _dropout,
    "linear": _linear,
    "norm": _norm,
}
