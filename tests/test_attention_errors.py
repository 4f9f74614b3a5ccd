"""Bad attention calls: an error of our own type that names op, tensor and rule, before anything is
allocated; and what torch refuses, we refuse."""

import warnings

import pytest
import torch
import torch.nn.functional as F

from llmkern.errors import ArgumentError as ARGUMENT
from llmkern.errors import BackendError, DeviceError
from llmkern.errors import DtypeError as DTYPE
from llmkern.errors import ShapeError as SHAPE
from llmkern.functional import (
    attention_kvpacked,
    attention_qkvpacked,
    scaled_dot_product_attention,
)


def t(*shape, dtype=torch.float32):
    return torch.randn(shape).to(dtype)


Q, K, V = t(2, 4, 5, 8), t(2, 4, 7, 8), t(2, 4, 7, 8)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # nested tensors are a prototype
    NESTED = torch.nested.nested_tensor([Q[0], Q[1]])

# (arguments, keywords, error, part of the message); all of these torch refuses too.
AS_TORCH = {
    "not a tensor": ((Q, K, 1), {}, DTYPE, "value must be a Tensor, got int"),
    "mask not a tensor": ((Q, K, V, "x"), {}, DTYPE, "attn_mask must be a Tensor"),
    "one dim": ((t(8), K, V), {}, SHAPE, "query must have at least 2 dims"),
    "integers": ((Q.int(), K.int(), V.int()), {}, DTYPE, "query must be one of float32"),
    "complex": ((Q.cfloat(), K.cfloat(), V.cfloat()), {}, DTYPE, "query must be one of"),
    "dtypes differ": ((Q, K.double(), V), {}, DTYPE, "key must be float32 (as query)"),
    "value's dtype": ((Q, K, V.half()), {}, DTYPE, "value must be float32 (as query)"),
    "head dims differ": ((Q, t(2, 4, 7, 9), V), {}, SHAPE, "key must have the last dim of"),
    "batches differ": ((Q, t(3, 4, 7, 8), V), {}, SHAPE, "leading dims of key must"),
    "heads differ": ((Q, K[:, :2], V[:, :2]), {}, SHAPE, "(or enable_gqa=True), got 2"),
    "groups": ((Q, K[:, :3], V[:, :3]), dict(enable_gqa=True), SHAPE, "must divide the 4"),
    "gqa of 2-D": ((Q[0, 0], K[0, 0], V[0, 0]), dict(enable_gqa=True), SHAPE, "3 dims"),
    "integer mask": ((Q, K, V, torch.ones(5, 7).int()), {}, DTYPE, "attn_mask must be bool"),
    "double mask": ((Q, K, V, torch.ones(5, 7).double()), {}, DTYPE, "attn_mask must be"),
    "half mask": ((Q.bfloat16(), K.bfloat16(), V.bfloat16(), torch.ones(5, 7).half()), {},
                  DTYPE, "attn_mask must be bool, float32, bfloat16 (or query's)"),
    "mask of 1 dim": ((Q, K, V, t(7)), {}, SHAPE, "attn_mask must have 2 to 4 dims"),
    "mask of 0 dims": ((Q, K, V, torch.tensor(True)), {}, SHAPE, "attn_mask must have"),
    "mask of 5 dims": ((Q, K, V, t(1, 2, 4, 5, 7)), {}, SHAPE, "broadcast to [2, 4, 5, 7]"),
    "mask size": ((Q, K, V, t(5, 6)), {}, SHAPE, "[2, 4, 5, 7], got [5, 6]"),
    "mask heads": ((Q, K, V, t(3, 5, 7)), {}, SHAPE, "attn_mask must have"),
    "mask of 2-D": ((Q[0, 0], K[0, 0], V[0, 0], t(1, 5, 7)), {}, SHAPE, "2 to 2 dims"),
    "p above 1": ((Q, K, V), dict(dropout_p=1.5), ARGUMENT, "dropout_p must be in [0, 1]"),
    "p below 0": ((Q, K, V), dict(dropout_p=-0.1), ARGUMENT, "got -0.1"),
}  # fmt: skip

