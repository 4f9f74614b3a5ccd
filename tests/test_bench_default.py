"""The default run of `llmkern bench`: what it lists, and that it measures all of it."""

import argparse

import pytest
import torch

from llmkern import cli
from llmkern.bench import command, execution, peak, store


def test_a_run_out_of_time_still_measures_every_row(tmp_path, monkeypatch):
    pytest.importorskip("rich")
    monkeypatch.setattr(peak.Peaks, "survey", lambda self, threads: None)
    words = ["bench", "kernels", "--filter", "layer_norm/rows8xcols64", "--time-limit", "0"]
    assert cli.main([*words, "--json", str(tmp_path / "run.json")]) == 0
    (row,) = store.load(tmp_path / "run.json").rows
    assert row.status == "ok" and row.speedup is not None


def test_the_default_run_covers_both_dtypes_and_compiles_in_one_row():
    chosen = [
        execution.cases_of(suite, options_of_the_default_run()) for suite in ("kernels", "modules")
    ]
    for cases in chosen:
        assert {case.dtype for case in cases} == {torch.float32, torch.bfloat16}
    slow = [c.id for cases in chosen for c in cases if any(v.slow_to_prepare for v in c.variants)]
    assert len(slow) == 1


def options_of_the_default_run():
    return argparse.Namespace(**command.DEFAULTS)
