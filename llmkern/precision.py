"""How float32 products on a GPU may round. A leaf."""

import torch


def tf32_allowed() -> bool:
    """Whether float32 products may be computed in TF32: what torch's own CUDA products do now.

    Set by torch.backends.cuda.matmul.fp32_precision (torch 2.9 and newer) or by the older
    torch.set_float32_matmul_precision and torch.backends.cuda.matmul.allow_tf32. The newer one
    answers for all three; asking an older one after setting the newer is an error in torch.
    """
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):
        return matmul.fp32_precision == "tf32"
    return matmul.allow_tf32
