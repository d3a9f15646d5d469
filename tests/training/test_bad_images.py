"""A run on a pack with images that cannot be decoded: it goes on, says so, and stops at a share."""

import json
import shutil

import numpy as np
import pytest

from partialfc.data.loaders.stream import Replaced
from partialfc.data.packs.pack import open_pack
from partialfc.data.skip_list import BadRecord
from partialfc.distributed.ranks import Ranks
from partialfc.errors import DataError
from partialfc.training.bad_images import BadImages
from partialfc.training.run import look_before
from tests.support.models import runtime, settings
from tests.support.places import FIXTURES
from tests.support.runs import UNVERIFIED, run

GOLDEN = FIXTURES / "records" / "insightface.rec"
BAD = (3, 50, 51, 400)


@pytest.fixture
def damaged(packs, tmp_path):
    """The packs, with four images whose end is missing."""
    folder = tmp_path / "damaged"
    shutil.copytree(packs, folder)
    pack = open_pack(packs / "train.rec")
    data = bytearray((packs / "train.rec").read_bytes())
    for image in BAD:
        jpeg = pack.jpeg(image)
        at = bytes(data).index(jpeg)
        data[at + len(jpeg) - 2 : at + len(jpeg)] = b"\0\0"
    (folder / "train.rec").write_bytes(data)
    return folder


@pytest.mark.distributed
@pytest.mark.timeout(400)
def test_bad_images_are_counted_reported_listed_and_skipped(damaged, tmp_path):
    """On one rank and on two the same; the list leaves them out of the next run."""
    steps = [
        "run.steps=18",
        "data.global_batch=48",
        "data.last_batch=pad",
        "data.bad_share=0.05",
        "log.every_steps=3",
        *UNVERIFIED,
    ]
    found = {}
    for ranks in (None, 2):
        folder = tmp_path / f"run{ranks}"
        done = run(damaged, folder, *steps, ranks=ranks)
        assert done.returncode == 0, done.stderr
        lists = sorted(folder.glob("bad_images.*.jsonl"))
        lines = [json.loads(line) for path in lists for line in path.open()]
        assert {line["image"] for line in lines} == set(BAD)
        assert done.stderr.count("replaced: ") == len(lines)
        assert f"{damaged / 'train.rec'}: image 50, key 51, offset " in done.stderr
        assert "no end marker" in done.stderr
        records = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
        found[ranks] = [r["replaced_images"] for r in records if "replaced_images" in r]
        assert found[ranks][-1] >= len(BAD)
    assert found[None] == found[2]
    skip = f"data.skip={json.dumps([str(path) for path in lists])}"
    done = run(damaged, tmp_path / "skipped", "run.steps=4", "data.bad_share=0", skip, *UNVERIFIED)
    assert done.returncode == 0, done.stderr
    assert "replaced" not in done.stderr


@pytest.mark.distributed
def test_above_the_share_the_run_stops_on_every_rank_before_it_saves(damaged, tmp_path):
    words = ["run.steps=18", "data.global_batch=48", "data.bad_share=0", "log.every_steps=1000"]
    done = run(damaged, tmp_path / "run", *words, "checkpoint.every_steps=18", ranks=2)
    assert done.returncode == DataError.exit_code
    assert "had to be replaced, and data.bad_share = 0 allows 0" in done.stderr
    assert not list((tmp_path / "run" / "checkpoints").glob("step_*"))


def test_no_image_that_can_be_used_is_said_of_the_data_before_the_run_too(tmp_path):
    """Not as a stack trace of the look before it, which decodes the first batches."""
    (tmp_path / "person").mkdir()
    for number in range(8):
        (tmp_path / "person" / f"{number}.jpg").write_text("no image")
    config = settings(data={"train": str(tmp_path), "global_batch": 4}, run={"steps": 4})
    with pytest.raises(DataError, match="256 images in a row cannot be used"):
        look_before(config, runtime())


@pytest.mark.parametrize(
    ("share", "replaced", "images", "stops"),
    [
        (0.0, 0, 100, False),
        (0.0, 1, 100, True),
        (0.001, 1, 100, False),  # one always may
        (0.001, 2, 100, True),
        (0.001, 2, 2000, False),
        (0.001, 3, 2000, True),
    ],
)
def test_the_share_that_may_be_replaced(tmp_path, capsys, share, replaced, images, stops):
    pack = open_pack(GOLDEN)
    bad = BadImages(tmp_path, share, Ranks.of())
    for sample in range(replaced):
        bad.note([Replaced(sample, pack, BadRecord.of(pack, sample, "why"))])
    if stops:
        with pytest.raises(DataError, match=rf"{replaced} of {images} images .*key {replaced}"):
            bad.check(images)
    else:
        assert bad.check(images) == replaced


def test_an_image_is_listed_once_and_only_some_are_printed(tmp_path, capsys):
    """A bad image comes back in every epoch; a folder of thousands would fill the log."""
    pack = open_pack(GOLDEN)
    bad = BadImages(tmp_path / "run", 0.5, Ranks.of())
    for sample in np.tile(np.arange(40), 3).tolist():
        bad.note([Replaced(sample, pack, BadRecord.of(pack, sample, "why"))])
    assert bad.check(1000) == 120
    lines = (tmp_path / "run" / "bad_images.0.jsonl").read_text().splitlines()
    assert [json.loads(line)["image"] for line in lines] == list(range(40))
    assert capsys.readouterr().err.count("replaced: ") == 20
