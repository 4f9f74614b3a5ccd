"""Linear layers with their epilogues against torch."""

import torch

from llmkern.bench.suites.kernels import linear_cases

CASES = linear_cases(torch.float32)


def test_linear(measure, case, variant):
    measure(case, variant)
