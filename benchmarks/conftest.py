"""The harness's cases under pytest-benchmark: `pytest benchmarks/bench_norm.py`, and so on.

`measure` runs the correctness gate once a case, then hands the variant to pytest-benchmark, which
groups the variants of a case. `llmkern bench` measures the same cases interleaved; here they run
one after the other, as pytest-benchmark does.
"""

import functools

import pytest
import torch

from llmkern.bench import gate, registry


@functools.lru_cache(maxsize=1)
def _gated(case: registry.Case) -> tuple[registry.Tensors, gate.Verdict]:
    tensors = registry.inputs_of(case, torch.device("cpu"))
    return tensors, gate.check(case, tensors)


@pytest.fixture
def measure(benchmark):
    def run(case: registry.Case, variant: registry.Variant) -> None:
        tensors, verdict = _gated(case)
        assert verdict.passed, verdict.reason
        try:
            step = variant.prepare(tensors)
            step()
        except gate.CASE_ERRORS as error:
            pytest.skip(f"{variant.name} cannot serve this case: {error}")
        benchmark.group = case.id
        benchmark.name = variant.name
        benchmark.extra_info |= {
            "flops": case.cost.flops,
            "bytes": case.cost.nbytes,
            "threads": torch.get_num_threads(),
            "backends": list(verdict.backends),
            "error_ratio": verdict.error_ratio,
            "note": variant.note,
        }
        benchmark(step)

    return run


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A file's `CASES` parametrise its tests, variant by variant."""
    if {"case", "variant"} <= set(metafunc.fixturenames):
        pairs = [
            pytest.param(case, variant, id=f"{case.id}-{variant.name}".replace(" ", "_"))
            for case in metafunc.module.CASES
            for variant in case.variants
            if not variant.slow_to_prepare  # torch.compile: `llmkern bench` has it
        ]
        metafunc.parametrize(("case", "variant"), pairs)
