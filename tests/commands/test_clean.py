"""partialfc clean: dominant centers by hand, and a real run with sub-centers from outside."""

import csv
import json

import numpy as np
import pytest
import torch

from partialfc.__main__ import main
from partialfc.commands import clean
from tests.support.places import FIXTURES
from tests.support.processes import python
from tools import omniglot

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def test_the_dominant_center_has_most_images():
    """Identity 0: two images at center 1, one at 0. Identity 1 has no image, identity 2 one."""
    cosine = torch.tensor([[0.1, 0.9], [0.2, 0.3], [0.8, 0.1], [0.5, 0.6]])
    identities = torch.tensor([0, 0, 0, 2])
    assert clean.dominant(cosine, identities, 3).tolist() == [1, 0, 1]


def test_suspects_are_those_beyond_the_limit_furthest_first(tmp_path):
    path = tmp_path / "suspects.csv"
    assert clean.write(path, np.array([80.0, 10.0, 75.0, 120.0]), np.array([4, 5, 6, 7]), 75.0) == 2
    assert path.read_text().splitlines() == ["record,identity,degrees", "3,7,120.00", "0,4,80.00"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two short runs on the same noisy pack: with three centers an identity, and with one."""
    folder = tmp_path_factory.mktemp("clean")
    archive = FIXTURES / "omniglot" / "omniglot_background.npz"
    size = ["--characters", "16", "--held-out", "6", "--pairs", "200", "--size", "32"]
    assert omniglot.main([str(archive), str(folder), *size, "--noise", "0.4"]) == 0
    for name, steps in (("subcenter_arcface", 30), ("arcface", 2)):
        command = [
            *("launch/train.py", "configs/omniglot.toml"),
            f"data.train={folder / 'train.rec'}",
            "verification.pairs=[]",
            "verification.identification=[]",
            "verification.every_steps=0",
            f"run.folder={folder / name}",
            "run.epochs=",
            f"run.steps={steps}",
            "schedule.warmup_steps=1",
            "data.global_batch=48",
            "backbone.name=convnet_s",
            f"head.margin={{name='{name}',scale=16}}",
            "head.sample_rate=1",
        ]
        python(*command).check_returncode()
    return folder


def test_a_run_with_sub_centers_gives_suspects(runs, tmp_path, capsys):
    before = sorted(runs.rglob("*"))
    out = tmp_path / "out"
    assert clean.main([str(runs / "subcenter_arcface"), "--out", str(out), "--degrees", "88"]) == 0
    rows = list(csv.DictReader((out / "suspects.csv").open()))
    degrees = [float(row["degrees"]) for row in rows]
    assert 0 < len(rows) < 800
    assert degrees == sorted(degrees, reverse=True)
    assert min(degrees) > 88
    assert {int(row["record"]) for row in rows} <= set(range(800))
    listed = [json.loads(line)["image"] for line in (out / "suspects.jsonl").open()]
    assert sorted(listed) == sorted(int(row["record"]) for row in rows)
    assert (out / "angles.png").read_bytes().startswith(b"\x89PNG")
    assert f"{len(rows)} of 800 images" in capsys.readouterr().out
    assert sorted(runs.rglob("*")) == before, "the run was changed"


def test_what_is_no_such_run_is_refused_by_name(runs, tmp_path, capsys):
    assert main(["clean", str(runs / "arcface"), "--out", str(tmp_path / "out")]) == 2
    assert "its margin 'arcface' has one center an identity" in capsys.readouterr().err
    assert main(["clean", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "config.toml" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
