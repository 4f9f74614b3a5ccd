"""Which matrix product serves a linear layer: data and a pure choice.

OWN is csrc/cpu/gemm.cpp, with the epilogue fused; ONEDNN is torch_private.onednn_linear
and TORCH is torch.mm, both followed by one pass of csrc/cpu/linear.cpp. Measured: docs/facts.md.
"""

import torch

OWN, ONEDNN, TORCH = "own", "onednn", "torch"

# (instruction set, dtype) -> who computes the product. 2026-11-22; avx512 lines 2026-11-21.
#   avx2         Zen 3: OWN for all. Torch's bf16 product runs at 10 GFLOP/s a core without AVX-512.
#   avx512       Zen 5: ONEDNN for fp32, at 2.1 - 2.4 times MKL's speed. Without bf16 instructions
#                OWN multiplies 16-bit types as fp32; that choice and fp64's are not measured.
#   avx512_bf16  as avx512; vdpbf16ps doubles the fp32 rate, and torch's bf16 product (oneDNN) uses
#                it.
#   scalar       no vector instructions that OWN knows: torch's library knows its machine better.
GEMM = {
    ("avx2", torch.float32): OWN,
    ("avx2", torch.bfloat16): OWN,
    ("avx2", torch.float16): OWN,
    ("avx2", torch.float64): OWN,
    ("avx512", torch.float32): ONEDNN,
    ("avx512", torch.bfloat16): OWN,
    ("avx512", torch.float16): OWN,
    ("avx512", torch.float64): TORCH,
    ("avx512_bf16", torch.float32): ONEDNN,
    ("avx512_bf16", torch.bfloat16): TORCH,
    ("avx512_bf16", torch.float16): OWN,
    ("avx512_bf16", torch.float64): TORCH,
    ("scalar", torch.float32): TORCH,
    ("scalar", torch.bfloat16): TORCH,
    ("scalar", torch.float16): TORCH,
    ("scalar", torch.float64): TORCH,
}

# Rows up to which OWN streams the weight once without packing: bound by memory, whoever computes.
VECTOR_ROWS = 4


def pick_gemm(isa: str, dtype: torch.dtype, rows: int, has_onednn: bool) -> str:
    """OWN, ONEDNN or TORCH for a product with `rows` rows."""
    choice = GEMM[isa, dtype]
    if choice == TORCH or isa == "scalar":
        return choice
    if rows <= VECTOR_ROWS:
        return OWN
    return TORCH if choice == ONEDNN and not has_onednn else choice
