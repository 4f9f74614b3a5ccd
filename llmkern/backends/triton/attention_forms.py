"""Forms of the attention kernels, as attention.py launches them, to be compiled without a card."""

import importlib
from collections.abc import Iterator

import torch

from llmkern.backends.triton import tiles_attention as tiles
from llmkern.backends.triton._launch import Compilation, compilation
from llmkern.backends.triton.attention import DTYPES, FUSE_TERMS
from llmkern.specs import UNBOUNDED, AttentionSpec


def every_form(capability: int) -> Iterator[Compilation]:
    """Compilations of every kernel, as calls with 2048 queries and keys take them."""
    causal = dict(right=0)
    everything = dict(right=0, left=512, dropout_p=0.1, softcap=30.0, bias=True, mask=True,
                      key_mask=True, slopes=True, sinks=True)  # fmt: skip
    for dim in (64, 96, 128, 256):
        for dtype in DTYPES:
            yield from _forms(_example(dtype, dim, **causal), "causal", capability)
    yield from _forms(_example(torch.bfloat16, 128), "full", capability)
    yield from _forms(_example(torch.bfloat16, 64, **causal, dropout_p=0.1), "dropout", capability)
    yield from _forms(_example(torch.bfloat16, 64, **everything), "everything", capability)
    yield from _forms(_example(torch.float32, 64, **everything), "everything", capability)
    yield from _side_forms(_example(torch.bfloat16, 64, **everything), capability)
    for dim in (128, 256):
        for dtype in (torch.bfloat16, torch.float32):
            yield _forward_form(_example(dtype, dim, **everything), "everything", capability)
    band = _example(torch.bfloat16, 64, **causal, q_len=512, kv_len=512)
    yield from _forms(band, "short band", capability)
    yield from _eased_forms(capability)
    for dim in (48, 64):  # the tiles of short bands, lengths that fill no block
        short = _example(torch.bfloat16, dim, **causal, q_len=1000, kv_len=1000)
        yield _forward_form(short, "short", capability)
    decode = _example(torch.bfloat16, 128, **causal, shift=2047, q_len=1, kv_heads=2)
    yield _forward_form(decode, "decode", capability)
    yield _combine_form(decode)


def _example(dtype: torch.dtype, head_dim: int, **changes) -> AttentionSpec:
    plain = AttentionSpec(
        dtype, "cuda", 2, 8, 8, 2048, 2048, head_dim, head_dim, head_dim**-0.5, 0.0, 0, UNBOUNDED,
        UNBOUNDED, 0.0, False, False, False, False, False)  # fmt: skip
    return plain._replace(**changes)


_BURDENS = {
    "plain": {},
    "key mask": dict(key_mask=True),
    "beside": dict(dropout_p=0.1),
    "bias": dict(bias=True),
    "mask": dict(mask=True),
}


def _eased_forms(capability: int) -> Iterator[Compilation]:
    """Forward with each row of the table of tiles that were made smaller."""
    family = tiles.architecture(capability)
    for (of, size, width), rows in tiles.EASED.items():
        dtype = torch.bfloat16 if size == 2 else torch.float32
        found = [(name, masks) for name, row in rows.items() for masks in range(3) if row[masks]]
        for burden, masks in found if of == family else ():
            lengths = dict(q_len=3000, kv_len=3001) if masks else {}
            spec = _example(dtype, width - (7 if masks > 1 else 0), right=0, **lengths,
                            **_BURDENS[burden])._replace(value_dim=width)  # fmt: skip
            kind = f"{burden}{('', ' ragged', ' odd')[masks]}"
            yield _forward_form(spec, kind, capability)


_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_SIDES = ("bias", "mask", "key_mask", "slopes")


def _typed(
    spec: AttentionSpec, first: dict, last: tuple[str, ...], counts: str
) -> tuple[dict[str, str | None], tuple[str, ...]]:
    """(the arguments' types, strides): inputs, `first` ones, strides of these and of `last`."""
    pointer = "*" + _TYPES[spec.dtype]
    kinds = ("*fp32", "*u8", "*u8", "*fp32")
    sides = {n: k if getattr(spec, n) else None for n, k in zip(_SIDES, kinds, strict=True)}
    rows = [f"{name}_stride_{axis}" for name in "qkv" for axis in "bhs"]
    rows += [f"{name}_stride_{axis}" for name in ("bias", "mask") for axis in "bhij"]
    rows += ["slopes_stride_b"] + [f"{name}_stride_{axis}" for name in last for axis in "bhs"]
    types = {"q": pointer, "k": pointer, "v": pointer, **sides, **first}
    types |= dict.fromkeys(rows, "i32") | dict.fromkeys(counts.split(), "i32")
    types |= {"scale": "fp32", "softcap": "fp32", "threshold": "i32", "drop_scale": "fp32"}
    return types, tuple(name for name in rows if not name.endswith("_j"))


_COUNTS = "heads kv_heads q_len kv_len shift left right"


def _form_of(name, kernel, spec, typed, tile, shape, **flags) -> Compilation:
    flags = {"FORM": shape, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, **flags}
    form = compilation(name, kernel, typed[0], flags, tile.num_warps, typed[1])
    contiguous = {"bias_stride_j": 1, "mask_stride_j": 1}
    return form._replace(
        num_stages=tile.num_stages,
        signature=form.signature | dict.fromkeys(contiguous, "constexpr"),
        constexprs=form.constexprs | contiguous,
    )


def _forward_form(spec: AttentionSpec, kind: str, capability: int) -> Compilation:
    from_module = "llmkern.backends.triton.attention_fwd_kernels"
    shape = tiles.form(spec, "tf32")._replace(sinks=spec.sinks and not tiles.pick_chunk(spec))
    pointer = "*" + _TYPES[spec.dtype]
    first = {"sinks": "*fp32" if shape.sinks else None, "seed": "*i64" if shape.dropout else None,
             "out": "*fp32" if shape.split else pointer, "lse": "*fp32"}  # fmt: skip
    typed = _typed(spec, first, ("out",), f"{_COUNTS} chunk part_rows")
    return _form_of(f"attention_fwd D{spec.head_dim} {_TYPES[spec.dtype]} {kind}",
                    _named(from_module, "attention_fwd"), spec, typed,
                    tiles.pick_forward(spec, shape, capability), shape)  # fmt: skip


def _forms(spec: AttentionSpec, kind: str, capability: int) -> Iterator[Compilation]:
    yield _forward_form(spec, kind, capability)
    shape = tiles.form(spec, "tf32")
    pick, again = tiles.pick_queries(spec, shape, capability), dict(AGAIN=False)
    yield _backward_form(spec, kind, shape, "queries", "query", ("dq",), pick, **again)
    pick = tiles.pick_keys(spec, shape, capability)
    yield _backward_form(spec, kind, shape, "keys", "", ("dk", "dv"), pick)
    fused = tiles.pick_fused(spec, shape, capability)
    if fused:
        yield _backward_form(spec, kind, shape, "fused", "fused", ("dq", "dk", "dv"), fused.tile,
                             WARP_ROWS=fused.warp_rows)  # fmt: skip


def _backward_form(spec, kind, shape, name, module, outs, tile, **flags) -> Compilation:
    pointer, kernel = "*" + _TYPES[spec.dtype], f"attention_bwd_{name}"
    first = {"seed": "*i64" if shape.dropout else None, "dout": pointer, "terms": "*fp32"}
    first |= dict.fromkeys(outs, pointer)
    if name == "fused":
        first |= {"total": "*fp32", "locks": "*i32", "ticket": "*i32"}
    module = "_".join(part for part in ("attention_bwd", module, "kernels") if part)
    return _form_of(f"{kernel} D{spec.head_dim} {_TYPES[spec.dtype]} {kind}",
                    _named(f"llmkern.backends.triton.{module}", kernel), spec,
                    _typed(spec, first, ("dout", *outs), _COUNTS), tile, shape,
                    **flags)  # fmt: skip


def _named(module: str, kernel: str):
    return lambda: getattr(importlib.import_module(module), kernel)


def _side_forms(spec: AttentionSpec, capability: int) -> Iterator[Compilation]:
    """What else backward launches, for a bias [1, H, S, T]."""
    shape, pointer = tiles.form(spec, "tf32"), "*" + _TYPES[spec.dtype]
    module = "llmkern.backends.triton.attention_bwd_side_kernels"
    first = {"seed": "*i64", "dout": pointer, "terms": "*fp32", "dbias": "*fp32"}
    types, divisible = _typed(spec, first, ("dout", "dbias"), f"batch {_COUNTS}")
    renamed = {"dbias_stride_s": "dbias_stride_i"}
    types = {renamed.get(name, name): kind for name, kind in types.items()}
    order = list(types)
    order.insert(order.index("dbias_stride_i") + 1, "dbias_stride_j")
    types = {name: types.get(name, "i32") for name in order}
    form = _form_of("attention_bwd_bias D64 bf16", _named(module, "attention_bwd_bias"), spec,
                    (types, divisible), tiles.pick_bias(spec, shape, capability),
                    shape)  # fmt: skip
    order = [name for name in form.signature if name[:5] != "BLOCK"]
    signature = dict.fromkeys([*order, "WIDE", "BLOCK_M", "BLOCK_N"], "constexpr")
    yield form._replace(
        signature=signature | form.signature,
        constexprs=form.constexprs | {"WIDE": tiles.Wide(True, False, False, False)},
        divisible=tuple(renamed.get(name, name) for name in form.divisible),
    )
    types = {"sinks": "*fp32", "lse": "*fp32", "terms": "*fp32", "dsinks": "*fp32", "batch": "i32",
             "heads": "i32", "q_len": "i32"}  # fmt: skip
    yield compilation("attention_bwd_sinks", _named(module, "attention_bwd_sinks"), types,
                      {"BLOCK": tiles.SINK_BLOCK}, 4)  # fmt: skip
    rows = [f"{name}_stride_{axis}" for name in ("out", "dout") for axis in "bhs"]
    types = {"out": pointer, "dout": pointer, "lse": "*fp32", "dlse": None, "terms": "*fp32",
             **dict.fromkeys([*rows, "heads", "q_len"], "i32"),
             "scale": "fp32"}  # fmt: skip
    tile = tiles.pick_rows(shape)
    flags = {"FORM": shape, "BLOCK_R": tile.block_m, "BOUNDED": False}
    kernel = _named("llmkern.backends.triton.attention_bwd_kernels", "attention_terms")
    form = compilation(
        "attention_terms D64 bf16", kernel, types, flags, tile.num_warps, tuple(rows)
    )
    yield form._replace(fuse=FUSE_TERMS)


def _combine_form(spec: AttentionSpec) -> Compilation:
    shape = tiles.form(spec, "tf32")
    tile = tiles.pick_combine(shape)
    types = {"part_out": "*fp32", "part_lse": "*fp32", "sinks": None, "out": "*bf16",
             "lse": "*fp32", "out_stride_b": "i32", "out_stride_h": "i32", "out_stride_s": "i32",
             "heads": "i32", "q_len": "i32", "rows": "i32", "parts": "i32"}  # fmt: skip
    divisible = ("out_stride_b", "out_stride_h", "out_stride_s")
    return compilation("attention_combine D128 bf16",
                       _named("llmkern.backends.triton.attention_split_kernels",
                              "attention_combine"), types,
                       {"FORM": shape, "BLOCK_R": tile.block_m}, tile.num_warps,
                       divisible)  # fmt: skip
