"""Attention: attention_*_kernels.py. Contract: backends/reference/attention.py."""

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from llmkern import random
from llmkern.backends.triton import _launch
from llmkern.backends.triton import tiles_attention as tiles
from llmkern.backends.triton._launch import Compilation
from llmkern.precision import tf32_allowed
from llmkern.specs import AttentionSpec

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HEAD_DIM = 256  # at most: the accumulators of a tile must fit in registers


def supports(spec: AttentionSpec) -> str | None:
    if max(spec.head_dim, spec.value_dim) > HEAD_DIM:
        return f"head dims up to {HEAD_DIM}, got {spec.head_dim} and {spec.value_dim}"
    return _launch.unsupported(spec.dtype) or _launch.unavailable(spec.device)


def _precision(spec: AttentionSpec) -> str:
    """Of products of float32 operands: what torch's own products use."""
    return "tf32" if spec.dtype == torch.float32 and tf32_allowed() else "ieee"


MOST_STRIDE = 1 << 24  # of rows: 128 of them are a tile, in which offsets have 32 bits


def _in_place(t: Tensor) -> bool:
    """Can kernels read and write [B, heads, length, dim] where it lies?"""
    return (t.stride(3) == 1 or t.shape[3] <= 1) and (t.stride(2) < MOST_STRIDE or t.shape[2] == 1)


def _rows(t: Tensor) -> Tensor:
    """The tensor, or a copy that kernels can read in place."""
    return t if _in_place(t) else t.contiguous()


_KEPT = 4096  # answers of the functions of a spec: new lengths must not make them grow for ever


@functools.lru_cache(_KEPT)
def _numbers(spec: AttentionSpec) -> dict[str, float]:
    """Lengths and band, which fit 32 bits: a limit beyond all places is no limit; scalars."""
    far = spec.q_len + spec.kv_len + abs(spec.shift)
    threshold = random.threshold(spec.dropout_p) if spec.dropout_p else 0
    return dict(heads=spec.heads, kv_heads=spec.kv_heads, q_len=spec.q_len, kv_len=spec.kv_len,
                shift=spec.shift, left=min(spec.left, far), right=min(spec.right, far),
                scale=spec.scale, softcap=spec.softcap, threshold=threshold,
                drop_scale=random.scale(spec.dropout_p))  # fmt: skip


@functools.cache
def _stride_names(name: str, axes: str) -> tuple[str, ...]:
    return tuple(f"{name}_stride_{axis}" for axis in axes)


def _strides(name: str, t: Tensor) -> dict[str, int]:
    """Strides of [B, heads, length, dim] but the last, which is 1."""
    return dict(zip(_stride_names(name, "bhs"), t.stride(), strict=False))


def _broadcast(name: str, t: Tensor | None, spec: AttentionSpec) -> dict[str, int]:
    """Strides over [B, H, S, T], 0 where `t` has one element."""
    strides = (0, 0, 0, 0)
    if t is not None:
        strides = t.expand(spec.batch, spec.heads, spec.q_len, spec.kv_len).stride()
    return dict(zip(_stride_names(name, "bhij"), strides, strict=True))


def _sides(
    spec: AttentionSpec,
    bias: Tensor | None,
    mask: Tensor | None,
    key_mask: Tensor | None,
    slopes: Tensor | None,
) -> dict[str, object]:
    """Pointers and strides of what goes with q, k and v."""
    if mask is not None:
        mask = mask.view(torch.uint8)
    if key_mask is not None:
        key_mask = key_mask.expand(spec.batch, spec.kv_len).contiguous().view(torch.uint8)
    slopes_stride = 0
    if slopes is not None:
        slopes = slopes.expand(spec.batch, spec.heads)
        slopes = slopes if slopes.stride(1) == 1 else slopes.contiguous()
        slopes_stride = slopes.stride(0)
    return dict(bias=bias, mask=mask, key_mask=key_mask, slopes=slopes,
                **_broadcast("bias", bias, spec), **_broadcast("mask", mask, spec),
                slopes_stride_b=slopes_stride)  # fmt: skip


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
    b, h, s = spec.batch, spec.heads, spec.q_len
    out = spec.new_out(q)
    lse = torch.empty(b, h, s, dtype=torch.float32, device=q.device)
    if b * h * s == 0:
        return out, lse
    q, k, v = _rows(q), _rows(k), _rows(v)
    inputs = dict(q=q, k=k, v=v, seed=seed, **_strides("q", q), **_strides("k", k),
                  **_strides("v", v), **_sides(spec, bias, mask, key_mask, slopes),
                  **_numbers(spec))  # fmt: skip
    sinks = None if sinks is None else sinks.contiguous()
    with _launch.guard(q.device):
        chunk = tiles.pick_chunk(spec)
        if chunk:
            _forward_in_parts(spec, inputs, sinks, out, lse, chunk)
        else:
            _launch_forward(spec, inputs, sinks, out, lse, out, 0)
    return out, lse


