"""partialfc estimate: which number of copies of the class centers a cluster is fastest with."""

import pytest

from partialfc.commands._estimate import copies
from partialfc.commands._estimate.cluster import Cluster
from partialfc.commands._estimate.gpus import GPUS
from partialfc.config import load
from tests.commands.test_estimate import estimated
from tests.support.places import ROOT


def layouts_on(nodes, batch, *more):
    """What one copy of the centers and several take on nodes of 8 H200, by ranks of a copy."""
    overrides = ["head.sample_rate=0.01", f"data.global_batch={batch}", *more]
    cluster = Cluster(GPUS["h200"], "cuda", nodes, 8, 50e9)
    config = load(ROOT / "configs" / "ms1mv3_r50.toml", overrides)
    found = copies.layouts(config, {"": 100_000_000}, cluster)
    return {one.ranks_per_copy: one for one in found}, copies.compared(found)


def test_copies_of_centers_by_hand_and_when_they_pay():
    """A node's copy moves the gradients of its rows over the network that its GPUs share."""
    found, said = layouts_on(16, 8192)
    assert [*found] == [128, 64, 32, 16, 8, 4, 2, 1]
    assert found[8].copies == 16
    moved = 2 * 1_000_000 / 8 * 512 * 4 * 15 / 16 / (50e9 / 8 * 0.8)
    assert found[8].seconds == pytest.approx(moved, rel=0.15)
    assert found[8].bytes == pytest.approx(16 * found[128].bytes, rel=0.02)
    assert min(found.values(), key=lambda one: one.seconds) == found[128]
    assert "one copy is faster" in said

    found, said = layouts_on(512, 262144)
    best = min(found.values(), key=lambda one: one.seconds)
    assert best.ranks_per_copy not in (4096, 8)
    assert f"{best.copies} are the fastest" in said
    assert layouts_on(1, 512) == ({}, "")


def test_the_estimate_of_a_run_with_copies_of_centers(tmp_path, capsys):
    words = ["configs/ms1mv3_r50.toml", "head.sample_rate=0.01", "data.global_batch=8192"]
    words += ["--gpus-per-node", 8, "--gpu", "h200", "--identities", 100_000_000, "--nodes", 16]
    record = estimated(tmp_path, *words, "head.ranks_per_copy=64")
    said = capsys.readouterr().out
    assert "2 copies (head.ranks_per_copy) over 64 ranks" in said.replace("\n", " ")
    of_head = [part for part in record["seconds"] if part["name"].startswith("head: ")]
    assert of_head[-1]["name"] == "head: rows' gradients over 2 copies"
    (layout,) = (one for one in record["layouts"] if one["ranks_per_copy"] == 64)
    assert sum(part["seconds"] for part in of_head) == pytest.approx(layout["seconds"])
    centers, states, *_ = record["memory"]["head"]
    assert centers["bytes"][0] + states["bytes"][0] == layout["bytes"]


@pytest.mark.parametrize("setting", ["head.fused=true", "head.overlap=true"])
def test_what_one_copy_alone_has_does_not_stop_a_comparison(setting):
    """Nor do the settings of a copy as large as all ranks."""
    every = ["precision.compute=bf16", setting, "data.global_batch=1024"]
    cluster = Cluster(GPUS["h100"], "cuda", 2, 8, 50e9)
    for more in ([], ["head.ranks_per_copy=16"]):
        config = load(ROOT / "configs" / "ms1mv3_r50.toml", [*every, *more])
        config.check(cluster.ranks)
        found = copies.layouts(config, {"": 93_431}, cluster)
        assert [one.copies for one in found] == [1, 2, 4, 8, 16]
