"""`llmkern profile`: counts of a case in the emulator, as text and as JSON."""

import json

import pytest

from llmkern import cli
from llmkern.backends.triton import _launch

pytestmark = pytest.mark.skipif(_launch.version() is None, reason="triton is not installed")


def test_profile_counts_the_kernels_of_a_case(tmp_path, capsys):
    file = tmp_path / "counts.json"
    words = ["profile", "layer_norm rows8xcols64", "--dtype", "bf16", "--json", str(file)]
    assert cli.main(words) == 0
    printed = capsys.readouterr().out
    (found,) = json.loads(file.read_text())
    assert "norm_fwd" in printed and "norm_fwd" in " ".join(found["kernels"])
    assert found["warp_instructions"] == sum(
        k["warp_instructions"] for k in found["kernels"].values()
    )
    # Rows are read once and written once in each direction; weights are small beside them.
    assert found["global_bytes"] >= found["minimum_bytes"] * 0.9
    assert found["conflicts"] == 1.0 and found["mma"] == 0


def test_profile_of_no_case_is_a_usage_error(capsys):
    assert cli.main(["profile", "no such case"]) == 2
    assert "no case matches" in capsys.readouterr().err
