"""Centers stay with their people when a folder is packed again with more of them."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from partialfc.__main__ import main
from partialfc.checkpoint.folder import read_manifest
from partialfc.checkpoint.warm_start import _others
from partialfc.data.dataset import open_dataset
from partialfc.data.names import names_of, names_path, read_names
from tests.commands.test_identities import centers_of, rows_of
from tests.support.images import face
from tests.support.runs import UNVERIFIED, run

pytestmark = pytest.mark.distributed
FIRST = ["bea", "eva", "ida", "ute"]
MORE = ["ada", "bea", "cleo", "dora", "eva", "fay", "ida", "ute"]
SMALL = ("schedule.warmup_steps=0", "data.global_batch=8", "data.image_size=32", *UNVERIFIED)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Packs of some people, and of more of them, of whom most have another number then."""
    folder = tmp_path_factory.mktemp("photos")
    for number, name in enumerate(MORE):
        (folder / "more" / name).mkdir(parents=True)
        for image in range(4):
            pixels = Image.fromarray(face(number, image, 32))
            pixels.save(folder / "more" / name / f"{image}.jpg", quality=95)
    for name in FIRST:
        shutil.copytree(folder / "more" / name, folder / "first" / name)
    for which in ("first", "more"):
        words = ["pack", folder / which, folder / f"{which}.rec", "--size", "32", "--workers", "1"]
        assert main([str(word) for word in words]) == 0
    return folder


@pytest.fixture(scope="module")
def trained(photos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "run"
    done = run(photos, folder, "run.steps=2", *data(photos / "first.rec"))
    assert done.returncode == 0, done.stderr
    return folder


def data(path):
    return (*SMALL, f"data.train={path}")


def test_a_run_keeps_the_names_of_its_identities(trained):
    assert read_names(trained / "identities.json") == FIRST


def test_centers_go_with_their_names_however_the_data_is_numbered(photos, trained, tmp_path):
    start, names = tmp_path / "start", names_path(photos / "more.rec")
    assert main(["identities", str(trained), str(start), "--names", str(names)]) == 0
    before, after = centers_of(trained), rows_of(start)
    assert after.shape[0] == len(MORE)
    for number, name in enumerate(FIRST):
        assert torch.equal(after[MORE.index(name)], before[number]), name
    done = run(photos, tmp_path / "run", "run.steps=1", *data(photos / "more.rec"), begin(start))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("what", ["more.rec", "more"])
def test_centers_of_other_people_are_refused_by_name(photos, trained, tmp_path, what):
    """Of a pack and of a folder: the old numbers with more behind them are other people."""
    start = tmp_path / "start"
    assert main(["identities", str(trained), str(start), "--identities", str(len(MORE))]) == 0
    words = ["run.steps=1", *data(photos / what), begin(start)]
    done = run(photos, tmp_path / "run", *words, ranks=2)
    assert done.returncode == 2
    assert "identity 0 is 'bea' there, and 'ada' in data.train" in done.stderr
    assert "--names" in done.stderr
    assert not (tmp_path / "run" / "checkpoints").exists()


def begin(start):
    return f"run.start_from={start}"


def test_a_map_moves_names_too(photos, trained, tmp_path):
    (tmp_path / "map.csv").write_text("0,2\n1,1\n2,1\n")
    words = [str(trained), str(tmp_path / "start"), "--map", str(tmp_path / "map.csv")]
    assert main(["identities", *words, "--identities", "5"]) == 0
    assert read_names(tmp_path / "start" / "identities.json") == [None, None, "bea", None, None]


def test_data_that_names_nobody_is_warned_of(photos, trained, tmp_path, capsys):
    """Nobody could look whether the centers are those of its people, and nobody said so."""
    start, pack = tmp_path / "start", shutil.copy(photos / "first.rec", tmp_path)
    shutil.copy(photos / "first.idx", tmp_path)
    assert main(["identities", str(trained), str(start)]) == 0
    assert _others(start, read_manifest(start), open_dataset([Path(pack)])) == ""
    assert "data.train does not say who its identities are" in capsys.readouterr().out


def test_damaged_names_of_a_start_are_refused(photos, trained, tmp_path):
    start = tmp_path / "start"
    assert main(["identities", str(trained), str(start)]) == 0
    (start / "identities.json").write_text('["someone"]')
    done = run(photos, tmp_path / "run", "run.steps=1", *data(photos / "first.rec"), begin(start))
    assert done.returncode == 2
    assert "identities.json: it is not as it was written" in done.stderr


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (["a", "b"], ["a"], "2 old names, and the run has 4 identities"),
        (FIRST, ["a", "b"], "no name is among the old and the new ones"),
        (FIRST, ["bea", "bea"], "'bea' occurs twice among the new ones"),
        (FIRST, {"bea": 0}, "must be a JSON list of names"),
        (FIRST, [["bea"]], "entry 0 must be a name"),
    ],
)
def test_a_mistake_in_names_is_named(trained, tmp_path, capsys, old, new, message):
    for name, content in (("old", old), ("new", new)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    words = [str(tmp_path / "old.json"), str(tmp_path / "new.json")]
    assert main(["identities", str(trained), str(tmp_path / "x"), "--names", *words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_names_go_through_folders_packs_and_conversion(photos, tmp_path):
    assert names_of(open_dataset([photos / "more"])) == MORE
    both = [photos / "first.rec", photos / "more"]
    assert names_of(open_dataset(both)) == FIRST + MORE
    out = tmp_path / "both.rec"
    assert (
        main(["convert", "pack", *map(str, [photos / "first.rec", photos / "more.rec", out])]) == 0
    )
    assert names_of(open_dataset([out])) == FIRST + MORE
    names_path(out).write_text('["a"]')
    with pytest.raises(ValueError, match="1 names, and the pack 12 identities"):
        names_of(open_dataset([out]))
    names_path(out).unlink()
    assert names_of(open_dataset([out])) is None


def test_the_trained_centers_are_those_of_their_people(photos, trained):
    """The fixture trains at all: its centers differ from one another."""
    rows = F.normalize(centers_of(trained).float())
    assert np.abs((rows @ rows.T - torch.eye(len(rows))).numpy()).max() < 0.9
