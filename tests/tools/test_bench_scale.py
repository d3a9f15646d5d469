"""tools/bench/scale.py as a user starts it."""

import json
import subprocess
import sys

import pytest

from tests.support.places import ROOT


@pytest.mark.slow
def test_places_and_states_are_measured_and_checkpointed(tmp_path):
    """A column that is not filled, or a path of the machine in a record."""
    record = tmp_path / "scale.json"
    command = [
        *(sys.executable, "tools/bench/scale.py", "--identities", "20000", "--dim", "16"),
        *("--rows", "1000", "--state", "fp16+int8", "--place", "device,files", "--seconds", "0"),
        *("--threads", "1", "--folder", tmp_path / "rows", "--checkpoint", tmp_path / "saved"),
        *("--json", record),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "20,000" in done.stdout
    text = record.read_text()
    assert str(tmp_path) not in text.replace(json.loads(text)["command"], "")
    rows = json.loads(text)["rows"]
    assert [row["place"] for row in rows] == ["device", "files"]
    for row in rows:
        # fp16 and its scale, int8 and its scale, the step that the row is at
        assert row["bytes_per_identity"] == 16 * 2 + 4 + 16 + 4 + 4
        assert row["step_seconds"]["p50"] > 0
        assert 1000 <= row["sampled_rows"] <= 1200
        assert {"save_seconds", "verify_seconds", "load_seconds"} <= row["saved"].keys()
    assert not list((tmp_path / "rows").iterdir()), "mapped files are gone with the process"
