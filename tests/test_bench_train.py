"""The training run: its data, its model, and what "the curves agree" means."""

import torch

from llmkern.bench.suites import train
from llmkern.bench.workloads import corpus, training
from llmkern.bench.workloads.gpt import GPT, GPTConfig


def curve(offset=0.0, wiggle=0.0):
    return [3.0 - 0.02 * step + offset + wiggle * (-1) ** step for step in range(40)]


def config_of(dropout):
    return next(c for c in train.default([torch.float32]) if c.model.dropout == dropout)


def test_without_dropout_curves_agree_step_by_step_or_not_at_all():
    config = config_of(0.0)
    assert training.agreement(config, curve(), curve(1e-4))["agrees"]
    one_step_off = curve()
    one_step_off[7] *= 1.01
    assert not training.agreement(config, curve(), one_step_off)["agrees"]


def test_with_dropout_curves_agree_within_what_masks_alone_do():
    config = config_of(0.1)
    control = curve(0.01)
    assert training.agreement(config, curve(), curve(-0.015), control)["agrees"]
    assert training.agreement(config, curve(), curve(0.01, wiggle=0.1), control)["agrees"]
    assert not training.agreement(config, curve(), curve(0.05), control)["agrees"]


def test_batches_are_bytes_of_the_standard_library_chosen_by_the_seed():
    data = corpus.load(2**16)
    assert data.dtype == torch.uint8 and len(data) == 2**16
    inputs, targets = corpus.batch(data, 3, 32, seed=5)
    assert inputs.shape == targets.shape == (3, 32)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert torch.equal(inputs, corpus.batch(data, 3, 32, seed=5)[0])
    assert not torch.equal(inputs, corpus.batch(data, 3, 32, seed=6)[0])


def test_language_model_is_causal():
    model = GPT(GPTConfig(layers=1, d_model=16, heads=2, d_ff=32, context=12)).eval()
    tokens = torch.randint(256, (2, 12))
    changed = tokens.clone()
    changed[:, 8:] = 0
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :8], after[:, :8])
    assert not torch.equal(before[:, 8:], after[:, 8:])
