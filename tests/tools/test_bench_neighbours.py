"""The benchmark of the search of neighbours."""

import json

from tests.support.places import ROOT
from tests.support.processes import python


def test_the_first_rows_look_alone_and_tell_what_all_take(tmp_path):
    out = tmp_path / "out.json"
    words = ["--identities", "200", "--dim", "8", "--rows", "50,100", "--json", str(out)]
    done = python(ROOT / "tools/bench/neighbours.py", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    record = json.loads(out.read_text())
    first, last = record["found"]
    assert (first["rows"], last["rows"], record["identities"]) == (50, 100, 200)
    more = (last["cpu_seconds"] - first["cpu_seconds"]) / 50
    assert abs(record["whole_cpu_seconds"] - (last["cpu_seconds"] + 100 * more)) < 1e-9
    assert "all rows: " in done.stdout
