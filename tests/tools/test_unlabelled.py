"""Images without labels: embed, cluster, train on the clusters, on rendered faces."""

import json

import pytest

from tests.support.processes import python

pytest.importorskip("faiss")


@pytest.mark.slow
def test_faces_without_labels_go_from_embeddings_to_a_network(tmp_path):
    """Every step takes what the one before it wrote; what they reach is in the tool's record."""
    sizes = "--known 40 --people 40 --images 5 --pairs 100 --clusters 40 --top 8 --steps 20"
    record = tmp_path / "record.json"
    done = python("tools/unlabelled.py", *sizes.split(), "--out", tmp_path, "--record", record)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("class centers begin at") == 2
    assert "40 of 40" in done.stdout
    accuracy = json.loads(record.read_text())["accuracy"]
    assert accuracy.keys() == {"known", "clusters", "labels"}
    assert all(0.4 < value <= 1 for value in accuracy.values()), accuracy
