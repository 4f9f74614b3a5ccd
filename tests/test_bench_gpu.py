"""The harness on a GPU, as far as it can be seen without one."""

import argparse

import pytest
import torch

from llmkern import cli
from llmkern.bench import execution, memory, timers
from llmkern.errors import ArgumentError


def test_calls_on_a_gpu_are_timed_between_two_events(monkeypatch):
    order = []

    class Event:
        def __init__(self, device, enable_timing):
            assert device.type == "cuda" and enable_timing

        def record(self):
            order.append("record")

        def synchronize(self):
            order.append("wait")

        def elapsed_time(self, end):
            return 0.25  # milliseconds

    monkeypatch.setattr(torch, "Event", Event)
    sample = timers.sampler(torch.device("cuda"))
    assert sample(lambda: order.append("call"), 2) == 250_000
    assert order == ["record", "call", "call", "record", "wait"]
    timing = timers.interleave({"a": lambda: None}, 0.0, min_rounds=3, sample=sample)["a"]
    assert timing.median_us == 250.0 and timing.calls == 1


def test_peak_memory_on_a_gpu_is_its_allocators(monkeypatch):
    class Allocator:
        held, peak = 100, 900

        @classmethod
        def reset_peak_memory_stats(cls, device):
            cls.peak = cls.held

        @classmethod
        def memory_allocated(cls, device):
            return cls.held

        @classmethod
        def max_memory_allocated(cls, device):
            return cls.peak

    monkeypatch.setattr(torch, "get_device_module", lambda device: Allocator)

    def step():
        Allocator.peak = 140

    assert memory.peak_on(torch.device("cuda"), step) == 40


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
@pytest.mark.parametrize("command", [["check"], ["bench"], ["explain", "norm"]])
def test_a_device_that_is_not_here_is_said_in_one_sentence(command, capsys):
    assert cli.main([*command, "--device", "cuda"]) == 2
    assert "device 'cuda' cannot be used here" in capsys.readouterr().err


def test_suites_about_the_cpu_are_refused_on_a_gpu():
    card = torch.device("cuda")
    assert execution._suites(argparse.Namespace(suites=None), card) == ["kernels", "modules"]
    with pytest.raises(ArgumentError, match="memory run on the CPU only, got cuda"):
        execution._suites(argparse.Namespace(suites=["memory"]), card)
