"""The benchmark of what grows, in small: each row does what its figures are of."""

import json

import pytest

from partialfc.distributed.links import Links
from tests.support.month import EACH
from tools.bench import growth


def measured(tmp_path, rows):
    """The record of some rows, by their name; every figure is of something."""
    out = tmp_path / "out.json"
    assert growth.main(["--small", "--rows", rows, "--json", str(out)]) == 0
    record = json.loads(out.read_text())
    assert [*record["rows"]] == rows.split(",")
    found = {name: sizes[0] for name, sizes in record["rows"].items()}
    assert all(figure > 0 for row in found.values() for figure in row.values()), found
    return found


@pytest.fixture(autouse=True)
def loopback(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")


def test_a_row_of_one_process_does_what_it_counts(tmp_path, capsys):
    found = measured(tmp_path, "flag,goodput,moves,index,folders")
    assert found["flag"]["messages"] == 2
    # All that the process opened meanwhile, by ranks: 4 of each rank, and 7 with the ring's.
    assert 4 <= found["flag"]["links_descriptors"] < found["flag"]["ring_descriptors"]
    # To the last sign of life, 60 s before the end of a start.
    assert found["goodput"]["wall_of_the_run"] == 20 * 100 - 60
    assert found["moves"]["bytes_at_most"] == 32 * (3000 + 1)
    assert found["index"]["records"] == 200_000
    assert capsys.readouterr().out.count("\n") == 5


@pytest.mark.slow
def test_a_row_of_programs_has_what_they_did(tmp_path):
    found = measured(tmp_path, "watchdog,names,parts,sums,month,identities")
    assert found["watchdog"]["requests_of_a_rank_in_4_looks"] >= 8
    assert found["watchdog"]["wall_seconds_from_the_last_beat_to_its_name"] > 6  # of silence
    assert found["parts"]["opens"] == 8 + 6 - 2
    assert found["month"]["page_read"] > EACH  # bytes
    assert found["identities"]["bytes_of_the_centers"] == 4 * 128 * 2000


def test_a_question_that_nobody_hears_is_no_figure(monkeypatch, tmp_path):
    monkeypatch.setattr(Links, "any", lambda self, own: False)
    out = tmp_path / "out.json"
    with pytest.raises(AssertionError, match="one rank knew each time"):
        growth.main(["--small", "--rows", "goodput,flag", "--json", str(out)])
    rows = json.loads(out.read_text())["rows"]
    assert [*rows] == ["goodput"]  # written as it was measured


def test_a_row_that_does_not_exist_is_refused(capsys):
    with pytest.raises(SystemExit):
        growth.main(["--rows", "flag,flags"])
    assert "no row flags; there are watchdog, " in capsys.readouterr().err
