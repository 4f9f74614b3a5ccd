"""The public functions. Each takes torch's signature first; what is ours is keyword-only."""

from llmkern.ops.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm

__all__ = [
    "add_layer_norm",
    "add_rms_norm",
    "layer_norm",
    "rms_norm",
]