def _launch_forward(spec, inputs, sinks, out, lse, like, chunk):
    """like: has the strides of out [B, H, S, Dv]; out itself may be a stack of such."""
    from llmkern.backends.triton.attention_fwd_kernels import attention_fwd

    capability = _launch.capability(out.device)
    grid, constants = _forward_launch(spec, _precision(spec), capability, chunk, sinks is not None)
    attention_fwd[grid](
        **inputs, sinks=sinks, out=out, lse=lse, **_strides("out", like), **constants
    )


@functools.lru_cache(_KEPT)
def _forward_launch(
    spec: AttentionSpec, precision: str, capability: int, chunk: int, sinks: bool
) -> tuple[tuple[int, int], dict[str, object]]:
    """The grid and those arguments of the forward kernel that no tensor decides."""
    shape = tiles.form(spec, precision)
    tile = tiles.pick_forward(spec, shape, capability)
    heads = spec.kv_heads if shape.packed else spec.heads
    programs = -(-tiles.rows(spec) // tile.block_m) * spec.batch * heads
    grid = (programs, -(-spec.kv_len // chunk) if chunk else 1)
    return grid, dict(
        chunk=chunk,
        part_rows=spec.batch * spec.heads * spec.q_len,
        FORM=shape._replace(sinks=sinks),
        **tiles.launch(tile),
    )


def _forward_in_parts(spec, inputs, sinks, out, lse, chunk):
    from llmkern.backends.triton.attention_split_kernels import attention_combine

    parts = -(-spec.kv_len // chunk)
    rows = spec.batch * spec.heads * spec.q_len
    part_out = torch.empty(parts, *out.shape, dtype=torch.float32, device=out.device)
    part_lse = torch.empty(parts, rows, dtype=torch.float32, device=out.device)
    _launch_forward(spec, inputs, None, part_out, part_lse, part_out[0], chunk)
    shape = tiles.form(spec, _precision(spec))
    tile = tiles.pick_combine(shape)
    attention_combine[(-(-rows // tile.block_m),)](
        part_out,
        part_lse,
        sinks,
        out,
        lse,
        *out.stride()[:3],
        spec.heads,
        spec.q_len,
        rows,
        parts,
        FORM=shape,
        BLOCK_R=tile.block_m,
        num_warps=tile.num_warps,
    )


def _gradient(wanted: bool, like: Tensor, into: Tensor | None) -> tuple[Tensor, Tensor]:
    """(what the kernel writes, what is returned): one tensor if its layout allows."""
    if not wanted:
        return torch.empty_like(like, memory_format=torch.contiguous_format), like.new_empty(0)
    result = torch.empty_like(like) if into is None else into
    if _in_place(result):
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
    empty = q.new_empty(0)
    q, k, v, dout, out = (_rows(t) for t in (q, k, v, dout, out))
    pairs = [_gradient(*of) for of in zip(wants[:3], (q, k, v), (dq, dk, dv), strict=True)]
    dbias = torch.empty(bias.shape, dtype=bias.dtype, device=bias.device) if wants[3] else empty
    dsinks = torch.empty(spec.heads, dtype=torch.float32, device=q.device) if wants[4] else empty
    shape = tiles.form(spec, _precision(spec))
    with _launch.guard(q.device):
        rows = _launch_terms(spec, shape, dout, out, lse, dlse)
        inputs = dict(q=q, k=k, v=v, seed=seed, dout=dout, **rows, **_strides("q", q),
                      **_strides("k", k), **_strides("v", v), **_strides("dout", dout),
                      **_sides(spec, bias, mask, key_mask, slopes), **_numbers(spec),
                      FORM=shape)  # fmt: skip
        written = [pair[0] for pair in pairs]
        fused = tiles.pick_fused(spec, shape, _launch.capability(q.device))
        if fused and wants[0] and (wants[1] or wants[2]) and not _launch.interpreted():
            _launch_fused(spec, fused, inputs, *written)
        else:
            if wants[1] or wants[2]:
                _launch_keys(spec, inputs, written[1], written[2])
            if wants[0]:
                _launch_queries(spec, inputs, written[0])
        if wants[3]:
            _launch_bias(spec, inputs, dbias)
        if wants[4]:
            _launch_sinks(spec, sinks, lse, rows["terms"], dsinks)
    for stored, result in pairs:
        if stored is not result and result.dim() == 4:
            result.copy_(stored)
    return (*(result for _, result in pairs), dbias, dsinks)


# A lane that adds another's product to its own by fma rounds that one alone: the lanes of a row's
# sum would differ in the last bit, and which of them stores it is open.
FUSE_TERMS = False


def _launch_terms(spec, shape, dout, out, lse, dlse) -> dict[str, Tensor]:
    from llmkern.backends.triton.attention_bwd_kernels import attention_terms

    lse = lse.contiguous()
    terms = torch.empty(*lse.shape, 2, dtype=lse.dtype, device=lse.device)
    tile = tiles.pick_rows(shape)
    programs = -(-spec.q_len // tile.block_m) * spec.batch * spec.heads
    if programs:
        attention_terms[(programs,)](
            out,
            dout,
            lse,
            None if dlse is None else dlse.contiguous(),
            terms,
            *out.stride()[:3],
            *dout.stride()[:3],
            spec.heads,
            spec.q_len,
            spec.scale,
            FORM=shape,
            BLOCK_R=tile.block_m,
            BOUNDED=spec.q_len % tile.block_m != 0,
            num_warps=tile.num_warps,
            enable_fp_fusion=FUSE_TERMS,
        )
    return dict(terms=terms)


def _launch_keys(spec, inputs, dk, dv):
    from llmkern.backends.triton.attention_bwd_kernels import attention_bwd_keys

    tile = tiles.pick_keys(spec, inputs["FORM"], _launch.capability(dk.device))
    programs = -(-spec.kv_len // tile.block_n) * spec.batch * spec.kv_heads
    if programs:
        attention_bwd_keys[(programs,)](
            **inputs,
            dk=dk,
            dv=dv,
            **_strides("dk", dk),
            **_strides("dv", dv),
            **tiles.launch(tile),
        )


def _launch_fused(spec, fused, inputs, dq, dk, dv):
    from llmkern.backends.triton.attention_bwd_fused_kernels import attention_bwd_fused

    tile, width = fused.tile, inputs["FORM"].block_d
    blocks = -(-spec.q_len // tile.block_m) * spec.batch * spec.heads
    programs = -(-spec.kv_len // tile.block_n) * spec.batch * spec.kv_heads
    if blocks == 0 or programs == 0:
        _launch_keys(spec, inputs, dk, dv)
        _launch_queries(spec, inputs, dq)
        return
    # Triton compiles anew for an address that is no multiple of 16: the locks begin at one.
    counters = torch.zeros(4 + blocks, dtype=torch.int32, device=dq.device)
    total = torch.empty(blocks * tile.block_m * width, dtype=torch.float32, device=dq.device)
    attention_bwd_fused[(programs,)](
        **inputs,
        dq=dq,
        dk=dk,
        dv=dv,
        total=total,
        locks=counters[4:],
        ticket=counters,
        **_strides("dq", dq),
        **_strides("dk", dk),
        **_strides("dv", dv),
        WARP_ROWS=fused.warp_rows,
        **tiles.launch(tile),
    )
    if inputs["FORM"].hides:
        _launch_queries(spec, inputs, dq, again=True)


def _launch_queries(spec, inputs, dq, again=False):
    from llmkern.backends.triton.attention_bwd_query_kernels import attention_bwd_queries

    tile = tiles.pick_queries(spec, inputs["FORM"], _launch.capability(dq.device))
    programs = -(-spec.q_len // tile.block_m) * spec.batch * spec.heads
    if programs:
        attention_bwd_queries[(programs,)](
            **inputs, dq=dq, **_strides("dq", dq), AGAIN=again, **tiles.launch(tile)
        )


def _launch_bias(spec, inputs, dbias):
    from llmkern.backends.triton.attention_bwd_side_kernels import attention_bwd_bias

    tile = tiles.pick_bias(spec, inputs["FORM"], _launch.capability(dbias.device))
    full = (spec.batch, spec.heads, spec.q_len, spec.kv_len)
    wide = tiles.Wide(*(n == 1 for n in dbias.shape))
    blocks = (1, 1, tile.block_m, tile.block_n)
    programs = 1
    for alone, n, block in zip(wide, full, blocks, strict=True):
        programs *= 1 if alone else -(-n // block)
    if programs:
        strides = zip("bhij", dbias.stride(), strict=True)
        attention_bwd_bias[(programs,)](
            **inputs,
            dbias=dbias,
            **{f"dbias_stride_{axis}": stride for axis, stride in strides},
            batch=spec.batch,
            WIDE=wide,
            **tiles.launch(tile),
        )


def _launch_sinks(spec, sinks, lse, terms, dsinks):
    from llmkern.backends.triton.attention_bwd_side_kernels import attention_bwd_sinks

    if spec.heads:
        attention_bwd_sinks[(spec.heads,)](
            sinks.contiguous(),
            lse.contiguous(),
            terms,
            dsinks,
            spec.batch,
            spec.heads,
            spec.q_len,
            BLOCK=tiles.SINK_BLOCK,
        )


def compilations(capability: int) -> Iterator[Compilation]:
    """Every kernel in the forms that 2048 queries and keys take, by head dim and dtype."""
    from llmkern.backends.triton import attention_forms

    return attention_forms.every_form(capability)
