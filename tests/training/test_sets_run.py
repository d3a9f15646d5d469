"""Runs on several sets of images, as a user starts them."""

import json
import shutil

import pytest

from partialfc.checkpoint.folder import read_manifest
from tests.support.runs import UNVERIFIED, losses, run

pytestmark = pytest.mark.distributed


def sets(packs, *, first=18, second=6, more=""):
    train, heldout = packs / "train.rec", packs / "heldout.rec"
    return (
        "data.train=",
        f"data.sets={{letters={{train='{train}', images={first}}}, "
        f"others={{train='{heldout}', images={second}{more}}}}}",
    )


@pytest.mark.slow
def test_a_run_on_two_sets_goes_on_and_says_what_it_saw(packs, tmp_path):
    """On another number of ranks, where the batch does not divide by it, with micro-batches."""
    common = ["run.steps=6", "checkpoint.every_steps=3", *UNVERIFIED, *sets(packs)]
    done = run(packs, tmp_path, *common)
    assert done.returncode == 0, done.stderr
    assert "sets: letters 18 images of a batch of 24, 800 in all, 40 identities" in done.stdout
    first = losses(tmp_path)
    newest = tmp_path / "checkpoints" / "step_00000006"
    facts = read_manifest(newest)["facts"]
    assert [one["images"] for one in facts["data.sets"]] == [18, 6]
    shutil.rmtree(newest)
    done = run(packs, tmp_path, *common, "data.uneven=true", "optimizer.accumulation=2", ranks=5)
    assert done.returncode == 0, done.stderr
    assert list(losses(tmp_path)) == list(first)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["epochs_of_sets"] == pytest.approx({"letters": 6 / 44, "others": 6 / 20})
    record = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert record["epoch"] == record["epoch_letters"] == pytest.approx(6 / 44)
    assert "epochs of others" in (tmp_path / "report.html").read_text()
    others = sets(packs, more=", same_people='unknown'")
    done = run(packs, tmp_path, *common[:-2], *others, "run.steps=8")
    assert done.returncode == 4
    assert "data.sets = [" in done.stderr
