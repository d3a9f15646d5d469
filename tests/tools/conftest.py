"""Real handwriting, small enough to train on in seconds."""

import pytest

from tests.support.places import FIXTURES
from tools import omniglot


@pytest.fixture(scope="session")
def forty_characters(tmp_path_factory):
    """Overrides of configs/omniglot.toml: forty identities, six held out, 200 pairs."""
    folder = tmp_path_factory.mktemp("packs")
    archive = FIXTURES / "omniglot" / "omniglot_background.npz"
    size = ["--characters", "16", "--held-out", "6", "--pairs", "200", "--size", "32"]
    assert omniglot.main([str(archive), str(folder), *size]) == 0
    return [
        f"data.train={folder / 'train.rec'}",
        f"verification.pairs=['{folder / 'heldout_pairs.bin'}']",
        f"verification.identification=['{folder / 'heldout.rec'}']",
        "run.epochs=",
        "run.threads=1",
        "schedule.warmup_steps=2",
        "backbone.name=convnet_s",
    ]
