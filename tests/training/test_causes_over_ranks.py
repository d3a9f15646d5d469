"""What one rank alone knows is in the error of all: torchrun shows whichever rank left first."""

import contextlib
import re

import pytest

from partialfc.config import ConfigError
from partialfc.data.loaders.stream import Replaced
from partialfc.data.packs.pack import open_pack
from partialfc.data.packs.writer import write_insightface_pack
from partialfc.data.skip_list import BadRecord
from partialfc.errors import CrashLoopError, DataError
from partialfc.records.ledger import keeping, read_ledger
from partialfc.training.bad_images import BadImages
from partialfc.training.data import open_training_data
from partialfc.training.run import _refuse_crash_loop
from tests.support.models import runtime, settings
from tests.support.places import FIXTURES
from tests.support.ranks import run_on_ranks

pytestmark = pytest.mark.distributed

GOLDEN = FIXTURES / "records" / "insightface.rec"


def images_of_rank(rank, world_size, pairs):
    """What each of several pairs of sources comes to, one of them of each rank."""
    found = []
    for packs in pairs:
        config = settings(data={"train": str(packs[rank]), "global_batch": 4}, run={"steps": 4})
        try:
            found.append(len(open_training_data(config, runtime()).dataset))
        except ConfigError as error:
            found.append(str(error))
    return found


def test_ranks_with_other_images_or_labels_are_refused(tmp_path):
    """Each would go through its own order and give the classes its own numbers, and say nothing."""
    for host, people, labels in (("a", "01", [0, 0, 1, 1]), ("b", "02", [0, 1, 1, 1])):
        for person in people:
            (tmp_path / host / person).mkdir(parents=True)
            for number in range(3):
                (tmp_path / host / person / f"{number}.jpg").write_bytes(b"x" * (9 + number))
        write_insightface_pack(tmp_path / f"{host}.rec", [(one, b"jpeg") for one in labels], 2)
    a, b = tmp_path / "a", tmp_path / "b"
    packs = [tmp_path / "a.rec", tmp_path / "b.rec"]
    every, others = run_on_ranks(2, images_of_rank, [[a, a], [a, b], packs])
    assert others == every
    assert every[0] == 6
    for said, images in zip(every[1:], (6, 4), strict=True):
        pattern = rf"not all ranks .*: rank 0 has {images} of 2 id.*; rank 1 has {images} of 2 "
        assert re.search(pattern, said)


def bad_images_on_rank(rank, world_size, folder):
    found = BadImages(folder, 0.0, runtime().ranks)
    if rank == 1:
        pack = open_pack(GOLDEN)
        found.note([Replaced(3, pack, BadRecord.of(pack, 3, "no end marker"))])
    try:
        return found.check(100)
    except DataError as error:
        return str(error)


def test_an_image_that_one_rank_could_not_decode_is_named_by_all(tmp_path):
    said, other = run_on_ranks(2, bad_images_on_rank, tmp_path)
    assert re.search(r"1 of 100 images .*\. The last on rank 1: .* no end marker\. They", said)
    assert other == said


def crash_loop_on_rank(rank, world_size, before):
    config = settings(run={"fruitless_starts": 2})
    try:
        _refuse_crash_loop(config, runtime(), before if rank == 0 else [], "settings")
    except CrashLoopError as error:
        return str(error)
    return ""


def test_all_ranks_say_why_the_last_starts_failed(tmp_path):
    """Torchrun's summary has the message of whichever rank left first; rank 0 read the ledger."""
    for cause in ("DataError: image 3", "HangError: rank 1"):
        with (
            contextlib.suppress(RuntimeError),
            keeping(tmp_path / "ledger.jsonl", ranks=2, settings="settings"),
        ):
            raise RuntimeError(cause)
    before = read_ledger(tmp_path / "ledger.jsonl")
    said, other = run_on_ranks(2, crash_loop_on_rank, before)
    assert re.search(r"\(at step 0: .*image 3; at step 0: .*rank 1\)\. Repair", said)
    assert other == said
    assert run_on_ranks(2, crash_loop_on_rank, before[:2]) == ["", ""]
