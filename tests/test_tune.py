"""The choice between cuda and triton: a pure function, and the file of `llmkern tune` it follows.

There is no card here: times are made up by the tests, and the calls run in the emulator.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode

import llmkern
from llmkern import choice, cli, dispatch, emulator, functional, tuned
from llmkern.backends.cuda import _ext
from llmkern.backends.triton import _launch
from llmkern.bench import tune
from llmkern.bench.cases.attention import attention
from llmkern.bench.cases.linear import linear
from llmkern.bench.cases.norm import layer_norm
from llmkern.bench.suites import tune as suite
from llmkern.choice import Counts, Figures, Measured
from llmkern.errors import TuneFileError, TuneWarning
from llmkern.specs import UNBOUNDED, AttentionSpec, DropoutSpec, LinearSpec, NormSpec

ROOT = Path(__file__).resolve().parent.parent
BF16, CARD = torch.bfloat16, "NVIDIA Test 80GB"
NORM = NormSpec(BF16, BF16, "cuda", 2048, 1024, 1e-5, False, False, False, 0.0, True, BF16)
LINEAR = LinearSpec(BF16, "cuda", 512, 512, 512, None, False, True, False, 0.0, False)
ATTENTION = AttentionSpec(BF16, "cuda", 1, 4, 2, 64, 64, 64, 64, 0.125, 0.0, 0, UNBOUNDED,
                          0, 0.0, False, False, False, False, False)  # fmt: skip
NORM_KIND = {"dtype": "bfloat16", "dropout": False, "rms": False, "add": False}
ORDER = dispatch.BACKENDS["cuda"]


def _row(best: str, *size: int) -> Measured:
    times = {"cuda": 9.0, "triton": 11.0}
    if best == "triton":
        times = {"cuda": 11.0, "triton": 9.0}
    return Measured("norm", NORM_KIND, size, times, best)


def _contents(*rows: Measured, **changed) -> tuned.Tuned:
    made = tuned.Tuned(tuned.FORMAT, llmkern.__version__, CARD, torch.__version__, None, "today",
                       "forward+backward", rows)  # fmt: skip
    return made._replace(**changed)


@pytest.fixture
def card(monkeypatch, tmp_path):
    """A card by that name, and the place of its tune file."""
    file = tmp_path / "tune.json"
    monkeypatch.setenv(tuned.VARIABLE, str(file))
    monkeypatch.setattr(dispatch, "card_name", lambda: CARD)
    monkeypatch.setattr(dispatch, "_choices", {})
    dispatch._measured.cache_clear()
    yield file
    dispatch._measured.cache_clear()


@pytest.fixture
def both_present(monkeypatch):
    monkeypatch.setattr(_ext, "unavailable", lambda device: None)
    monkeypatch.setattr(_launch, "unavailable", lambda device: None)


@pytest.mark.parametrize("best", choice.BACKENDS)
def test_a_row_nearby_decides_and_its_times_are_told(best):
    rows = (_row(best, 4096, 1024), _row("cuda" if best == "triton" else "triton", 64, 1024))
    order, reason = choice.prefer("norm", NORM, ORDER, rows, "/there/tune.json")
    assert order[0] == best and order[2] == "reference" and set(order) == set(ORDER)
    assert (
        "4096x1024" in reason
        and "/there/tune.json" in reason
        and "cuda 9 us" in reason
        or (best == "triton" and "triton 9 us" in reason)
    )


@pytest.mark.parametrize(
    "spec, size",
    [
        (NORM, (2048 * 5, 1024)),  # too far
        (NORM._replace(dtype=torch.float16), (2048, 1024)),  # of another kind
        (NORM._replace(rms=True), (2048, 1024)),
        (NORM._replace(dropout_p=0.1), (2048, 1024)),
    ],
)
def test_a_row_that_does_not_fit_leaves_the_choice_to_the_counts(spec, size):
    counted = choice.prefer("norm", spec, ORDER)
    for best in choice.BACKENDS:
        assert choice.prefer("norm", spec, ORDER, (_row(best, *size),), "file") == counted
    assert "in the emulator" in counted.reason and "us" not in counted.reason.split()


def test_ops_of_one_backend_and_cpu_tensors_have_no_choice():
    spec = DropoutSpec(BF16, "cuda", 100, 0.1)
    assert choice.prefer("dropout", spec, ORDER) == choice.Preference(ORDER, "")
    backends = dispatch.BACKENDS["cpu"]
    assert choice.prefer("norm", NORM, backends) == choice.Preference(backends, "")


@pytest.mark.parametrize(
    "cuda, triton, best",
    [
        (Counts(400, 50, 640, 0), Counts(400, 150, 640, 0), "cuda"),  # shared memory
        (Counts(400, 50, 9600, 0), Counts(400, 50, 6400, 0), "triton"),  # global memory
        (Counts(400, 50, 640, 0), Counts(200, 50, 640, 0), "triton"),  # instructions
        (Counts(400, 50, 640, 100), Counts(200, 50, 640, 400), "cuda"),  # matrix products
        (Counts(390, 99, 640, 0), Counts(400, 98, 640, 0), "cuda"),  # close: fewer instructions
        (Counts(400, 98, 640, 0), Counts(390, 99, 640, 0), "triton"),
    ],
)
def test_counts_are_compared_by_the_busiest_unit(cuda, triton, best):
    assert choice.better(Figures("a case", cuda, triton)) == best


def test_in_tf32_the_backend_that_rounds_as_torch_does_wins_a_close_race():
    fewer, more = Counts(100, 400, 0, 0), Counts(120, 400, 0, 0)
    assert choice.better(Figures("a case", more, fewer)) == "triton"
    assert choice.better(Figures("a case", more, fewer), tf32=True) == "cuda"
    slow = Counts(120, 800, 0, 0)
    assert choice.better(Figures("a case", slow, fewer), tf32=True) == "triton"


@pytest.mark.parametrize(
    "op, spec, key",
    [
        ("norm", NORM, "16-bit"),
        ("norm", NORM._replace(dtype=torch.float32), "float32"),
        ("linear", LINEAR, "16-bit"),
        ("linear", LINEAR._replace(rows=2), "few rows"),
        ("linear", LINEAR._replace(dtype=torch.float32), "float32"),
        ("linear", LINEAR._replace(dtype=torch.float32, tf32=True), "tf32"),
        ("attention", ATTENTION, "16-bit"),
        ("attention", ATTENTION._replace(q_len=1), "few rows"),
        ("attention", ATTENTION._replace(dtype=torch.float32), "16-bit"),
    ],
)
def test_every_call_has_counts_that_stand_for_it(op, spec, key):
    figures = choice.figures_of(op, spec)
    assert figures is choice.FIGURES[op, key]
    assert min(figures.cuda[0], figures.triton[0], figures.cuda[2], figures.triton[2]) > 0
    assert choice.prefer(op, spec, ORDER).order[0] == choice.better(figures, tf32=key == "tf32")


def test_dispatch_and_explain_follow_the_file(card, both_present):
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    for best in choice.BACKENDS:
        tuned.write(card, _contents(_row(best, 2048, 1024)))
        dispatch._measured.cache_clear()
        with fake, torch.no_grad():
            x = torch.empty(2048, 1024, dtype=BF16, device="cuda")
            explanation = llmkern.explain(functional.layer_norm, x, 1024)
        (report,) = explanation.ops
        assert report.backend == best
        assert f"tuned at 2048x1024: cuda {11 if best == 'triton' else 9} us" in str(explanation)
        assert str(card) in report.reason


def test_a_named_backend_needs_no_file(card, both_present):
    card.write_text("broken")
    assert dispatch.decide("norm", NORM, "triton").backend == "triton"
    with pytest.raises(TuneFileError, match="cannot be read as a tune file"):
        dispatch.decide("norm", NORM)


def test_the_preferred_backend_may_still_refuse(card, both_present, monkeypatch):
    tuned.write(card, _contents(_row("cuda", 2048, 1024)))
    monkeypatch.setattr(_ext, "unavailable", lambda device: "it is a test")
    decision = dispatch.decide("norm", NORM)
    assert decision.backend == "triton" and decision.rejected == (("cuda", "it is a test"),)


def test_without_a_file_nothing_is_measured(card, monkeypatch):
    with pytest.warns(TuneWarning, match="there is no file"):
        assert tuned.load(CARD) is None
    monkeypatch.setenv(tuned.VARIABLE, "")
    assert tuned.path(CARD) is None and tuned.load(CARD) is None


def test_the_file_lies_in_the_cache_folder_under_the_cards_name(monkeypatch, tmp_path):
    monkeypatch.delenv(tuned.VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tuned.path(CARD) == tmp_path / "llmkern" / "tune-nvidia-test-80gb.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert tuned.path(CARD).parent == Path.home() / ".cache/llmkern"
    assert tuned.load(CARD) is None


@pytest.mark.parametrize(
    "changed, reason",
    [
        ({"card": "NVIDIA Other"}, "measured on NVIDIA Other, this is NVIDIA Test 80GB"),
        ({"llmkern": "0.0.1"}, "measured with llmkern 0.0.1"),
        ({"format": 99}, "format 99"),
    ],
)
def test_a_file_of_another_card_or_version_is_passed_over_with_a_warning(card, changed, reason):
    tuned.write(card, _contents(_row("cuda", 8, 8), **changed))
    with pytest.warns(TuneWarning, match=reason):
        assert tuned.load(CARD) is None


@pytest.mark.parametrize(
    "place, value, said",
    [
        ((), [], "it must be an object"),
        (("format",), "1", "format must be a whole number"),
        (("card",), 7, "card must be a text"),
        (("triton",), 3.7, "triton must be a text or null"),
        (("rows",), {}, "rows must be a list"),
        (("rows", 0), "norm", r"rows\[0\] must be an object"),
        (("rows", 0, "op"), "conv", r"rows\[0\].op must be one of norm, attention, linear"),
        (("rows", 0, "kind"), {"dtype": 1}, r"rows\[0\].kind must be an object of texts"),
        (("rows", 0, "size"), [8], r"rows\[0\].size must be 2 whole numbers"),
        (("rows", 0, "size"), [8, -1], r"rows\[0\].size must be 2 whole numbers"),
        (("rows", 0, "us"), {"cuda": 1.0}, r"rows\[0\].us must be a positive number for each"),
        (("rows", 0, "us"), {"cuda": 1.0, "triton": math.nan}, r"rows\[0\].us must be"),
        (("rows", 0, "choice"), "reference", r"rows\[0\].choice must be one of cuda, triton"),
    ],
)
def test_a_broken_file_is_an_error_that_names_the_place(card, place, value, said):
    tuned.write(card, _contents(_row("cuda", 8, 8)))
    data = json.loads(card.read_text())
    if place:
        at = data
        for key in place[:-1]:
            at = at[key]
        at[place[-1]] = value
    else:
        data = value
    card.write_text(json.dumps(data))
    with pytest.raises(TuneFileError, match=f"{card.name} is not a tune file: {said}"):
        tuned.load(CARD)


def test_a_user_without_a_home_has_no_file(monkeypatch):
    def nobody():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv(tuned.VARIABLE, raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(tuned.Path, "home", nobody)
    assert tuned.path("A card") is None and tuned.load("A card") is None


def test_a_folder_that_may_not_be_entered_is_a_warning(monkeypatch):
    def closed(self):
        raise PermissionError(f"Permission denied: {self}")

    monkeypatch.delenv(tuned.VARIABLE, raising=False)
    monkeypatch.setattr(tuned.Path, "exists", closed)
    with pytest.warns(TuneWarning, match="Permission denied"):
        assert tuned.load("A card") is None


def test_a_file_is_replaced_whole_and_read_as_written(card):
    contents = _contents(_row("cuda", 8, 8), _row("triton", 64, 64))
    tuned.write(card, contents)
    tuned.write(card, contents)
    assert tuned.read(card) == contents
    assert [file.name for file in card.parent.iterdir()] == [card.name]


def test_a_write_that_fails_leaves_the_old_file(card):
    tuned.write(card, _contents(_row("cuda", 8, 8)))
    before = card.read_text()
    with pytest.raises(TypeError):
        tuned.write(card, _contents(_row("triton", 8, 8), card=object()))
    assert card.read_text() == before
    assert [file.name for file in card.parent.iterdir()] == [card.name]


def test_tuning_again_replaces_what_it_measured_and_keeps_the_rest(card):
    tune.save(card, CARD, "forward+backward", [_row("cuda", 8, 8), _row("cuda", 64, 64)])
    tune.save(card, CARD, "forward+backward", [_row("triton", 64, 64)])
    rows = {row.size: row.choice for row in tuned.read(card).rows}
    assert rows == {(8, 8): "cuda", (64, 64): "triton"}
    tune.save(card, "NVIDIA Other", "forward+backward", [_row("cuda", 2, 2)])
    assert [row.size for row in tuned.read(card).rows] == [(2, 2)]


@pytest.mark.parametrize(
    "us, preferred, best",
    [
        ({"cuda": 10.0, "triton": 20.0}, "triton", "cuda"),
        ({"cuda": 10.0, "triton": 9.8}, "cuda", "cuda"),  # within the margin
        ({"cuda": 10.0, "triton": 9.6}, "cuda", "triton"),
        ({"cuda": 10.0, "triton": 20.0}, "cuda", "cuda"),
    ],
)
def test_another_backend_must_be_faster_by_a_margin(us, preferred, best):
    assert tune.pick(us, preferred) == best


@pytest.mark.skipif(_launch.version() is None, reason="triton is not installed")
@pytest.mark.parametrize("case", [layer_norm(8, 64, BF16), linear(16, 64, 64, BF16)])
def test_candidates_are_checked_and_then_timed_by_the_sampler(case):
    """Times are made up; the calls are real."""

    def sample(step, calls):
        with dispatch.recording() as records:
            step()
        return {"cuda": 5e6, "triton": 3e6}[records[0][2].backend] * calls

    with emulator.device("sm_80"):
        reason = _ext.unavailable("cpu")
        if reason:
            pytest.skip(reason)
        row, said = tune.measure(case, torch.device("cpu"), sample, 0.0)
    assert row.us == {"cuda": 5000.0, "triton": 3000.0} and row.choice == "triton"
    assert row.op == case.op.removeprefix("layer_") and "triton" in said
    assert row.size[0] == next(iter(case.shape.values())) and row.kind["dtype"] == "bfloat16"


def test_a_case_that_one_backend_does_not_serve_gives_no_row():
    with emulator.device("sm_80"):
        case = attention(1, 1, 8, 8, torch.float32, backward=False)
        row, said = tune.measure(case, torch.device("cpu"), lambda step, calls: 1.0, 0.0)
    assert row is None and said.startswith("cuda: ")


def test_a_case_with_wrong_results_gives_no_row(monkeypatch):
    case = layer_norm(4, 8, BF16, backward=False)
    monkeypatch.setattr(choice, "BACKENDS", ("cpu", "reference"))
    wrong = functional.layer_norm
    for variant in case.variants[:1]:
        object.__setattr__(variant, "prepare", lambda t: lambda: (wrong(t["x"], 8) + 1,))
    row, said = tune.measure(case, torch.device("cpu"), lambda step, calls: 1.0, 0.0)
    assert row is None and "against float64" in said


def test_measured_sizes_reach_each_other():
    """Between two neighbours of the suite every size has a row near enough."""
    for backward in (True, False):
        cases = suite.cases([BF16], backward)
        assert len({case.id for case in cases}) == len(cases)
    lengths = sorted({case.shape["S"] for case in suite.cases([BF16], True) if "S" in case.shape})
    assert all(b <= a * choice.REACH**2 for a, b in zip(lengths, lengths[1:], strict=False))


@pytest.fixture
def card_here(card, monkeypatch):
    """`llmkern tune` finds a card; every case is measured as if on it."""
    monkeypatch.setattr(tune.registry, "device_of", torch.device)
    monkeypatch.setattr(tune, "measure", lambda *_: (_row("cuda", 8, 8), "cuda (made up)"))
    return card


def test_the_command_measures_the_cases_and_writes_the_file(card_here, capsys, monkeypatch):
    card_here.write_text("broken")
    words = ["tune", "--dtype", "bf16", "--filter", "layer_norm/rows1024xcols1024", "--forward"]
    assert cli.main(words) == 0
    said = capsys.readouterr()
    assert "bf16/fwd: cuda (made up)" in said.out and f"written to {card_here}" in said.out
    assert "it is replaced" in said.err
    written = tuned.read(card_here)
    assert written.rows == (_row("cuda", 8, 8),) and written.card == CARD
    assert written.direction == "forward" and tuned.stale(written, CARD) is None
    monkeypatch.setattr(tune, "measure", lambda *_: (None, "triton: it is a test"))
    assert cli.main([*words, "--output", str(card_here.with_name("other.json"))]) == 1
    assert "nothing to choose between" in capsys.readouterr().out
    assert not card_here.with_name("other.json").exists()


@pytest.mark.slow
def test_counts_of_the_choice_are_those_of_the_kernels():
    run = subprocess.run(
        [sys.executable, ROOT / "tools/choice_figures.py", "--check"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    if run.returncode == 2:
        pytest.skip(run.stderr.strip())
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_without_a_card_tune_says_so_in_one_sentence(capsys, card):
    assert cli.main(["tune", "--device", "cuda"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("llmkern: device 'cuda' cannot be used here: ")
    assert said.count("\n") == 1 and not card.exists()


def test_tune_is_about_cuda(capsys):
    assert cli.main(["tune", "--device", "cpu"]) == 2
    assert "a choice of backends on cuda only, got cpu" in capsys.readouterr().err
