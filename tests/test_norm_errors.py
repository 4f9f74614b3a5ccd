"""What LayerNorm and RMSNorm reject, and with which words; torch's error types are theirs too."""

import pytest
import torch

from llmkern import errors
from llmkern.functional import add_layer_norm, layer_norm, rms_norm

X, ONES = torch.ones(2, 8), torch.ones(8)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"input": [1.0]}, errors.DtypeError, "input must be a Tensor, got list"),
        ({"input": X.long()}, errors.DtypeError, "input must be one of .*, got int64"),
        ({"input": X.to_sparse()}, errors.ShapeError, "input must be a strided tensor"),
        (
            {"normalized_shape": ()},
            errors.ShapeError,
            "normalized_shape must have at least one dim",
        ),
        (
            {"normalized_shape": 7},
            errors.ShapeError,
            r"end in normalized_shape \[7\], got \[2, 8\]",
        ),
        ({"normalized_shape": (3, 2, 8)}, errors.ShapeError, r"\[3, 2, 8\], got \[2, 8\]"),
        ({"weight": torch.ones(7)}, errors.ShapeError, r"weight must be \[8\] .*, got \[7\]"),
        ({"weight": 2.0}, errors.DtypeError, "weight must be a Tensor, got float"),
        ({"bias": torch.ones(1, 8)}, errors.ShapeError, r"bias must be \[8\] .*, got \[1, 8\]"),
        ({"weight": ONES.bfloat16()}, errors.DtypeError, "weight must be float32 .*, got bfloat16"),
        ({"weight": ONES.double()}, errors.DtypeError, "weight must be float32 .*, got float64"),
        ({"input": X.double(), "weight": ONES}, errors.DtypeError, "weight must be float64"),
        (
            {"input": X.bfloat16(), "weight": ONES, "bias": ONES.bfloat16()},
            errors.DtypeError,
            r"bias must be float32 \(as weight\), got bfloat16",
        ),
        (
            {"input": X.half(), "weight": ONES.bfloat16()},
            errors.DtypeError,
            "weight must be float16, float32 .*, got bfloat16",
        ),
        (
            {"weight": ONES.to("meta")},
            errors.DeviceError,
            "weight must be on cpu as input, got meta",
        ),
        ({"eps": -1e-5}, errors.ArgumentError, "eps must be >= 0, got -1e-05"),
        ({"eps": float("nan")}, errors.ArgumentError, "eps must be >= 0, got nan"),
        ({"backend": "tpu"}, errors.BackendError, "backend must be one of .*, got 'tpu'"),
    ],
)
def test_layer_norm_rejects(arguments, error, text):
    with pytest.raises(error, match=text) as caught:
        layer_norm(**{"input": X, "normalized_shape": 8, **arguments})
    assert isinstance(caught.value, RuntimeError)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"residual": torch.ones(2, 1)}, errors.ShapeError, r"residual must be \[2, 8\]"),
        ({"residual": None}, errors.DtypeError, "residual must be a Tensor, got NoneType"),
        (
            {"residual": X.double()},
            errors.DtypeError,
            "residual must be float32, bfloat16, float16",
        ),
        ({"residual": X.to("meta")}, errors.DeviceError, "residual must be on cpu"),
        (
            {"input": X.half(), "residual": X.bfloat16()},
            errors.DtypeError,
            "residual must be float16, float32 .*, got bfloat16",
        ),
        ({"input": X.bfloat16(), "weight": ONES.bfloat16()}, errors.DtypeError, "must be float32"),
        ({"dropout_p": 1.1}, errors.ArgumentError, r"dropout_p must be in \[0, 1\], got 1.1"),
    ],
)
def test_add_layer_norm_rejects(arguments, error, text):
    with pytest.raises(error, match=text):
        add_layer_norm(**{"input": X, "residual": X, "normalized_shape": 8, **arguments})


def test_rejections_are_not_remembered_as_plans():
    assert layer_norm(X, 8, ONES).shape == (2, 8)
    for _ in range(2):
        with pytest.raises(errors.ShapeError):
            layer_norm(X, 8, torch.ones(9))
    with pytest.raises(errors.DtypeError):
        rms_norm(X, 8, ONES.half())
