"""Drop-in torch.nn modules: subclasses with the same constructors, parameters and semantics."""

from llmkern.nn.activation import GELU, ReLU, SiLU
from llmkern.nn.attention import MultiheadAttention
from llmkern.nn.decoder import TransformerDecoder, TransformerDecoderLayer
from llmkern.nn.dropout import Dropout
from llmkern.nn.encoder import TransformerEncoder, TransformerEncoderLayer
from llmkern.nn.linear import Linear
from llmkern.nn.norm import LayerNorm, RMSNorm
from llmkern.nn.table import REPLACEMENTS
from llmkern.nn.transformer import Transformer

__all__ = [
    "GELU",
    "REPLACEMENTS",
    "Dropout",
    "LayerNorm",
    "Linear",
    "MultiheadAttention",
    "RMSNorm",
    "ReLU",
    "SiLU",
    "Transformer",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
]
