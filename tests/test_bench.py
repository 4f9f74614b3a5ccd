"""The harness itself: it refuses a wrong kernel, takes turns, and can read what it wrote."""

import copy
import json
import re

import pytest
import torch

from llmkern import cli
from llmkern.bench import (
    baselines,
    gate,
    memory,
    peak,
    registry,
    requirements,
    roofline,
    runner,
    store,
    timers,
)
from llmkern.bench.cases.kernel import kernel_case
from llmkern.bench.registry import EAGER, OURS, Cost
from llmkern.bench.suites import kernels, modules
from llmkern.errors import BackendError


def scaling_case(ours, *, dtype=torch.float32, backward=True, **options):
    """y = 3 x, with `ours` as our kernel."""
    return kernel_case(
        "scaling",
        {"rows": 8, "cols": 16},
        dtype,
        make=lambda m: {"x": m.normal(8, 16), "dy": m.normal(8, 16)},
        ours=ours,
        torch_=lambda t: t["x"] * 3,
        wanted=("x",) if backward else (),
        cost=Cost(128.0, 4096.0),
        budget_s=0.01,
        **options,
    )


def right(t):
    return t["x"] * 3


def run_one(case, **options):
    return runner.run_case(case, runner.Options(**options))


def timed_row(case_id="kernels/a", ours=100.0, eager=200.0, spread=0.01, status="ok"):
    def timing(us):
        return timers.Timing(us, us * (1 - spread), us * (1 + spread), us * 0.9, 10, 1)

    return store.Row(
        id=case_id,
        suite="kernels",
        op="a",
        label="<b>&label",
        shape={"S": 4},
        dtype="fp32",
        direction="fwd",
        threads=2,
        device="cpu",
        backend="cpu",
        isa="avx2",
        status=status,
        flops=1e6,
        nbytes=1e4,
        error_ours=1e-7,
        error_torch=1e-7,
        error_ratio=1.0,
        variants=[
            store.VariantResult(OURS, timing(ours), 1 << 21),
            store.VariantResult(EAGER, timing(eager), 1 << 22),
            store.VariantResult("oneDNN", reason="cannot"),
            store.VariantResult("torch flash", timing(eager), note="leaves <dropout> out"),
        ],
    )


def run_of(*rows):
    machine = {
        "date": "2026-01-01 00:00 UTC",
        "cpu": "A CPU",
        "cores": 2,
        "torch": "2",
        "llmkern": "0",
        "python": "3",
        "isas": ["avx2", "scalar"],
        "peaks": {
            "flops": {"avx2 fp32 2": 2e11, "avx2 bf16 2": 0.0},
            "bandwidth": {"copy 262144 2": 1e11, "copy 268435456 2": 3e10},
        },
    }
    return store.Run(machine, list(rows))


def full_run():
    sweep = [timed_row(f"kernels/s{s}", ours=s, eager=2 * s) for s in (256, 512)]
    for row, length in zip(sweep, (256, 512), strict=True):
        row.tags, row.shape = ["sweep"], {"S": length}
    run = run_of(timed_row(), timed_row("kernels/b", ours=300.0), *sweep)
    run.rows.append(timed_row("kernels/c", status="failed"))
    run.memory = [
        {"variant": name, "ours": ours, "direction": "fwd+bwd", "S": length, "H": 2, "D": 64,
         "peak_bytes": length * 2**12, "seconds": 0.1, "reason": ""}
        for name, ours in ((OURS, True), (EAGER, False))
        for length in (1024, 4096)
    ]  # fmt: skip
    arms = [
        {"name": name, "losses": [3.0, 2.5, 2.25], "tokens_per_s": 1e3, "spread": 0.01,
         "speedup": 1.0, "peak_bytes": 1 << 20}
        for name in (EAGER, OURS)
    ]  # fmt: skip
    run.training = [
        {"name": "a run", "steps": 3, "batch": 2, "dtype": "fp32", "threads": 2,
         "parameters": 1000, "model": {"context": 8}, "arms": arms,
         "agreement": {"agrees": True, "statement": "step by step"}}
    ]  # fmt: skip
    return run


# ---- gate


def test_gate_passes_a_right_kernel_and_runner_times_it():
    row = run_one(scaling_case(right))
    assert (row.status, row.reason) == ("ok", "")
    assert row.speedup is not None
    assert {v.name for v in row.variants if v.timing} == {OURS, EAGER}


