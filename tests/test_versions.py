"""What `make test-versions` runs, and what it leaves out."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import versions as tool  # noqa: E402

sys.path.pop(0)


def test_every_supported_torch_is_run():
    assert [v for v, _ in tool.supported().TESTED] == ["2.9.1", "2.11.0", "2.13.0", "2.14.1"]


def test_left_out_files_exist_and_others_run():
    everywhere = tool.left_out("3.7.1")
    assert all((ROOT / "tests" / name).exists() for name in everywhere)
    assert {n for n in everywhere if not n.startswith("test_emulator_")} == set(tool.NO_TORCH)
    newest = set(tool.left_out("3.8.0"))
    assert newest > set(everywhere)
    assert not newest & {"test_nn.py", "test_transforms.py", "test_attention_compile.py"}


def test_a_failure_is_an_exit_code(tmp_path, monkeypatch):
    monkeypatch.setattr(tool, "FOLDER", tmp_path)
    file = tmp_path / "test_it.py"
    file.write_text("def test_it(): assert False\n")
    code, closing = tool.run(Path(sys.executable), "2.13.0", "3.7.1", [str(file)])
    assert code and "1 failed" in closing
    assert "assert False" in (tmp_path / "2.13.0.log").read_text()


def test_an_environment_that_cannot_be_made_is_a_row(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tool, "FOLDER", tmp_path)

    def refuse(command, **options):
        raise subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(tool.subprocess, "run", refuse)
    monkeypatch.setattr(sys, "argv", ["versions.py", "--only", "2.9.1"])
    assert tool.main() == 1
    assert "could not be made" in capsys.readouterr().out


def test_info_names_the_range(capsys, monkeypatch):
    import torch

    from llmkern import cli, supported

    assert cli.main(["info"]) == 0
    assert supported.described() in capsys.readouterr().out
    monkeypatch.setattr(torch, "__version__", "2.8.0+cpu")
    assert cli.main(["info"]) == 0
    assert "older than what is supported" in capsys.readouterr().out
