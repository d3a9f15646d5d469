"""Training on labels that lie beside a pack: one an image, or several."""

import json

import numpy as np
import pytest

from partialfc import Several
from partialfc.commands import estimate
from partialfc.commands._estimate.head import positives_of
from partialfc.config import ConfigError
from partialfc.data.dataset import open_dataset
from partialfc.model.build import embedding_losses, margin_of
from partialfc.model.several import several_of
from tests.support.models import settings
from tests.support.runs import UNVERIFIED, killed_at, losses, run
from tools.bench._faults.runs import tensors

FEW = (*UNVERIFIED, "data.threads=1", "backbone.embedding_dim=32")


def saved(path, values):
    np.save(path, values)
    return path


def test_the_labels_of_the_pack_beside_it_train_the_same_bits(packs, tmp_path):
    """[N, 1] that name one identity each are no other run: same losses, same checkpoint."""
    label_N = open_dataset([packs / "train.rec"]).labels()
    labels = saved(tmp_path / "labels.npy", label_N[:, None])
    few = (*FEW, "run.steps=3")
    for name, more in (("plain", ()), ("beside", (f"data.labels={labels}",))):
        done = run(packs, tmp_path / name, *few, *more)
        assert done.returncode == 0, done.stderr
    before, after = (tensors(tmp_path / name, 3) for name in ("plain", "beside"))
    assert losses(tmp_path / "plain") == losses(tmp_path / "beside")
    assert before.keys() == after.keys()
    assert all(value.tobytes() == after[name].tobytes() for name, value in before.items())


def test_images_of_one_identity_are_warned_of(packs, tmp_path):
    """A flat folder, or labels of a column that is the same everywhere: the loss would be 0."""
    count = len(open_dataset([packs / "train.rec"]))
    labels = saved(tmp_path / "labels.npy", np.zeros(count, np.int64))
    done = run(packs, tmp_path / "run", *FEW, "run.steps=3", f"data.labels={labels}")
    assert done.returncode == 0, done.stderr
    assert "all images are of one identity" in done.stdout


def eight_of(packs):
    """[N, 8] of neighbouring identities: some rows have fewer, and some none."""
    label_N = open_dataset([packs / "train.rec"]).labels()
    count = int(label_N.max()) + 1
    label_NK = (label_N[:, None] + np.arange(8)) % count
    number_N = np.arange(len(label_N))
    label_NK[np.arange(8) >= (number_N % 9)[:, None]] = -1
    return label_NK.astype(np.int32)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("loss", ["mean", "soft"])
def test_several_labels_on_2_ranks_go_on_bit_for_bit_after_a_kill(packs, tmp_path, loss):
    """With micro-batches, whose sample and mean are those of the whole step."""
    label_NK = eight_of(packs)
    labels = saved(tmp_path / "labels.npy", label_NK)
    few = (*FEW, "run.steps=6", "checkpoint.every_steps=2", "optimizer.accumulation=2")
    few += (f"data.labels={labels}", f"head.several.loss={loss}", "head.several.without=leave_out")
    if loss == "soft":
        share_NK = np.random.default_rng(0).random(label_NK.shape, np.float32).round(1)
        few += (f"data.label_weights={saved(tmp_path / 'weights.npy', share_NK)}",)
    done = run(packs, tmp_path / "whole", *few, ranks=2)
    assert done.returncode == 0, done.stderr
    assert killed_at(5, packs, tmp_path / "killed", *few).returncode == -9
    done = run(packs, tmp_path / "killed", *few, ranks=2)
    assert done.returncode == 0, done.stderr
    assert "going on from" in done.stdout
    before, after = (tensors(tmp_path / name, 6) for name in ("whole", "killed"))
    assert before.keys() == after.keys()
    assert all(value.tobytes() == after[name].tobytes() for name, value in before.items())
    assert losses(tmp_path / "whole") == losses(tmp_path / "killed")

    label_NK[0, 0] = 5 - label_NK[0, 0]
    few += (f"data.labels={saved(tmp_path / 'others.npy', label_NK)}",)
    done = run(packs, tmp_path / "killed", *few, ranks=2)
    assert done.returncode == 4, "one other label is another run"
    assert "labels = " in done.stderr


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"losses": {"triplet": {"weight": 1.0}}}, r"losses\.triplet\.weight: it asks which two"),
        (
            {"losses": {"teacher": {"weight": 1.0, "from": "t.pt", "form": "margin"}}},
            r"losses\.teacher\.form: it asks which two",
        ),
        ({"losses": {"center": {"weight": 1.0}}}, r"data\.labels: .*center_weight"),
        ({"head": {"margin": {"name": "curricularface"}}}, r"data\.labels: .*CurricularFace"),
    ],
)
def test_what_cannot_take_several_identities_is_refused(sections, words):
    """With one identity an image it can, and a teacher of single images can with several."""
    config = settings(**sections)
    with pytest.raises(ConfigError, match=words):
        several_of(config, 3, margin_of(config), embedding_losses(config))
    assert several_of(config, None, margin_of(config), embedding_losses(config)) is None
    config = settings(losses={"teacher": {"weight": 1.0, "from": "t.pt", "form": "relational"}})
    found = several_of(config, 3, margin_of(config), embedding_losses(config))
    assert found == Several(most=3, loss="mean", without="push")


def test_an_estimate_knows_how_many_identities_an_image_has(packs, tmp_path, capsys):
    """More of the largest canonical shard is sampled, and more travels."""
    labels, found = saved(tmp_path / "labels.npy", eight_of(packs)), []
    for more in ((), (f"data.labels={labels}",)):
        out = tmp_path / "estimate.json"
        where = ("--gpu", "h200", "--gpus-per-node", "2", "--json", out)
        overrides = (f"data.train={packs / 'train.rec'}", *more)
        estimate.main([*map(str, ("configs/omniglot.toml", *overrides, *where))])
        found.append(json.loads(out.read_text()))
    one, eight = found
    assert (one["positives"], eight["positives"]) == (1, 8)
    assert eight["bytes"] > one["bytes"]
    gathers = [
        next(part["seconds"] for part in record["seconds"] if part["name"] == "head: all-gather")
        for record in found
    ]
    assert gathers[1] > gathers[0]
    capsys.readouterr()
    with pytest.raises(ConfigError, match=r"gone\.npy.*the estimate needs them"):
        positives_of(settings(data={"train": "a.rec", "labels": str(tmp_path / "gone.npy")}), "")


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"data": {"label_weights": "w.npy"}}, "label_weights = .*: it is of labels"),
        ({"data": {"identities": 5}}, "identities = 5: it is of labels"),
        (
            {"head": {"several": {"loss": "any"}}},
            r'head\.several\.loss = "any": it is for images of',
        ),
        (
            {"data": {"labels": "a.npy", "label_weights": "w.npy"}},
            r'head\.several\.loss = "mean" with label_weights',
        ),
        (
            {
                "data": {
                    "train": (),
                    "sets": {"a": {"train": "a.rec", "share": 1.0, "identities": 5}},
                }
            },
            r"identities = 5: it is of labels",
        ),
        (
            {"data": {"labels": "a.npy"}, "head": {"several": {"loss": "soft"}}},
            r'head\.several\.loss = "soft" without data\.label_weights',
        ),
    ],
)
def test_settings_of_labels_without_labels_are_refused(sections, words):
    data = {"train": "unused.rec", "global_batch": 24} | sections.pop("data", {})
    with pytest.raises(ValueError, match=words):
        settings(data=data, **sections)
