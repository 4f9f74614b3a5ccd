"""The training run: its data, its model, and what "the curves agree" means."""

import dataclasses

import pytest
import torch

from llmkern.bench.registry import EAGER, OURS
from llmkern.bench.suites import train
from llmkern.bench.workloads import corpus, training
from llmkern.bench.workloads.gpt import GPT, GPTConfig

TINY = GPTConfig(layers=1, d_model=32, heads=2, d_ff=64, context=16, dropout=0.25)


def config(**changes):
    return dataclasses.replace(training.TrainConfig("tiny", TINY, steps=14, batch=2), **changes)


def compare(**changes):
    return training.compare(config(**changes), measure_memory=False)


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


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_curves_agree_step_by_step(dropout, dtype):
    result = compare(model=dataclasses.replace(TINY, dropout=dropout), dtype=dtype)
    assert result["agreement"]["agrees"], result["agreement"]["statement"]
    lengths = {arm["name"]: len(arm["losses"]) for arm in result["arms"]}
    control = {training.CONTROL: training.CONTROL_STEPS} if dropout else {}
    assert lengths == {EAGER: 14, OURS: 14, **control}


def test_other_masks_do_not_pass_for_agreement(monkeypatch):
    original = training.make_arm

    def make_arm(config, name):
        arm = original(config, name)
        if name == OURS:  # a draw more before each step
            arm.model.register_forward_pre_hook(lambda module, args: torch.rand(1) and None)
        return arm

    monkeypatch.setattr(training, "make_arm", make_arm)
    assert not compare()["agreement"]["agrees"]


@pytest.mark.parametrize("ours", [[3.0, 2.0], [3.0, float("nan")], [float("nan"), 2.5]])
@pytest.mark.parametrize("control", [None, [3.0, 2.5]])
def test_curves_apart_or_nan_do_not_agree(ours, control):
    eager = [3.0, 2.5] if control is None else [3.0, 2.0]
    assert not training.agreement(config(), eager, ours, control)["agrees"]
    assert training.agreement(config(), eager, [3.0, 2.5], control)["agrees"]


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