OURS = {
    "lengths": ((Q, K, t(2, 4, 6, 8)), {}, SHAPE, "value must have the length of key, 7"),
    "p is NaN": ((Q, K, V), dict(dropout_p=float("nan")), ARGUMENT, "got nan"),
    "alignment": ((Q, K, V), dict(causal_align="left"), ARGUMENT, "causal_align must be"),
    "window": ((Q, K, V), dict(window=5), ARGUMENT, "window must be (left, right)"),
    "window of 3": ((Q, K, V), dict(window=(1, 2, 3)), ARGUMENT, "window must be"),
    "window below -1": ((Q, K, V), dict(window=(-2, 0)), ARGUMENT, "got (-2, 0)"),
    "window of floats": ((Q, K, V), dict(window=(1.5, 0)), ARGUMENT, "window must be"),
    "softcap": ((Q, K, V), dict(softcap=-1.0), ARGUMENT, "softcap must be >= 0"),
    "softcap inf": ((Q, K, V), dict(softcap=float("inf")), ARGUMENT, "finite, got inf"),
    "slopes": ((Q, K, V), dict(alibi_slopes=t(3)), SHAPE, "alibi_slopes must be [4]"),
    "slopes' dtype": ((Q, K, V), dict(alibi_slopes=torch.ones(4).int()), DTYPE, "slopes"),
    "slopes' gradient": ((Q, K, V), dict(alibi_slopes=t(4).requires_grad_()), ARGUMENT,
                         "alibi_slopes get no gradient"),
    "sinks": ((Q, K, V), dict(sinks=t(1)), SHAPE, "sinks must be [4] (heads of query)"),
    "padding": ((Q, K, V), dict(key_padding_mask=torch.ones(2, 5).bool()), SHAPE,
                "key_padding_mask must be [2, 7]"),
    "padding's dtype": ((Q, K, V), dict(key_padding_mask=t(2, 7)), DTYPE, "(True = keep)"),
    "backend": ((Q, K, V), dict(backend="fpga"), BackendError, "backend must be one of"),
    "device": ((Q, K.to("meta"), V), {}, DeviceError, "key must be on cpu as query, got meta"),
    "sparse": ((Q.to_sparse(), K, V), {}, SHAPE, "query must be a strided tensor"),
    "nested": ((NESTED, K, V), {}, SHAPE, "got a nested one"),
}  # fmt: skip


@pytest.fixture
def no_allocation(monkeypatch):
    """After a good call of the same sizes, so that a plan exists which must not serve bad ones."""
    scaled_dot_product_attention(Q, K, V)

    def refuse(*args, **kwargs):
        raise AssertionError("allocated before the arguments were checked")

    for name in ("empty", "empty_like", "empty_strided", "randint"):
        monkeypatch.setattr(torch, name, refuse)


@pytest.mark.parametrize("name", [*AS_TORCH, *OURS])
def test_attention_bad_calls_raise(no_allocation, name):
    args, keywords, error, message = {**AS_TORCH, **OURS}[name]
    with pytest.raises(error) as caught:
        scaled_dot_product_attention(*args, **keywords)
    assert message in str(caught.value)
    if name != "backend":
        assert str(caught.value).startswith("scaled_dot_product_attention: ")


@pytest.mark.parametrize("name", AS_TORCH)
def test_attention_refuses_what_torch_refuses(name):
    args, keywords, _, _ = AS_TORCH[name]
    with pytest.raises((RuntimeError, TypeError, ValueError, IndexError)):
        F.scaled_dot_product_attention(*args, **keywords)


@pytest.mark.parametrize("name", ["dtypes differ", "mask size", "p above 1", "not a tensor"])
def test_attention_errors_are_what_torch_handlers_catch(name):
    args, keywords, _, _ = AS_TORCH[name]
    caught = []
    for function in (F.scaled_dot_product_attention, scaled_dot_product_attention):
        with pytest.raises((RuntimeError, TypeError)) as info:
            function(*args, **keywords)
        caught.append(info.value)
    kind = TypeError if isinstance(caught[0], TypeError) else RuntimeError
    assert isinstance(caught[1], kind)


PACKED = {
    "qkv dims": (attention_qkvpacked, (t(2, 5, 3, 8),), SHAPE, "qkv must be [B, S, 3, H, D], got"),
    "qkv third": (attention_qkvpacked, (t(2, 5, 2, 4, 8),), SHAPE, "[B, S, 3, H, D]"),
    "qkv dtype": (attention_qkvpacked, (t(2, 5, 3, 4, 8).int(),), DTYPE, "qkv must be"),
    "kv dims": (attention_kvpacked, (t(2, 5, 4, 8), t(2, 5, 4, 8)), SHAPE, "[2, T, 2, G, 8], got"),
    "kv batch": (attention_kvpacked, (t(2, 5, 4, 8), t(3, 5, 2, 4, 8)), SHAPE, "kv must be [2"),
    "kv pair": (attention_kvpacked, (t(2, 5, 4, 8), t(2, 5, 3, 4, 8)), SHAPE, "kv must be"),
    "kv dim": (attention_kvpacked, (t(2, 5, 4, 8), t(2, 5, 2, 4, 9)), SHAPE, "G, 8], got"),
    "kv heads": (attention_kvpacked, (t(2, 5, 4, 8), t(2, 5, 2, 3, 8)), SHAPE, "divide the 4"),
    "kv dtype": (attention_kvpacked, (t(2, 5, 4, 8), t(2, 5, 2, 4, 8).double()), DTYPE,
                 "kv must be float32 (as q)"),
}  # fmt: skip


@pytest.mark.parametrize("name", PACKED)
def test_attention_bad_packed_calls_raise(no_allocation, name):
    function, args, error, message = PACKED[name]
    with pytest.raises(error) as caught:
        function(*args)
    assert message in str(caught.value)
    assert str(caught.value).startswith(function.__name__ + ": ")


def test_attention_packed_names_the_mask():
    with pytest.raises(SHAPE, match="attention_qkvpacked: attn_mask must have 2 to 4"):
        attention_qkvpacked(t(2, 5, 3, 4, 8), t(5, 6))
