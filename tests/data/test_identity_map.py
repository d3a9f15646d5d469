"""Maps of identities: what is written is read, and what is no map is refused."""

import numpy as np
import pytest

from partialfc.data.dataset import open_dataset
from partialfc.data.identity_map import numbering, read_identity_map, write_identity_map
from tests.support.places import FIXTURES

GOLDEN = FIXTURES / "records" / "insightface.rec"
HEADER = f"{'0' * 32}\t{'f' * 32}\n"


def test_what_is_written_is_read(tmp_path):
    """Its header says of which data sets it is, so that one of others is found out."""
    dataset = open_dataset([GOLDEN])
    write_identity_map(tmp_path / "map", [(7, 2), (3, 2), (5, 0)], of=dataset, onto=dataset)
    found = read_identity_map(tmp_path / "map")
    assert found.of == found.onto == numbering(dataset)
    np.testing.assert_array_equal(found.identity_M, [3, 5, 7])
    np.testing.assert_array_equal(found.onto_M, [2, 0, 2])
    write_identity_map(tmp_path / "map", [], of=dataset, onto=dataset)
    assert len(read_identity_map(tmp_path / "map").identity_M) == 0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "line 1: must be 32 hexadecimal digits"),
        ("1\t2\n", "line 1: must be 32"),
        (HEADER + "1\t2\n1 2\n", "line 3: '1 2.n' must be an identity"),
        (HEADER + "-1\t2\n", "line 2"),
        (HEADER + "1\t2\t3\n", "line 2"),
        (HEADER + "\n", "line 2"),
        (HEADER + "9" * 10_000_000, "line 2: '9999"),
        (HEADER + "١\t2\n", "line 2"),
        (HEADER + "4\t1\n1\t2\n4\t2\n", "identity 4 comes twice"),
    ],
)
def test_what_is_no_map_is_refused(text, words, tmp_path):
    """A long line is not read whole."""
    (tmp_path / "map").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=words) as error:
        read_identity_map(tmp_path / "map")
    assert "map: " in str(error.value)
    assert len(str(error.value)) < 400
