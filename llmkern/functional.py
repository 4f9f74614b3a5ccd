"""The public functions. Each takes torch's signature first; what is ours is keyword-only.

torch.fx: a call that finds its function here (`functional.linear(...)`) is one node of the graph.
"""

import torch.fx

from llmkern.ops.activation import gelu, relu, silu
from llmkern.ops.attention import (
    attention_kvpacked,
    attention_qkvpacked,
    scaled_dot_product_attention,
)
from llmkern.ops.dropout import dropout
from llmkern.ops.linear import linear, linear_gated
from llmkern.ops.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from llmkern.ops.norm import repeat as repeat_norm  # noqa: F401 (for nn, not for users)

__all__ = [
    "add_layer_norm",
    "add_rms_norm",
    "attention_kvpacked",
    "attention_qkvpacked",
    "dropout",
    "gelu",
    "layer_norm",
    "linear",
    "linear_gated",
    "relu",
    "rms_norm",
    "scaled_dot_product_attention",
    "silu",
]

for _name in __all__:
    torch.fx.wrap(_name)
del _name