@pytest.mark.parametrize("backward", [False, True])
def test_gate_refuses_a_wrong_kernel_and_does_not_time_it(backward):
    row = run_one(scaling_case(lambda t: t["x"] * 3.001, backward=backward))
    assert row.status == "failed"
    assert "allowed" in row.reason
    assert not row.variants


def test_gate_refuses_a_wrong_gradient_behind_a_right_output():
    class WrongGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 3

        @staticmethod
        def backward(ctx, dy):
            return dy * 2

    row = run_one(scaling_case(lambda t: WrongGradient.apply(t["x"])))
    assert row.status == "failed"
    assert row.reason.startswith("result 1")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_gate_refuses_what_is_not_finite(bad):
    row = run_one(scaling_case(lambda t: t["x"] * 3 + bad, backward=False))
    assert row.status == "failed"
    json.dumps(row.error_ours, allow_nan=False)


def test_gate_refuses_a_wrong_shape():
    row = run_one(scaling_case(lambda t: t["x"][:4] * 3, backward=False))
    assert row.status == "failed"
    assert "shape" in row.reason


def test_a_kernel_that_raises_is_an_error_with_its_words():
    def raising(t):
        raise BackendError("no backend for you")

    row = run_one(scaling_case(raising))
    assert row.status == "error"
    assert "no backend for you" in row.reason


def test_gate_names_the_backend_that_served():
    case = kernels.check(torch.float32)[0]
    tensors = registry.inputs_of(case, torch.device("cpu"))
    assert gate.check(case, tensors, backend="reference").backends == ("reference",)


def test_a_baseline_that_cannot_serve_is_left_out_with_its_reason():
    def raising(t):
        raise RuntimeError("no descriptor\nmore")

    case = scaling_case(
        right, contenders=(registry.Variant("other", registry.functional(raising)),)
    )
    row = run_one(case)
    assert row.status == "ok"
    assert row.variant("other").timing is None
    assert row.variant("other").reason == "RuntimeError: no descriptor"


def test_after_the_deadline_a_case_is_measured_with_the_fewest_samples():
    row = run_one(scaling_case(right), deadline=0.0, budget=1e6)
    assert row.status == "ok"
    assert [v.timing.samples for v in row.variants] == [runner.FEWEST_ROUNDS] * 2


# ---- timing


def test_variants_take_turns_and_order_alternates():
    calls = []
    clock = iter(range(0, 10**12, timers.MIN_SAMPLE_NS * 200))
    steps = {name: (lambda name=name: calls.append(name)) for name in "ab"}
    timers.interleave(steps, 0.0, min_rounds=4, clock_ns=lambda: next(clock))
    # One warm-up call of each suffices for so slow a step.
    assert calls[:2] == ["a", "b"]
    assert "".join(calls[2:]) == "ab" + "ba" + "ab" + "ba"


def test_short_calls_are_timed_in_groups():
    now = 0

    def clock():
        return now

    def step():
        nonlocal now
        now += timers.MIN_SAMPLE_NS // 10

    timing = timers.interleave({"a": step}, 0.0, min_rounds=3, clock_ns=clock)["a"]
    assert timing.calls == 10
    assert timing.median_us == pytest.approx(timers.MIN_SAMPLE_NS / 10 * 1e-3)


def test_summary_is_median_and_quartiles():
    timing = timers.summarize([5e3, 1e3, 3e3, 2e3, 4e3], 1)
    assert (timing.p25_us, timing.median_us, timing.p75_us) == (2.0, 3.0, 4.0)
    assert timing.spread == pytest.approx(1 / 3)


# ---- store and compare


def test_json_round_trip(tmp_path):
    run = full_run()
    store.save(run, tmp_path / "sub" / "run.json")
    assert store.load(tmp_path / "sub" / "run.json") == run


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": 99}', '{"schema": 1, "rows": [{}]}'])
def test_load_refuses_other_files_by_name(tmp_path, text):
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="other.json: not a result file"):
        store.load(path)


def compare_files(tmp_path, before, after, *options):
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for run, path in zip((before, after), paths, strict=True):
        store.save(run, path)
    return cli.main(["bench", "compare", *map(str, paths), *options])


def test_compare_exit_code_is_0_within_the_threshold(tmp_path):
    pytest.importorskip("rich")
    before, after = run_of(timed_row(ours=100)), run_of(timed_row(ours=108))
    assert compare_files(tmp_path, before, after) == 0


