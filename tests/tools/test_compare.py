"""tools/compare.py on real handwriting: what is trained, what the report says, what is refused."""

import csv
import re
from pathlib import Path

import pytest

from partialfc.config import load
from tests.support.places import ROOT
from tools import compare

CONFIG = "configs/omniglot.toml"

pytestmark = pytest.mark.distributed


@pytest.fixture
def words(forty_characters):
    return [*forty_characters, "run.steps=3", "data.global_batch=48", "log.every_steps=1"]


@pytest.mark.slow
def test_two_margins_with_two_seeds(words, tmp_path, monkeypatch):
    """Every number of the report is there; a second call trains nothing; a failure is told."""
    monkeypatch.chdir(ROOT)
    out = tmp_path / "out"
    margins = ["--margins", "softmax,subcenter_arcface", "--seeds", "1,2", "--out", str(out)]
    assert compare.main([CONFIG, *margins, *words]) == 0
    rows = list(csv.DictReader((out / "results.csv").open()))
    assert [(row["setting"], row["seed"]) for row in rows] == [
        (margin, seed) for margin in ("softmax", "subcenter_arcface") for seed in "12"
    ]
    for row in rows:
        for number in ("training accuracy", "verification", "rank 1", "IR@FPIR 0.1"):
            assert 0 <= float(row[number]) <= 1, number
        assert 0 < float(row["angle to own"]) < 180
    page = (out / "report.html").read_text()
    assert page.count("<svg") == 3 + 1 + 2, "accuracies, losses, angles of two margins"
    assert page.count('class="best"') >= 6, "each column that is compared has its best"
    assert not re.search(r"(src|href)=", page), "the page needs something outside it"
    assert "subcenter_arcface" in page

    config = load(out / "subcenter_arcface" / "seed_1" / "config.toml")
    assert config.head.margin.model_dump()["scale"] == 32, "the base's scale"
    before = {path: path.stat().st_mtime_ns for path in out.rglob("summary.json")}
    assert compare.main([CONFIG, *margins, *words]) == 0
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("summary.json")}


@pytest.mark.slow
def test_a_run_that_fails_is_told_and_left_out(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    out = ["--seeds", "1", "--out", str(tmp_path / "out")]
    vary = ["--vary", "data.global_batch=1000000,48", *out]
    assert compare.main([CONFIG, *vary, *words]) == 1
    said = capsys.readouterr().err
    assert "failed, and not in the report: data.global_batch = 1000000, seed 1" in said
    assert "1000000" in said.split("failed")[0], "the end of the log says why"
    (row,) = csv.DictReader((tmp_path / "out" / "results.csv").open())
    assert row["setting"] == "data.global_batch = 48"


def test_what_make_taught_compares(monkeypatch):
    """Tables are values too: without a teacher, and with the network of make omniglot."""
    monkeypatch.chdir(ROOT)
    (line,) = re.findall(r"'--vary=(losses.teacher=.*)'", Path("Makefile").read_text())
    alone, taught = compare.variants_of([Path(CONFIG)], ["backbone.name=convnet_s"], None, line)
    assert load(CONFIG, alone.overrides).losses.teacher.weight == 0
    teacher = load(CONFIG, taught.overrides).losses.teacher
    assert teacher.paths == (load(CONFIG).run.folder,)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["configs/demo.toml", "configs/omniglot.toml", "--margins", "arcface"],
            "one settings file",
        ),
        (["configs/demo.toml", "--margins", "arcfase"], "--margins arcfase: must be of arcface"),
        (["configs/demo.toml", "--vary", "head.sample_rate=1,2"], "head.sample_rate = 2"),
        (["configs/demo.toml", "configs/demo.toml"], "need different names"),
        (["configs/demo.toml", "--vary", "losses.teacher={}, {from"], "must be TOML"),
    ],
)
def test_a_mistake_is_told_before_the_first_run(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert compare.main([*arguments, "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
