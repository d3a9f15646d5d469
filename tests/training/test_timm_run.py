"""A network of timm from its trained weights to ONNX, as a user takes it there."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from partialfc.__main__ import main
from partialfc.backbones.timm_import import timm
from partialfc.backbones.timm_network import normalisation
from partialfc.checkpoint.pretrained import load_pretrained
from partialfc.config import ConfigError
from partialfc.model.build import build
from tests.support.models import runtime, settings
from tests.support.processes import python
from tests.support.runs import losses
from tools._faces.packs import write_demo_packs

NAME = "test_efficientnet"


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A folder of weights as the Hugging Face Hub has those of timm."""
    folder = tmp_path_factory.mktemp("hub")
    torch.manual_seed(0)
    save_file(timm().create_model(NAME).state_dict(), folder / "model.safetensors")
    mean, std = normalisation(f"timm/{NAME}")
    about = {"architecture": NAME, "pretrained_cfg": {"tag": "r160_in1k", "mean": mean, "std": std}}
    (folder / "config.json").write_text(json.dumps(about))
    return folder


@pytest.fixture(scope="module")
def faces(tmp_path_factory):
    """Rendered faces."""
    folder = tmp_path_factory.mktemp("faces")
    sizes = {"identities": 24, "images_per_identity": 6, "verification_identities": 8, "pairs": 40}
    write_demo_packs(folder, workers=1, seed=3, **sizes)
    return folder


def words(faces, hub, folder, *overrides):
    return [
        "launch/train.py",
        "configs/demo.toml",
        f"data.train={faces / 'train.rec'}",
        f"verification.pairs=['{faces / 'verification.bin'}']",
        f"run.folder={folder}",
        "run.epochs=",
        "run.steps=8",
        "schedule.warmup_steps=2",
        "data.global_batch=24",
        "checkpoint.every_steps=4",
        "verification.every_steps=0",
        "log.every_steps=1",
        f"backbone.name=timm/{NAME}",
        "backbone.options={dropout=0.1, drop_path=0.1}",
        f"backbone.pretrained={hub}",
        *overrides,
    ]


@pytest.mark.slow
def test_from_trained_weights_over_a_resume_on_more_ranks_to_onnx(faces, hub, tmp_path, capsys):
    """On as many ranks it goes on bit for bit, dropout and drop path included."""
    whole = tmp_path / "whole"
    done = python(*words(faces, hub, whole), ranks=2)
    assert done.returncode == 0, done.stderr
    for name, ranks in (("again", 2), ("on_3", 3)):
        folder = tmp_path / name
        shutil.copytree(whole, folder)
        shutil.rmtree(folder / "checkpoints" / "step_00000008")
        # What a run goes on from counts, not what it began with.
        done = python(*words(faces, hub, folder, "backbone.pretrained=/gone"), ranks=ranks)
        assert done.returncode == 0, done.stderr
        assert "going on from" in done.stdout
    straight, again, on_3 = (losses(tmp_path / name) for name in ("whole", "again", "on_3"))
    assert [again[step] for step in range(5, 9)] == [straight[step] for step in range(5, 9)]
    assert on_3[5] == pytest.approx(straight[5], rel=0.2)
    pairs, out = faces / "verification.bin", tmp_path / "out"
    run = [str(tmp_path / "on_3"), str(pairs)]
    assert main(["export", run[0], str(out), "--check", run[1], "--formats", "onnx,pt2"]) == 0
    assert main(["evaluate", *run, "--out", str(tmp_path / "results"), "--device", "cpu"]) == 0
    pack = str(faces / "train.rec")
    assert main(["embed", run[0], pack, "--out", str(tmp_path / "a.npy"), "--device", "cpu"]) == 0
    assert main(["report", run[0]]) == 0
    config = str(tmp_path / "on_3" / "config.toml")
    assert main(["estimate", config, "--gpu", "h100", "--gpus-per-node", "2"]) == 0
    assert f"timm/{NAME}" in (out / "README.md").read_text()
    capsys.readouterr()


def test_trained_weights_come_into_the_network_and_others_are_refused(hub, tmp_path):
    """Other pixels or another network would train, and badly, with nothing said."""
    data = {"train": "unused.rec", "global_batch": 24, "image_size": 64}
    config = settings(data=data, backbone={"name": f"timm/{NAME}", "embedding_dim": 8, "ema": 0.9})
    model = build(config, runtime(), 40)
    before = {name: value.clone() for name, value in model.backbone.state_dict().items()}
    about = json.loads((hub / "config.json").read_text())
    for change, message in (
        ({"architecture": "test_vit"}, 'says .test_vit.. Set backbone.name = "timm/test_vit"'),
        (
            {"pretrained_cfg": {"tag": "other", "mean": [0.4] * 3, "std": [0.5] * 3}},
            "wants images of mean and std .* Name the weights: .*timm/test_efficientnet.other",
        ),
    ):
        folder = tmp_path / next(iter(change))
        shutil.copytree(hub, folder)
        (folder / "config.json").write_text(json.dumps(about | change))
        with pytest.raises(ConfigError, match=message):
            load_pretrained(folder, config, model)
    with pytest.raises(ConfigError, match="it has no model"):
        load_pretrained(tmp_path, config, model)
    assert all(
        torch.equal(value, before[name]) for name, value in model.backbone.state_dict().items()
    )
    load_pretrained(hub, config, model)
    trained = load_file(hub / "model.safetensors")
    for name, value in model.backbone.state_dict().items():
        own = name.removeprefix("network.")
        assert torch.equal(value, trained[own] if own != name else before[name]), name
    for name, value in model.average.tensors.items():
        assert torch.equal(value, model.backbone.state_dict()[name]), "the average begins here"