def test_compare_exit_code_is_1_on_a_regression(tmp_path, capsys):
    pytest.importorskip("rich")
    before, after = run_of(timed_row(ours=100)), run_of(timed_row(ours=120))
    assert compare_files(tmp_path, before, after) == 1
    assert "slower" in capsys.readouterr().out
    assert compare_files(tmp_path, before, after, "--threshold", "0.3") == 0


def test_compare_normalises_by_torch_unless_told_otherwise(tmp_path):
    pytest.importorskip("rich")
    before = run_of(timed_row(ours=100, eager=200))
    after = run_of(timed_row(ours=200, eager=400))  # everything took twice as long
    assert compare_files(tmp_path, before, after) == 0
    assert compare_files(tmp_path, before, after, "--metric", "time") == 1


def test_compare_forgives_what_the_spread_explains():
    before, after = run_of(timed_row(ours=100, spread=0.3)), run_of(timed_row(ours=120, spread=0.3))
    (change,) = store.compare(before, after)
    assert (change.verdict, change.regressed) == ("within spread", False)


def test_compare_counts_a_new_failure_as_a_regression_and_lists_the_rest():
    broken = timed_row("kernels/a", status="failed")
    before = run_of(timed_row("kernels/a"), timed_row("kernels/gone"))
    after = run_of(broken, timed_row("kernels/new"))
    verdicts = {change.id: change.verdict for change in store.compare(before, after)}
    assert verdicts == {
        "kernels/a": "now failing",
        "kernels/gone": "missing",
        "kernels/new": "new",
    }


def test_compare_of_a_missing_file_is_a_usage_error(tmp_path, capsys):
    pytest.importorskip("rich")
    assert cli.main(["bench", "compare", str(tmp_path / "x.json"), str(tmp_path / "y.json")]) == 2
    assert "x.json" in capsys.readouterr().err


# ---- reports


def test_html_is_self_contained_and_escapes():
    pytest.importorskip("matplotlib")
    from llmkern.bench import html

    page = html.render(full_run())
    assert page.count("<svg") == 4  # speed-ups, lengths, roofline, loss curves
    assert not re.search(r"https?:|//[a-z]|src=|@import|<link|<script", page)
    for target in re.findall(r'href="([^"]*)"', page) + re.findall(r"url\(([^)]*)\)", page):
        assert target.startswith("#")
        assert f'id="{target[1:]}"' in page
    ids = re.findall(r'\bid="([^"]*)"', page)
    assert len(ids) == len(set(ids))
    assert "<b>&label" not in page and "&lt;b&gt;&amp;label" in page
    assert "leaves &lt;dropout&gt; out" in page


def test_notes_name_each_variant_that_does_other_work_once():
    from llmkern.bench import text

    assert text.notes(full_run().rows) == ["torch flash: leaves <dropout> out"]


def test_html_of_an_empty_run_renders():
    pytest.importorskip("matplotlib")
    from llmkern.bench import html

    page = html.render(run_of())
    assert "<svg" not in page
    assert "A CPU" in page


def test_show_prints_a_markdown_table_with_losses(tmp_path, capsys):
    path = tmp_path / "run.json"
    store.save(full_run(), path)
    assert cli.main(["bench", "show", str(path), "--markdown"]) == 0
    out = capsys.readouterr().out
    assert "2.00×" in out and "0.67×" in out and "failed" in out


def test_what_was_not_measured_is_a_dash():
    from llmkern.bench import text

    row = timed_row()
    row.variants = []
    assert text.duration(row.median_us(OURS)) == text.NOT_MEASURED
    assert text.rate(row) == text.share(row.peak_share) == text.NOT_MEASURED
    assert text.size(None) == text.ratio(row.speedup) == text.NOT_MEASURED


# ---- peaks, roofline, memory


def test_without_an_extension_there_are_no_peaks():
    peaks = peak.Peaks(None)
    assert peaks.flops_per_s("fp32", 1) is None
    assert roofline.bound(Cost(1.0, 1.0), "fp32", 1, peaks) is None


def test_roofline_takes_the_larger_term():
    peaks = peak.Peaks(None)
    peaks.flops_per_s = lambda dtype, threads: 1e9
    peaks.bytes_per_s = lambda nbytes, threads: 1e9
    assert roofline.bound(Cost(2e9, 1e9), "fp32", 1, peaks).kind == "compute"
    row = timed_row(ours=4e6)
    row.flops, row.nbytes = 1e9, 2e9
    roofline.hold(row, peaks)
    assert (row.bound, row.peak_share) == ("memory", pytest.approx(0.5))
    limit = roofline.bound(Cost(1e9, 2e9), "fp32", 1, peaks)
    assert (limit.kind, limit.time_us) == ("memory", pytest.approx(2e6))


