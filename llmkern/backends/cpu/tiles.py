"""Which matrix product serves a linear layer: data and a pure choice.

OWN is csrc/cpu/gemm.cpp, with the epilogue fused; ONEDNN is torch_private.onednn_linear
and TORCH is torch.mm, both followed by one pass of csrc/cpu/linear.cpp. Measured: docs/facts.md.
"""

import torch

OWN, ONEDNN, TORCH = "own", "onednn", "torch"

# (instruction set, dtype) -> who computes the product. A library serves only where it is at least
# as accurate as torch's default product; bitwise the same for any thread count is OWN alone.
#   avx2         Zen 3: OWN for all. Torch's bf16 product runs at 10 GFLOP/s a core without AVX-512.
#   avx512       OWN for fp32: oneDNN's error is up to 3 times MKL's, ours is below MKL's. Zen 4:
#                as fast as either; Intel: 0 - 13 % behind MKL in training, but MKL's sums follow
#                the thread count; Zen 5: MKL runs at 40 % of the FMA rate. Without bf16
#                instructions OWN multiplies 16-bit types as fp32. fp64's choice is not measured.
#   avx512_bf16  as avx512; vdpbf16ps doubles the fp32 rate, and torch's bf16 product (oneDNN) uses
#                it.
#   scalar       no vector instructions that OWN knows: torch's library knows its machine better.
GEMM = {
    ("avx2", torch.float32): OWN,
    ("avx2", torch.bfloat16): OWN,
    ("avx2", torch.float16): OWN,
    ("avx2", torch.float64): OWN,
    ("avx512", torch.float32): OWN,
    ("avx512", torch.bfloat16): OWN,
    ("avx512", torch.float16): OWN,
    ("avx512", torch.float64): TORCH,
    ("avx512_bf16", torch.float32): OWN,
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
