"""The training comparison: curves that agree, and what must not pass for agreement."""

import dataclasses

import pytest
import torch

from llmkern.bench.registry import EAGER, OURS
from llmkern.bench.workloads import training
from llmkern.bench.workloads.gpt import GPTConfig

TINY = GPTConfig(layers=1, d_model=32, heads=2, d_ff=64, context=16, dropout=0.25)


def config(**changes):
    return dataclasses.replace(training.TrainConfig("tiny", TINY, steps=14, batch=2), **changes)


def compare(**changes):
    return training.compare(config(**changes), measure_memory=False)


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
