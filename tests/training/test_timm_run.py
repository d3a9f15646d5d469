"""A network of timm from its trained weights to ONNX, as a user takes it there."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from partialfc.__main__ import main
from partialfc.backbones.timm_import import timm
from partialfc.backbones.timm_network import normalisation
from partialfc.checkpoint.pretrained import load_pretrained, pretrained_state
from partialfc.config import ConfigError, load
from partialfc.model.build import build
from tests.support.models import runtime, settings
from tests.support.processes import python
from tests.support.runs import killed, killed_at, losses, run
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


def on_faces(settings, faces, folder):
    return [
        "launch/train.py",
        f"configs/{settings}.toml",
        f"data.train={faces / 'train.rec'}",
        f"verification.pairs=['{faces / 'verification.bin'}']",
        f"run.folder={folder}",
        "run.epochs=",
    ]


def words(faces, hub, folder, *overrides):
    return [
        *on_faces("demo", faces, folder),
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


@pytest.mark.distributed
@pytest.mark.slow
def test_handwriting_is_learnt_over_a_kill_and_on_other_ranks_to_onnx(packs, tmp_path, capsys):
    """As make omniglot trains, with another family's network that has seen nothing before."""
    folder, out = tmp_path / "run", tmp_path / "out"
    about = ["backbone.name=timm/test_resnet", "run.steps=150", "checkpoint.every_steps=50"]
    about += ["verification.every_steps=150", "head.sample_rate=0.5"]
    stopped = killed_at(110, packs, folder, *about, ranks=2)
    assert stopped.returncode == -9, stopped.stderr
    done = run(packs, folder, *about, ranks=3)
    assert done.returncode == 0, done.stderr
    assert "going on from" in done.stdout
    summary = json.loads((folder / "summary.json").read_text())
    known = summary["identification"]
    assert known["rank_1"] > 2 * known["rank_1_untrained"], "of characters that it has not seen"
    pairs = str(packs / "heldout_pairs.bin")
    assert main(["export", str(folder), str(out), "--check", pairs, "--formats", "onnx"]) == 0
    assert "model.onnx" in (out / "README.md").read_text()
    capsys.readouterr()


@pytest.mark.distributed
@pytest.mark.slow
def test_the_recipe_of_adapters_learns_over_a_kill_and_on_other_ranks(faces, tmp_path, capsys):
    """configs/lora.toml with a small ViT: what is exported is the base but for what was trained."""
    folder, out, pretrained = (tmp_path / name for name in ("run", "out", "vit.safetensors"))
    torch.manual_seed(0)
    save_file(timm().create_model("test_vit").state_dict(), pretrained)
    about = on_faces("lora", faces, folder)
    about += ["data.global_batch=48", "data.image_size=48", "precision.compute=fp32"]
    about += ["backbone.name=timm/test_vit", f"backbone.pretrained={pretrained}"]
    about += ["run.steps=200", "checkpoint.every_steps=50", "log.every_steps=10"]
    stopped = killed(110, about, ranks=2)
    assert stopped.returncode == -9, stopped.stderr
    done = python(*about)
    assert done.returncode == 0, done.stderr
    assert "going on from" in done.stdout
    noted = losses(folder)
    assert noted[200] < noted[10] / 2

    # What is measured and exported is the moving average.
    average = load_file(folder / "checkpoints" / "step_00000200" / "average.safetensors")
    places = {name.rpartition(".")[0] for name in average if name.endswith("lora_up")}
    assert len(places) == 6 * 4, "attn.qkv, attn.proj, mlp.fc1 and mlp.fc2 of each block"
    assert main(["export", str(folder), str(out), "--formats", "safetensors"]) == 0
    base = pretrained_state(pretrained, load(folder / "config.toml"))
    exported = load_file(out / "model.safetensors")
    in_full = {name.partition(".")[0] for name in exported.keys() - base.keys()}
    assert in_full == {"norm", "fc", "features"}
    for name, value in base.items():
        place, _, kind = name.rpartition(".")
        if place not in places or kind != "weight":
            assert torch.equal(exported[name], value), name
            continue
        up, down = (average[f"{place}.lora_{which}"].double() for which in ("up", "down"))
        assert (up @ down).norm() > 1e-2 * value.norm(), "it learnt something"
        assert (exported[name] - value - up @ down).norm() < 1e-6 * value.norm(), name
    capsys.readouterr()
