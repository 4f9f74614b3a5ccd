"""LayerNorm, RMSNorm and their residual forms against torch."""

import torch

from llmkern.bench.suites.kernels import norm_cases

CASES = norm_cases(torch.float32)


def test_norm(measure, case, variant):
    measure(case, variant)
