"""R2, R4: a run that changes its number of ranks sees what one that does not sees."""

import pytest

from tests.support.ranks import run_on_ranks
from tools.bench._faults.elastic import again, joined, leg
from tools.bench._faults.model import BATCH, IMAGES, ORDER
from tools.bench._faults.runs import tensors

pytestmark = pytest.mark.distributed


def leg_on_rank(rank, world_size, folder, last):
    return leg(folder, last)


def again_on_rank(rank, world_size, folder):
    again(folder)


def test_an_epoch_on_4_then_2_then_3_ranks_is_that_of_4(tmp_path):
    """Sample ids and sampled identities as integers; each image once; losses to rounding.

    What is loaded and saved again on another number of ranks is equal byte for byte.
    """
    steps = ORDER.steps_per_epoch
    straight = joined(run_on_ranks(4, leg_on_rank, tmp_path / "straight" / "checkpoints", steps))
    folder, legs = tmp_path / "legs" / "checkpoints", []
    for ranks, last in ((4, 12), (2, 25), (3, steps)):
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
