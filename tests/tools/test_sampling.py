"""tools/sampling.py on real handwriting: what is trained, what goes on, what its table says."""

import json

import pytest

from tests.support.places import FIXTURES, ROOT
from tools import omniglot, sampling

CONFIG = "configs/omniglot.toml"


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """Overrides for forty identities and six steps."""
    folder = tmp_path_factory.mktemp("packs")
    archive = FIXTURES / "omniglot" / "omniglot_background.npz"
    size = ["--characters", "16", "--held-out", "6", "--pairs", "200", "--size", "32"]
    assert omniglot.main([str(archive), str(folder), *size]) == 0
    return [
        f"data.train={folder / 'train.rec'}",
        f"verification.pairs=['{folder / 'heldout_pairs.bin'}']",
        f"verification.identification=['{folder / 'heldout.rec'}']",
        "run.epochs=",
        "run.steps=6",
        "schedule.warmup_steps=2",
        "data.global_batch=16",
        "backbone.name=convnet_s",
        "head.canonical_shards=2",
        "head.nearest.every_steps=2",
        "run.threads=1",
    ]


def study(out, words, *, rates, seeds="1"):
    asked = ["--rates", rates, "--negatives", "uniform,nearest", "--seeds", seeds]
    assert sampling.main([CONFIG, *asked, "--json", str(out), *words]) == 0
    return json.loads(out.read_text())["rows"]


@pytest.mark.slow
def test_a_study_trains_what_its_record_lacks_and_repeats_itself(words, tmp_path, monkeypatch):
    """At a rate of 1 one kind is trained. A second call keeps the rows; another has the same."""
    monkeypatch.chdir(ROOT)
    first = study(tmp_path / "a.json", words, rates="1")
    rows = study(tmp_path / "a.json", words, rates="1,0.3")
    assert rows[:1] == first
    found = [(row["seed"], row["rate"], row["negatives"]) for row in rows]
    assert found == [(1, 1, "uniform"), (1, 0.3, "uniform"), (1, 0.3, "nearest")]
    assert len({row["loss"] for row in rows}) == 3, "a kind of negatives changed nothing"
    for row in rows:
        assert row["steps"] == 6
        assert all(0 <= row[name] <= 1 for name in ("rank_1", "verification"))
        assert row["tar_at_far_1e-3"] is None, "a hundred pairs do not say what 1e-3 of them are"
    again = study(tmp_path / "b.json", words, rates="0.3")
    same = ("rank_1", "verification", "loss")
    assert [[row[name] for name in same] for row in again] == [
        [row[name] for name in same] for row in rows[1:]
    ]
    with pytest.raises(SystemExit, match="other settings"):
        study(tmp_path / "b.json", [*words, "optimizer.lr=0.3"], rates="1")


def test_the_table_tells_means_over_seeds_and_differences_of_the_same_seed():
    def row(seed, rate, negatives, rank_1):
        numbers = {"verification": 0.9, "tar_at_far_1e-3": 0.5, "cpu_seconds_of_a_step": 0.01}
        return {"seed": seed, "rate": rate, "negatives": negatives, "rank_1": rank_1, **numbers}

    rows = [row(1, 1.0, "uniform", 0.5), row(2, 1.0, "uniform", 0.6)]
    rows += [row(1, 0.1, "weighted", 0.49), row(2, 0.1, "weighted", 0.57)]
    lines = sampling.shown(rows).splitlines()
    assert "55.00 ± 7.07" in lines[-2]
    assert "53.00 ± 5.66" in lines[-1]
    assert "-2.00 ± 1.00" in lines[-1]
