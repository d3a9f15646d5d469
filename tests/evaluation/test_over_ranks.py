"""Measuring a model on held-out sets: the same numbers on any number of ranks."""

import numpy as np
import pytest

from partialfc.config import ConfigError
from partialfc.data.images.jpeg import decode
from partialfc.data.packs.pack import open_pack
from partialfc.data.sets.pairs import read_pairs
from partialfc.evaluation.sets import Evaluation
from partialfc.protocols.verification import verify
from tests.support.models import flat_model, runtime, settings
from tests.support.places import FIXTURES
from tests.support.ranks import run_on_ranks

pytestmark = pytest.mark.distributed

DATA = FIXTURES
PAIRS = DATA / "pairs" / "pairs_proto4.bin"
PACK = DATA / "records" / "insightface.rec"


def measure_on_rank(rank, world_size, batch=7, flip=True):
    config = settings(
        data={"train": "unused.rec", "image_size": 112},
        verification={
            "pairs": [str(PAIRS)],
            "identification": [str(PACK)],
            "batch": batch,
            "flip": flip,
        },
    )
    model = flat_model(config, size=112)
    results = Evaluation(config, runtime()).measure(model)
    assert model.backbone.training, "evaluation leaves the backbone as it was"
    verified = results.verified[PAIRS.stem]
    return verified.numbers.accuracy, verified.cosine, results.identified[PACK.stem].rate


@pytest.mark.parametrize(("world_size", "batch"), [(1, 80), (2, 7), (3, 16), (4, 1)])
def test_ranks_and_batches_do_not_change_the_numbers(world_size, batch):
    accuracy, cosine, rate = measure_on_rank(0, 1)
    for result in run_on_ranks(world_size, measure_on_rank, batch):
        assert result[0] == accuracy
        np.testing.assert_allclose(result[1], cosine, atol=1e-5)  # sums of 37,632 in fp32
        assert result[2] == rate


@pytest.mark.parametrize("flip", [True, False])
def test_cosines_equal_an_fp64_computation(flip):
    """Right images, right order, right normalisation, and the mirror image added if asked."""
    config = settings(data={"train": "unused.rec", "image_size": 112})
    project = flat_model(config, size=112).backbone.project
    weight, bias = project.weight.detach().double().numpy(), project.bias.detach().double().numpy()
    pairs = read_pairs(PAIRS)
    embeddings = []
    for image in pairs.images:
        pixels = decode(np.frombuffer(image, np.uint8)) if isinstance(image, bytes) else image
        values = (pixels.astype(np.float64) - 127.5) / 127.5
        views = [values, values[:, ::-1]] if flip else [values]
        embeddings.append(sum(weight @ view.transpose(2, 0, 1).ravel() + bias for view in views))
    embeddings = np.stack(embeddings)
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    accuracy, cosine, _ = measure_on_rank(0, 1, flip=flip)
    np.testing.assert_allclose(cosine, (unit[0::2] * unit[1::2]).sum(1), atol=1e-5)
    assert accuracy == verify(embeddings, pairs.same).accuracy


def test_gallery_is_the_first_image_of_each_identity():
    _, _, rate = measure_on_rank(0, 1)
    pack = open_pack(PACK)
    assert set(rate) == {1, 5}
    assert 0 < rate[1] <= rate[5] <= 1
    assert len(pack) == 60


def test_a_set_that_is_missing_is_named(tmp_path):
    config = settings(verification={"pairs": [str(tmp_path / "lfw.bin")]})
    with pytest.raises(ConfigError, match=r"verification\.pairs: .*\.bin"):
        Evaluation(config, runtime())
