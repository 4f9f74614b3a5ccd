"""Dropout against torch."""

import torch

from llmkern.bench.suites.kernels import dropout_cases

CASES = dropout_cases(torch.float32)


def test_dropout(measure, case, variant):
    measure(case, variant)
