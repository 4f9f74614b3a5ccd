"""Attention: csrc/cuda/attention_fwd.cu, attention_bwd.cu.

16-bit types, causal and windowed bands, key masks, dropout, grouped heads, head dims that are
multiples of 8 up to 128. The rest is left to the next backend, by name in `supports`."""

import torch
from torch import Tensor

from llmkern import random
from llmkern.backends.cuda import _ext
from llmkern.backends.cuda._ext import DTYPE_CODES, Launch, contiguous, shown
from llmkern.specs import AttentionSpec

_MAX_DIM = 128
_UNIT = 8  # elements: what the kernels load at a time
_MAX_LENGTH = 1 << 28
_MAX_GRID = 65535  # batch and heads are grid dims y and z


def supports(spec: AttentionSpec) -> str | None:
    asked = {
        "a bias": spec.bias,
        "a boolean mask over queries and keys": spec.mask,
        "ALiBi slopes": spec.slopes,
        "sinks": spec.sinks,
        "softcap": spec.softcap > 0.0,
        "a scale of 0 or less": not spec.scale > 0.0,
        "float32": spec.dtype == torch.float32,
    }
    for name, present in asked.items():
        if present:
            return f"its attention kernels do not serve {name}"
    dims = (spec.head_dim, spec.value_dim)
    if max(dims) > _MAX_DIM or min(dims) < _UNIT or any(dim % _UNIT for dim in dims):
        return f"its head dims are multiples of {_UNIT} up to {_MAX_DIM}, got {dims}"
    if max(spec.q_len, spec.kv_len, abs(spec.shift)) > _MAX_LENGTH:
        return f"its lengths go up to {_MAX_LENGTH}"
    if max(spec.batch, spec.heads) > _MAX_GRID:
        return f"its batches and heads go up to {_MAX_GRID}"
    return _ext.refusal(spec.device, spec.dtype)


def _shape(spec: AttentionSpec, seed: Tensor | None) -> tuple:
    threshold = random.threshold(spec.dropout_p) if spec.dropout_p else 0
    return (DTYPE_CODES[spec.dtype], spec.batch, spec.heads, spec.kv_heads, spec.q_len, spec.kv_len,
            spec.head_dim, spec.value_dim, spec.scale, spec.shift, spec.left, spec.right, threshold,
            shown(seed))  # fmt: skip


def _readable(t: Tensor) -> bool:
    """Rows of whole 16-byte units, which the kernels read and write in place."""
    strides = (stride for stride, size in zip(t.stride()[:3], t.shape, strict=False) if size > 1)
    last = t.stride(3) == 1
    return last and t.data_ptr() % 16 == 0 and all(stride % _UNIT == 0 for stride in strides)


def _rows(t: Tensor) -> Tensor:
    """[B, heads, length, dim] as the kernels read it; a copy only where they cannot."""
    return t if _readable(t) else t.clone(memory_format=torch.contiguous_format)


def _code(t: Tensor | None) -> tuple:
    return (None, (0, 0, 0)) if t is None else (shown(t), t.stride()[:3])


def _inputs(spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> tuple:
    """What bindings_attention.cpp calls inputs."""
    if key_mask is not None:
        key_mask = key_mask.expand(spec.batch, spec.kv_len).contiguous()
    return (*(part for t in (q, k, v) for part in _code(_rows(t))), shown(key_mask))


def forward(
    spec: AttentionSpec,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    key_mask: Tensor | None,
    slopes: Tensor | None,
    sinks: Tensor | None,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    inputs = _inputs(spec, q, k, v, key_mask)
    b, h, s = spec.batch, spec.heads, spec.q_len
    out = spec.new_out(q)
    lse = torch.empty(b, h, s, dtype=torch.float32, device=q.device)
    with Launch(q, spec) as launch:
        launch.attention_fwd(_shape(spec, seed), inputs, _code(out), shown(lse))
    return out, lse


def _gradient(wanted: bool, like: Tensor, into: Tensor | None) -> tuple[Tensor | None, Tensor]:
    """(what the kernel writes or None, what is returned): one tensor if the kernel can write it."""
    if not wanted:
        return None, like.new_empty(0)
    result = torch.empty_like(like) if into is None else into
    if _readable(result):
        return result, result
    return torch.empty(result.shape, dtype=result.dtype, device=result.device), result


def backward(
    spec: AttentionSpec,
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    key_mask: Tensor | None,
    slopes: Tensor | None,
    sinks: Tensor | None,
    seed: Tensor | None,
    out: Tensor,
    lse: Tensor,
    wants: list[bool],
    dq: Tensor | None = None,
    dk: Tensor | None = None,
    dv: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    inputs = _inputs(spec, q, k, v, key_mask)
    out, dout, lse, dlse = _rows(out), _rows(dout), lse.contiguous(), contiguous(dlse)
    pairs = [_gradient(*of) for of in zip(wants[:3], (q, k, v), (dq, dk, dv), strict=True)]
    shape = _shape(spec, seed)
    with Launch(q, spec) as launch:
        size = launch.module.attention_bwd_scratch(shape, *(bool(want) for want in wants[:3]))
        scratch = torch.empty(size, dtype=torch.float32, device=q.device)
        launch.attention_bwd(
            shape,
            inputs,
            (*_code(out), *_code(dout)),
            shown(lse),
            shown(dlse),
            tuple(part for rows, _ in pairs for part in _code(rows)),
            shown(scratch),
        )
    for rows, result in pairs:
        if rows is not None and rows is not result:
            result.copy_(rows)
    return (*(result for _, result in pairs), q.new_empty(0), q.new_empty(0))