def test_peaks_are_measured_by_the_extension():
    extension = runner._ext.load().module
    assert extension is not None
    before = extension.isa()
    peaks = peak.Peaks(extension)
    assert peaks.flops_per_s("fp32", 1) > 1e8
    assert peaks.flops_per_s("bf16", 1) > 1e8
    assert peaks.bytes_per_s(2**16, 1) > 1e7
    first = dict(peaks.flops)
    peaks.again()
    assert all(peaks.flops[key] >= first[key] for key in first)
    assert extension.isa() == before


@pytest.mark.skipif(not memory.can_measure(), reason="no resettable high-water mark here")
def test_peak_memory_sees_a_temporary_that_is_gone_at_the_end():
    def step():
        torch.ones(2**23).add_(1)  # 32 MiB
        return torch.ones(2)

    step()
    assert 30 * 2**20 < memory.peak_of(step) < 40 * 2**20


# ---- cases


def test_case_ids_are_unique_and_selectable():
    for cases in (
        kernels.full([torch.float32, torch.bfloat16]),
        modules.full([torch.float32, torch.bfloat16]),
        kernels.check(torch.float32),
    ):
        ids = [case.id for case in cases]
        assert len(ids) == len(set(ids))
    chosen = registry.select(kernels.default([torch.float32]), "attention causal dropout")
    assert [case.op for case in chosen] == ["attention"]


def test_inputs_depend_on_the_case_alone():
    case = kernels.check(torch.bfloat16)[0]
    one, two = (registry.inputs_of(case, torch.device("cpu")) for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)
    exact = registry.to_float64(one)
    assert torch.equal(exact["x"].bfloat16(), one["x"])


def test_best_torch_baseline_is_never_one_of_ours():
    row = timed_row()
    row.variants.append(copy.deepcopy(row.variants[0]))
    row.variants[-1].name = f"{OURS} + torch.compile"
    assert row.best_torch == (EAGER, 2.0)


def test_eager_and_compiled_baselines_compute_the_same():
    case = scaling_case(right)
    tensors = registry.inputs_of(case, torch.device("cpu"))
    eager = baselines.eager(right, wanted=("x",)).prepare(tensors)()
    assert torch.equal(eager[1], tensors["dy"] * 3)


def test_a_missing_library_is_named_with_the_way_to_get_it():
    with pytest.raises(BackendError, match=r'no_such_library.*pip install "llmkern\[bench\]"'):
        requirements.require("no_such_library", "the report")


# ---- command line


@pytest.mark.parametrize("words", [["bench", "--dtype", "int8"], ["bench", "--threads", "0"], []])
def test_bad_arguments_are_usage_errors(words):
    with pytest.raises(SystemExit) as stopped:
        cli.main(words)
    assert stopped.value.code == 2


def test_a_device_that_is_not_here_is_named(capsys):
    assert cli.main(["check", "--filter", "layer_norm", "--device", "nonsense"]) == 2
    assert cli.main(["check", "--filter", "nonsense"]) == 2  # not "all passed"
    assert "nonsense" in capsys.readouterr().err


def test_bench_runs_from_the_command_line_and_writes_both_files(tmp_path, monkeypatch):
    pytest.importorskip("rich")
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(peak.Peaks, "survey", lambda self, threads: None)
    files = [tmp_path / "run.json", tmp_path / "run.html"]
    words = ["bench", "kernels", "--filter", "layer_norm/rows8xcols64", "--budget", "0.01"]
    assert cli.main([*words, "--json", str(files[0]), "--html", str(files[1])]) == 0
    (row,) = store.load(files[0]).rows
    assert row.backend == "cpu" and row.isa
    assert files[1].read_text().startswith("<!doctype html>")


def test_check_and_info_and_explain(capsys):
    assert cli.main(["check", "--filter", "layer_norm/rows33", "--backend", "reference"]) == 0
    assert cli.main(["info"]) == 0
    assert cli.main(["explain", "layer_norm/rows8"]) == 0
    assert cli.main(["explain", "no such case"]) == 2
    out = capsys.readouterr().out
    assert "all passed" in out and "reference" in out
