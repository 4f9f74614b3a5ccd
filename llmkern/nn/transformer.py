"""Transformer."""

import functools
import inspect

import torch

from llmkern.nn.table import adopt, replaces


@replaces(torch.nn.Transformer)
class Transformer(torch.nn.Transformer):
    """torch.nn.Transformer built of llmkern's encoder and decoder; a custom one stays as given."""

    @functools.wraps(torch.nn.Transformer.__init__)
    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        given = inspect.signature(super().__init__).bind(*args, **kwargs).arguments
        custom = [given.get("custom_encoder"), given.get("custom_decoder")]
        adopt(self, leave=[module for module in custom if module is not None])
