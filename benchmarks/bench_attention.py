"""Scaled dot product attention against torch."""

import torch

from llmkern.bench.suites.kernels import attention_cases

CASES = attention_cases(torch.float32)


def test_attention(measure, case, variant):
    measure(case, variant)
