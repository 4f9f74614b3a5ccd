"""Activations against torch."""

import torch

from llmkern.bench.suites.kernels import activation_cases

CASES = activation_cases(torch.float32)


def test_activation(measure, case, variant):
    measure(case, variant)
