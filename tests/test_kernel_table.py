"""`llmkern kernels`: the CUDA C++ kernels beside Triton's, without a GPU."""

import json

import pytest

from llmkern import cli, emulator
from llmkern.backends.cuda import _ext
from llmkern.backends.triton import _launch
from llmkern.bench import compiled, compiled_cuda, kernel_table
from llmkern.errors import BackendError

needs_triton = pytest.mark.skipif(_launch.version() is None, reason="triton is not installed")


@pytest.fixture(scope="module")
def built():
    with emulator.device("sm_80"):
        reason = _ext.unavailable("cpu")
    if reason:
        pytest.skip(reason)


@pytest.fixture(scope="module")
def forms(built):
    return list(compiled_cuda.forms(80))


def test_every_kernel_of_the_extension_has_a_form(forms):
    """On a card with much shared memory, or on one with less."""
    launched = {form.launch.kernel for form in (*forms, *compiled_cuda.forms(86))}
    programs = {form.launch.program for form in forms}
    missing = {name for program in programs for name in program.kernels()} - launched
    assert not {compiled_cuda.readable(name) for name in missing}


def test_forms_have_names_of_their_own(forms):
    names = [(form.op, form.name) for form in forms]
    assert len(set(names)) == len(names)
    assert {op for op, _ in names} == {"norm", "attention", "linear"}


@pytest.mark.parametrize(
    "symbol, name",
    [
        ("_ZN7llmkern12_GLOBAL__N_115norm_fwd_kernelIffEEvNS0_9FwdParamsE", "norm_fwd<fp32, fp32>"),
        ("_ZN7llmkern12_GLOBAL__N_115norm_fwd_kernelINS_8BFloat16ES2_EEvNS0_9FwdParamsE",
         "norm_fwd<bf16, bf16>"),
        ("_ZN7llmkern12_GLOBAL__N_111gemm_kernelINS_7Float16ELb0ELb1ELi64EEEvNS0_10GemmParamsE",
         "gemm<fp16, 0, 1, 64>"),
        ("_ZN7llmkern12_GLOBAL__N_118column_sums_kernelENS_16ColumnSumsParamsE", "column_sums"),
        ("no_such_mangling", "no_such_mangling"),
    ],
)  # fmt: skip
def test_mangled_names_are_made_readable(symbol, name):
    assert compiled_cuda.readable(symbol) == name


@needs_triton
def test_registers_shared_memory_and_occupancy_of_a_form(forms):
    form = next(form for form in forms if form.name.startswith("attention_fwd<bf16, 64>"))
    for capability in (80, 90):
        row = compiled_cuda.inspect(form, capability)
        assert row.target == f"sm_{capability}" and row.backend == "cuda" and row.num_warps == 4
        assert 0 < row.registers <= 255 and row.spill_bytes == 0
        assert row.shared_bytes == form.launch.shared_bytes > 0
        assert 0 < row.occupancy <= 1 and row.programs >= 1
        assert row.tensor > 0 and row.loads_16 > 0 and row.async_copies > 0


@needs_triton
def test_both_backends_stand_in_one_table(forms, tmp_path, monkeypatch):
    first = next(compiled.forms(80))
    monkeypatch.setattr(compiled, "forms", lambda capability: [first])
    monkeypatch.setattr(compiled_cuda, "forms", lambda _: forms[:1])
    file = tmp_path / "rows.json"
    assert cli.main(["kernels", "--json", str(file)]) == 0
    rows = json.loads(file.read_text())
    assert {row["backend"] for row in rows} == {"triton", "cuda"}
    assert all(row["registers"] > 0 and row["target"] == "sm_80" for row in rows)


def test_a_missing_backend_is_told_and_the_other_listed(monkeypatch, capsys):
    def missing(*_):
        raise BackendError("kernels: not here")

    monkeypatch.setattr(kernel_table, "_of_triton", missing)
    monkeypatch.setattr(kernel_table, "_of_cuda", lambda *_: iter(()))
    assert cli.main(["kernels", "--json", "-"]) == 0
    said = capsys.readouterr()
    assert said.out.strip() == "[]" and "not here" in said.err
    assert cli.main(["kernels", "--json", "-", "--backend", "triton"]) == 2
    monkeypatch.setattr(kernel_table, "_of_cuda", missing)
    assert cli.main(["kernels", "--json", "-"]) == 2
