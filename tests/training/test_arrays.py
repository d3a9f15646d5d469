"""Training on arrays of one's own: spectrograms of voices that the test makes."""

import json
import re
from contextlib import closing
from itertools import islice

import numpy as np
import pytest

from partialfc.commands.estimate import main as estimate
from partialfc.config import load
from partialfc.data.arrays import ArrayFile
from partialfc.training.data import open_batches, open_training_data
from tests.support.models import runtime
from tests.support.places import ROOT
from tests.support.processes import python
from tests.support.runs import losses
from tests.support.speech import SHAPE, voices
from tools.bench._faults.runs import tensors

PAGE = (ROOT / "partialfc" / "not_only_faces.md").read_text()
MORE = """
[precision]
compute = "fp32"
[head.margin]
name = "cosface"
scale = 16
additive = 0.1
[optimizer]
lr = 0.05
[schedule]
warmup_steps = 4
[log]
tensorboard = false
progress = false
every_steps = 1
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """60 voices to train on, in two files of two types, and 60 others."""
    folder = tmp_path_factory.mktemp("voices")
    samples, identity_N = voices(60, 12, seed=1)
    order = np.random.default_rng(0).permutation(len(samples))
    samples, identity_N = samples[order], identity_N[order]
    np.save(folder / "a.npy", samples[:400])
    np.save(folder / "b.npy", samples[400:].astype(np.float16))
    np.save(folder / "labels.npy", identity_N.astype(np.int32))
    held, held_N = voices(60, 6, seed=2)
    np.save(folder / "heldout.npy", held)
    np.save(folder / "heldout.labels.npy", held_N)
    (settings,) = re.findall(r"```toml\n(.*?)```", PAGE, re.S)
    settings = re.sub(r'"(\w+)\.npy"', rf'"{folder}/\1.npy"', settings)
    (folder / "voices.toml").write_text(settings + MORE)
    return folder / "voices.toml"


def trained(recipe, folder, *overrides, ranks=None):
    done = python("launch/train.py", recipe, f"run.folder={folder}", *overrides, ranks=ranks)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_batches_are_the_rows_of_the_order_on_any_rank(recipe):
    """In fp32, as they are stored, with their labels; a resume begins anywhere."""
    config = load(recipe)
    data = open_training_data(config, runtime())
    whole = np.concatenate(
        [np.load(path).astype(np.float32) for path in config.data.train], dtype=np.float32
    )
    labels = np.load(config.data.labels)
    with closing(open_batches(config, runtime(), data, 5)) as batches:
        for step, batch in enumerate(islice(batches, 10), 5):
            ids = data.order.sample_ids(48 * step)
            assert batch.images.numpy().tobytes() == whole[ids].tobytes()
            assert batch.identities.tolist() == labels[ids].tolist()
            assert batch.sample_ids.tolist() == ids.tolist()


@pytest.mark.slow
def test_voices_that_nobody_trained_on_are_told_apart(recipe, tmp_path):
    """The recipe of the page, against the same network before it is trained."""
    trained(recipe, tmp_path / "run", "run.plugins=[]")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    found = summary["identification"]
    assert found["rank_1"] > 0.1 + found["rank_1_untrained"], found
    out = tmp_path / "held.npy"
    done = python(
        *("-m", "partialfc", "embed", tmp_path / "run", recipe.parent / "heldout.npy"),
        *("--out", out, "--plugin", "tests.support.speech"),
    )
    assert done.returncode == 0, done.stderr
    assert np.load(out).shape == (360, 32)
    done = python(
        *("-m", "partialfc", "export", tmp_path / "run", tmp_path / "exported"),
        *("--plugin", "tests.support.speech"),
    )
    assert done.returncode == 2
    assert "its run was on arrays" in done.stderr


@pytest.mark.slow
@pytest.mark.distributed
def test_a_run_on_3_uneven_ranks_goes_on_bit_for_bit(recipe, tmp_path):
    """32 samples of a batch are 11, 11 and 10; the rate is the same however long the run is."""
    few = ("data.global_batch=32", "data.uneven=true", "verification.identification=[]")
    few += ("checkpoint.every_steps=2", "run.epochs=", "schedule.final_factor=1")
    trained(recipe, tmp_path / "whole", *few, "run.steps=8", ranks=3)
    trained(recipe, tmp_path / "halves", *few, "run.steps=6", ranks=3)
    assert "going on" in trained(recipe, tmp_path / "halves", *few, "run.steps=8", ranks=3)
    assert losses(tmp_path / "whole") == losses(tmp_path / "halves")
    first, second = (tensors(tmp_path / name, 8) for name in ("whole", "halves"))
    assert all(value.tobytes() == second[name].tobytes() for name, value in first.items())


def test_an_estimate_of_a_run_on_arrays_has_its_shape(recipe, tmp_path, capsys):
    out = tmp_path / "estimate.json"
    estimate([str(recipe), "--gpu", "h200", "--json", str(out)])
    capsys.readouterr()
    parts = json.loads(out.read_text())["memory"]["data"]
    assert parts[0]["bytes"][0] == 2 * 48 * 4 * 16 * 24


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.flip=0.5", r"data\.flip = 0\.5 with data\.kind = \"arrays\": it is for images"),
        ("data.augment.grey=0.1", r"data\.augment\.grey = 0\.1 with"),
        ("data.image_size=64", r"data\.image_size = 64 with"),
        ("data.loader=dali", r"data\.loader = \"dali\" with"),
        ("data.labels=", r"data\.labels: required with"),
        ("data.shape=", r"data\.shape: required with"),
        ("data.kind=images", r"data\.shape = \[16, 24\]: it is of arrays"),
        ("backbone.name=iresnet50", r"backbone\.name = \"iresnet50\" with .*one of your own"),
        ("head.start=pack:mean", r"head\.start = \"pack:mean\" with"),
        ("verification.flip=true", r"verification\.flip = true with .*mirrors images"),
        ("verification.pairs=['a.bin']", r"verification\.pairs = .*labels\.npy beside"),
    ],
)
def test_settings_of_images_are_refused_by_name(recipe, override, words):
    with pytest.raises(ValueError, match=words):
        load(recipe, [override])


def test_a_file_of_another_shape_or_a_number_that_is_none_is_refused(tmp_path):
    path = tmp_path / "a.npy"
    np.save(path, np.zeros((4, 3)))
    with pytest.raises(ValueError, match=r"a\.npy: holds float64 \[4, 3\], must be fp16, fp32 or"):
        ArrayFile(path, (3,))
    np.save(path, np.zeros((4, 3), np.uint8))
    with pytest.raises(ValueError, match=r"uint8 \['samples', 5\]"):
        ArrayFile(path, (5,))
    assert ArrayFile(path, (3,)).rows(np.array([2, 0])).dtype == np.float32
    samples = np.zeros((4, *SHAPE), np.float32)
    samples[2, 5, 5] = np.nan
    np.save(path, samples)
    with pytest.raises(ValueError, match=r"a\.npy: sample 2 has a number that is not finite"):
        ArrayFile(path, SHAPE).rows(np.array([0, 2]))
