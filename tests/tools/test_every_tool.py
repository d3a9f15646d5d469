"""What every tool has in common."""

import pytest

from tests.support.places import ROOT
from tests.support.processes import python


@pytest.mark.parametrize("name", sorted((ROOT / "tools").glob("*.py")), ids=lambda path: path.name)
def test_every_tool_starts_from_any_folder(name, tmp_path):
    done = python(name, "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout
