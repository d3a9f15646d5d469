"""tools/sampling.py on real handwriting: what is trained, what goes on, what its table says."""

import json
import re

import pytest

from partialfc.config import load
from partialfc.training.schedule import learning_rate
from tests.support.places import ROOT
from tools import sampling

CONFIG = "configs/omniglot.toml"


@pytest.fixture
def words(forty_characters):
    return [
        *forty_characters,
        "run.steps=6",
        "data.global_batch=16",
        "head.canonical_shards=2",
        "head.nearest.every_steps=2",
    ]


def study(out, words, *, rates, negatives="uniform,nearest"):
    asked = ["--rates", rates, "--negatives", negatives, "--seeds", "1"]
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


@pytest.mark.slow
def test_rate_1_is_trained_whatever_kinds_are_asked_for(words, tmp_path, monkeypatch):
    """The settings refuse other negatives where every step has all centers."""
    monkeypatch.chdir(ROOT)
    (row,) = study(tmp_path / "a.json", words, rates="1", negatives="weighted,nearest")
    assert (row["rate"], row["negatives"]) == (1, "uniform")


def test_a_seed_has_one_run_at_rate_1():
    assert sampling.runs("1,2", "1,0.1", "weighted,nearest") == [
        (seed, *run)
        for seed in (1, 2)
        for run in ((1.0, "uniform"), (0.1, "weighted"), (0.1, "nearest"))
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    "schedule",
    [
        ["schedule={name='polynomial', power=3.0, warmup_steps=1}"],
        ["schedule={name='wsd', decay_steps=2}"],
    ],
)
def test_the_learning_rate_is_that_of_the_schedule(schedule, words, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    rates, step = [], sampling.train_step
    monkeypatch.setattr(
        sampling, "train_step", lambda *given: rates.append(given[-1]) or step(*given)
    )
    words = [word for word in words if not word.startswith("schedule")] + schedule
    study(tmp_path / "a.json", words, rates="1")
    config = load(CONFIG, [word for word in words if "nearest" not in word])
    settings = config.schedule.model_dump()
    assert rates == [
        learning_rate(step, peak=config.optimizer.lr, total_steps=6, **settings)
        for step in range(6)
    ]


@pytest.mark.parametrize(
    ("word", "named"),
    [
        ("data.augment.crop=0.5", "data.augment"),
        ("data.images_per_identity=2", "data.images_per_identity"),
        ("data.last_batch=pad", "data.last_batch"),
        ("data.skip=bad.txt", "data.skip"),
        ("data.block=64", "data.block"),
        ("data.train=['a.rec', 'b.rec']", "data.train of several sources"),
        ("head.start=pack:mean", "head.start"),
        ("run.start_from=runs/a", "run.start_from"),
        ("losses.teacher={from='a.onnx', weight=0.5}", "losses.teacher"),
        ("stages=[{name='a', epochs=1}, {name='b', epochs=1}]", "stages"),
        ("verification.flip=true", "verification.flip"),
        ("verification.pairs=[]", "verification.pairs"),
    ],
)
def test_what_a_run_does_not_follow_is_refused_by_name(word, named, tmp_path, monkeypatch):
    """Nothing is opened before."""
    monkeypatch.chdir(ROOT)
    out = ["--json", str(tmp_path / "out.json")]
    with pytest.raises(SystemExit, match=re.escape(named)):
        sampling.main([CONFIG, *out, "--rates", "0.3", word])


def row(seed, rate, negatives, rank_1):
    numbers = {"verification": 0.9, "tar_at_far_1e-3": 0.5, "cpu_seconds_of_a_step": 0.01}
    return {"seed": seed, "rate": rate, "negatives": negatives, "rank_1": rank_1, **numbers}


ROWS = [
    row(1, 1.0, "uniform", 0.5),
    row(2, 1.0, "uniform", 0.6),
    row(1, 0.1, "weighted", 0.49),
    row(2, 0.1, "weighted", 0.57),
]


def test_the_table_tells_means_over_seeds_and_differences_of_the_same_seed():
    lines = sampling.shown(ROWS).splitlines()
    assert "55.00 ± 7.07" in lines[-2]
    assert "53.00 ± 5.66" in lines[-1]
    assert "-2.00 ± 1.00" in lines[-1]


def test_a_page_has_a_section_for_each_record_with_a_dot_for_each_run(tmp_path):
    paths = [tmp_path / "long.json", tmp_path / "short.json"]
    for path, rows in zip(paths, (ROWS, ROWS[2:]), strict=True):
        record = {"config": CONFIG, "words": ["run.steps=6"], "rows": rows}
        path.write_text(json.dumps(record))
    page = tmp_path / "page.html"
    assert sampling.main(["--table", *map(str, paths), "--page", str(page)]) == 0
    long, short = page.read_text().split("<section>")[1:]
    assert re.findall("<h2>(.*)</h2>", long + short) == ["long", "short"]
    assert "configs/omniglot.toml run.steps=6" in short
    assert "-2.00 ± 1.00" in long
    # Four runs and two differences; without a run at rate 1 there are no differences.
    assert [one.count("<circle") for one in (long, short)] == [6, 2]


def test_a_page_of_no_records_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="--table"):
        sampling.main([CONFIG, "--json", "a.json", "--page", str(tmp_path / "page.html")])
