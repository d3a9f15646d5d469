"""partialfc estimate: which number of copies of the class centers a cluster is fastest with."""

import re

import pytest

from partialfc.commands._estimate import copies
from partialfc.commands._estimate.cluster import Cluster
from partialfc.commands._estimate.gpus import GPUS
from partialfc.config import load
from tests.commands.test_estimate import estimated
from tests.support.places import ROOT


def layouts_on(nodes, batch, *more, identities=100_000_000, network=50e9):
    """What one copy of the centers and several take on nodes of 8 H200, by ranks of a copy."""
    overrides = ["head.sample_rate=0.01", f"data.global_batch={batch}", *more]
    cluster = Cluster(GPUS["h200"], "cuda", nodes, 8, network)
    config = load(ROOT / "configs" / "ms1mv3_r50.toml", overrides)
    found = copies.layouts(config, {"": identities}, cluster)
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


NARROW = ["head.center_format=fp16", "head.optimizer.momentum_format=int8"]
"""Of both pages' tables; so are 64 images a GPU."""


def rows_of(page, pattern):
    """The rows of a table, as the groups of a pattern."""
    found = re.findall(pattern, (ROOT / page).read_text().replace("**", ""), re.MULTILINE)
    assert found, f"{page} has no such table"
    return found


def count_of(words):
    """A number as a page has it: 4,096, 100 million, 1 billion."""
    digits, _, word = words.partition(" ")
    return int(digits.replace(",", "")) * {"": 1, "million": 10**6, "billion": 10**9}[word]


def test_the_network_of_a_thousand_ranks_and_more_is_as_the_estimator_says():
    """launch/README: who books 512 nodes reads it there."""
    one = r"([\d,.]+ MiB, [\d.]+ of [\d.]+ ms)"
    table = rows_of(
        "launch/README.md", rf"^\| (\d+) \| (\w+ \w+) \| {one} \| ([\d,]+) \| {one} \|$"
    )
    assert [(row[0], row[1]) for row in table] == [
        (str(nodes), count)
        for count in ("100 million", "1 billion")
        for nodes in (64, 128, 256, 512)
    ]
    for nodes, count, of_one, ranks, of_several in table:
        found, _ = layouts_on(
            int(nodes),
            64 * 8 * int(nodes),
            *NARROW,
            identities=count_of(count),
            network=8 * 50e9,
        )
        every = [*found.values()]
        best = copies.fastest(every)
        assert best.ranks_per_copy == count_of(ranks)
        for layout, said in ((every[0], of_one), (best, of_several)):
            moving, seconds = layout.moving * 1e3, layout.seconds * 1e3
            assert said == f"{layout.sent / 2**20:,.0f} MiB, {moving:.1f} of {seconds:.1f} ms"


def test_the_page_of_copies_has_the_times_of_the_estimator():
    ms = r"([\d,.]+) ms"
    table = rows_of(
        "partialfc/head/copies.md",
        rf"^\| (\w+ \w+), 1 % \| ([\d,]+) \| {ms} \| {ms} \| ([\d,]+) copies[\w ,]*?, {ms} \|$",
    )
    assert len(table) == 6
    for count, gpus, one, node, several, best in table:
        ranks = count_of(gpus)
        found, _ = layouts_on(ranks // 8, 64 * ranks, *NARROW, identities=count_of(count))
        fastest = copies.fastest([*found.values()])
        said = [count_of(cell.split(".")[0]) for cell in (one, node, best)]
        times = [found[ranks].seconds, found[8].seconds, fastest.seconds]
        assert said == pytest.approx([time * 1e3 for time in times], abs=1.01)
        assert fastest.copies == count_of(several)


def test_what_a_rank_sends_by_hand():
    """One copy: the batch's operands, sums and gradients in a ring; two: half of each, and rows."""
    found, _ = layouts_on(16, 8192, *NARROW)
    ring = 8192 * (2 * 512 + 8 + 4 * 4 + 4 * 512)
    assert found[128].sent == pytest.approx(ring * 127 / 128, rel=1e-6)
    rows = 1_000_000 / 64 * 512 * 4
    assert found[64].sent == pytest.approx(ring / 2 * 63 / 64 + 2 * rows / 2, rel=0.01)
    assert found[64].moving < found[64].seconds
