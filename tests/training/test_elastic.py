"""R2, R4: a run that changes its number of ranks sees what one that does not sees."""

import pytest
import torch

from partialfc.__main__ import main
from partialfc.checkpoint.folder import read_manifest
from partialfc.distributed.ranks import Ranks
from partialfc.model.build import _head
from partialfc.runtime.process import Runtime
from tests.support.models import settings
from tests.support.ranks import run_on_ranks
from tests.support.runs import UNVERIFIED, losses, run, words
from tools.bench._faults.elastic import again, joined, leg
from tools.bench._faults.model import BATCH, IMAGES, ORDER
from tools.bench._faults.runs import tensors

pytestmark = pytest.mark.distributed


def leg_on_rank(rank, world_size, folder, last):
    return leg(folder, last)


def again_on_rank(rank, world_size, folder):
    again(folder)


def test_an_epoch_on_4_then_2_then_5_ranks_is_that_of_4(tmp_path):
    """Sample ids and sampled identities as integers; each image once; losses to rounding.

    What is loaded and saved again on another number of ranks is equal byte for byte.
    """
    steps = ORDER.steps_per_epoch
    straight = joined(run_on_ranks(4, leg_on_rank, tmp_path / "straight" / "checkpoints", steps))
    folder, legs = tmp_path / "legs" / "checkpoints", []
    for ranks, last in ((4, 12), (2, 25), (5, steps)):  # 48 images on 5 ranks: 10, 10, 10, 9, 9
        legs += joined(run_on_ranks(ranks, leg_on_rank, folder, last))
    for name in ("ids", "sampled"):
        assert [step[name] for step in legs] == [step[name] for step in straight]
    ids = [number for step in legs for number in step["ids"]]
    assert len(ids) == len(set(ids)) == IMAGES // BATCH * BATCH
    assert [s["loss"] for s in legs] == pytest.approx([s["loss"] for s in straight], rel=1e-5)
    run_on_ranks(2, again_on_rank, folder)
    before, after = (tensors(folder.parent, step) for step in (steps, steps + 1))
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert value.tobytes() == after[name].tobytes(), name


def test_a_run_keeps_the_shards_of_its_checkpoints(packs, tmp_path, capsys):
    """The default follows the ranks of the first start: a later one must not follow its own."""
    folder = tmp_path / "run"
    done = run(packs, folder, "run.steps=3", "head.canonical_shards=5", *UNVERIFIED)
    assert done.returncode == 0, done.stderr
    done = run(packs, folder, "run.steps=4", *UNVERIFIED)
    assert done.returncode == 0, done.stderr
    assert "going on from" in done.stdout
    manifest = read_manifest(folder / "checkpoints" / "step_00000004")
    assert manifest["canonical_shards"] == 5
    job = ["slurm", *words(packs, folder)[1:], "--tasks-per-node=6", "--dry-run"]
    assert main(job) == 2
    assert (
        "5 canonical shards, for at most as many ranks, and there are 6" in capsys.readouterr().err
    )


def test_a_first_start_leaves_room_to_grow():
    """MS1MV3 had 91 shards by its identities, and 128 ranks ended when the head was built."""
    for ranks, expected in ((8, 91), (32, 128), (128, 512)):
        many = Runtime(Ranks(0, ranks), torch.device("cpu"))
        assert _head(settings(), many, 93_431, 0).sharding.canonical_shards == expected
        assert _head(settings(), many, 93_431, 91).sharding.canonical_shards == 91


@pytest.mark.slow
def test_a_run_goes_on_where_its_batch_does_not_divide(packs, tmp_path):
    """26 images in two micro-batches: 7 + 6 on two ranks, 5 + 4 + 4 on three."""
    folder = tmp_path / "run"
    batch = ("data.global_batch=26", "optimizer.accumulation=2", *UNVERIFIED)
    done = run(packs, folder, "run.steps=3", *batch, ranks=2)
    assert done.returncode == 2
    assert "Nearest: 24 or 28. Or set data.uneven = true" in done.stderr
    uneven = (*batch, "data.uneven=true", "head.states_in=host", "head.sample_rate=0.5")
    for ranks, steps in ((2, 3), (3, 5)):
        done = run(packs, folder, f"run.steps={steps}", *uneven, ranks=ranks)
        assert done.returncode == 0, done.stderr
    assert "going on from" in done.stdout
    assert [*losses(folder)] == [1, 2, 3, 4, 5]
    assert read_manifest(folder / "checkpoints" / "step_00000005")["step"] == 5
