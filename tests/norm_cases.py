"""A residual norm with dropout that returns z too, against torch's with the same mask."""

import torch
from rule import check_rule, gradients, leaves
from torch import Tensor
from torch.nn import functional

from llmkern import random, use_backend
from llmkern.functional import add_layer_norm, add_rms_norm


def check_add_norm(backend: str, kind: str, tensors: list[Tensor], p: float) -> None:
    """kind: "layer" or "rms"; tensors: x, residual [rows, cols], weight, bias [cols]. Outputs and
    gradients keep the accuracy rule."""
    rows, cols = tensors[0].shape
    dtype = tensors[0].dtype
    torch.manual_seed(3)
    state = torch.get_rng_state()
    seed = random.draw_seed(torch.device("cpu"))
    factor = random.flat_keep_mask(seed, (rows, cols), p).double() * random.scale(p)

    def ours(x, residual, weight, bias):
        torch.set_rng_state(state)
        if kind == "layer":
            return add_layer_norm(x, residual, cols, weight, bias, dropout_p=p, prenorm=True)
        return add_rms_norm(x, residual, cols, weight, 1e-5, dropout_p=p, prenorm=True)

    def theirs(x, residual, weight, bias):
        z = x * factor.to(x.dtype) + residual
        if kind == "layer":
            return functional.layer_norm(z, (cols,), weight, bias), z
        return functional.rms_norm(z, (cols,), weight, 1e-5), z

    used = slice(None) if kind == "layer" else slice(0, -1)
    results = []
    for function, dtype_of in ((ours, dtype), (theirs, dtype), (theirs, torch.float64)):
        inputs = leaves(tensors, dtype_of)
        with use_backend(backend):
            outputs = function(*inputs)
            results.append([*outputs, *gradients(outputs, inputs[used])])
    for index, (got, torchs, exact) in enumerate(zip(*results, strict=True)):
        check_rule(f"{kind} {index}", got, torchs, exact)
