"""`llmkern profile`: counts of a case in the emulator, as text and as JSON."""

import dataclasses
import json

import pytest

from llmkern import cli
from llmkern.backends.triton import _launch
from llmkern.bench import against_peers, peers

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


def test_rows_against_peers_are_counted_and_compared(tmp_path, capsys):
    file = tmp_path / "rows.json"
    assert cli.main(["profile", "--against-peers", "rms_norm 1024 fwd", "--json", str(file)]) == 0
    printed = capsys.readouterr().out
    assert "rms_norm 1024 fwd" in printed and "liger-kernel" in printed
    rows = {row["name"]: row for row in json.loads(file.read_text())}
    assert set(rows) == {"rms_norm 1024 fwd", "add_rms_norm 1024 fwd"}
    plain, added = rows["rms_norm 1024 fwd"], rows["add_rms_norm 1024 fwd"]
    assert 1.0 <= added["bytes"] < plain["bytes"]  # twice the tensors beside the same weight
    assert plain["instructions"] > 0 and plain["excess"] == []


def test_what_a_peer_needs_less_of_is_said():
    counts = dict(join_warp=0.0, join_bytes=0.0, instructions=1, spill_bytes=0, coalescing=1.0)
    peer = peers.PEERS["layer_norm 1024 bwd"]
    same = against_peers.Row("layer_norm 1024 bwd", peer.warp, peer.bytes, 0.0, 1.0, **counts)
    assert same.excess == ()
    worse = dataclasses.replace(same, bytes=peer.bytes + 0.01, conflicts=1.1)
    assert worse.excess == ("bytes", "conflicts")
    assert f"**{worse.bytes:.2f}** / {peer.bytes:.2f}" in against_peers.table([worse])
