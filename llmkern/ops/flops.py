"""What torch.utils.flop_counter.FlopCounterMode counts for our ops, by the rules that it has for
torch's linear and flash attention: matrix products alone, 2 FLOPs a multiply-add, every pair of
query and key, masked or not, and the scores once more in the backward of attention.
"""

import math
import sys
from collections.abc import Sequence

import torch

from llmkern.torch_private import dispatch_modes

_COUNTER = "torch.utils.flop_counter"


def tell_counter() -> None:
    """Register the formulas with torch's counter if something has imported it: importing it here
    would cost every program half a second (it imports triton). Called under a dispatch mode, so
    maybe under a counter that took its copy of torch's registry before this; it is told as well.
    """
    module = sys.modules.get(_COUNTER)
    if module is None:
        return
    ops = torch.ops.llmkern
    formulas = {
        ops.linear: _linear,
        ops.linear_backward: _linear_backward,
        ops.attention: _attention,
        ops.attention_backward: _attention_backward,
    }
    for op, formula in formulas.items():
        if op not in module.flop_registry:
            module.register_flop_formula(op)(formula)
    for mode in dispatch_modes():
        counter = getattr(mode, "counter", None)
        if isinstance(counter, module.FlopCounterMode):
            for op in formulas:  # a formula that the user gave stays
                counter.flop_registry.setdefault(op, module.flop_registry[op])


def _product(x: Sequence[int], weight: Sequence[int]) -> int:
    return 2 * math.prod(x) * weight[0]


def _linear(x, weight, up_weight, *rest, out_shape=None, **options) -> int:
    return _product(x, weight) * (1 if up_weight is None else 2)


def _linear_backward(dy, x, weight, up_weight, preact, up_preact, seed, activation, dropout_p,
                     wants, backend, out_shape=None, **options) -> int:  # fmt: skip
    wants_x, wants_weight, wants_up, *_ = wants
    of_x = 1 if up_weight is None else 2
    return _product(x, weight) * (of_x * wants_x + wants_weight + wants_up)


def _attention(q, k, v, *rest, out_shape=None, **options) -> int:
    pairs, dim, value_dim = _pairs(q, k, v)
    return 2 * pairs * (dim + value_dim)


def _attention_backward(dout, dlse, q, k, v, *rest, out_shape=None, **options) -> int:
    # Scores again, dQ and dK over the head dim; dP and dV over the value dim.
    pairs, dim, value_dim = _pairs(q, k, v)
    return 2 * pairs * (3 * dim + 2 * value_dim)


def _pairs(q, k, v) -> tuple[int, int, int]:
    """(pairs of all heads, head dim, value dim) of the op's arguments: qkv [B, S, 3, H, D];
    q [B, S, H, D] and kv [B, T, 2, G, D]; or q [B, H, S, D], k and v [B, G, T, D]."""
    if k is None:
        batch, length, _, heads, dim = q
        return batch * heads * length * length, dim, dim
    if v is None:
        batch, length, heads, dim = q
        return batch * heads * length * k[1], dim, dim
    batch, heads, length, dim = q
    return batch * heads * length * k[2], dim, v[3]
