"""A folder of the Hugging Face hub: from a run into it, out of it again, and what is none."""

import json
import re
import socket
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from partialfc.backbones import build_backbone
from partialfc.checkpoint import hub_folder, recognition
from partialfc.checkpoint.recognition import Known
from partialfc.checkpoint.trained_backbone import TrainedBackbone, open_backbone
from partialfc.checkpoint.warm_start import warm_start
from partialfc.commands import export
from partialfc.commands._export.card import front_matter, write_card
from partialfc.definitions import plugins
from partialfc.errors import ForeignError
from partialfc.model.build import build
from tests.support.models import runtime, settings, write_convnet
from tests.support.places import FIXTURES

SIZE, DIM = 48, 64
KNOWN = Known("convnet_s", DIM, SIZE)
PAIRS = FIXTURES / "pairs" / "pairs_proto4.bin"


@pytest.fixture
def offline(monkeypatch):
    """Nothing is looked up: a name that is asked for, or a connection, fails the test."""

    def refuse(*words, **more):
        raise AssertionError(f"the network was used: {words}")

    for name in ("getaddrinfo", "create_connection"):
        monkeypatch.setattr(socket, name, refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_convnet(tmp_path_factory.mktemp("model") / "model.pt", size=SIZE, dim=DIM)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("hub")
    words = ["--huggingface", "--check", str(PAIRS), "--image-size", str(SIZE)]
    assert export.main([str(model), str(out), *words]) == 0
    return out


@pytest.fixture
def hub():
    return pytest.importorskip("partialfc.checkpoint.huggingface", exc_type=ImportError)


def pixels(count=5):
    return torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


def embedded(path):
    return open_backbone(path, image_size=SIZE).backbone()(pixels())


def test_the_folder_has_the_hubs_files_and_nothing_else(folder):
    names = {path.name for path in folder.iterdir()}
    assert names == {"README.md", "config.json", "model.safetensors", "preprocessor_config.json"}


def test_the_folder_makes_the_models_embeddings_and_knows_its_image_size(folder, model):
    trained = open_backbone(folder)
    assert trained.known == KNOWN, "nobody said that its images have 48 pixels"
    assert torch.equal(trained.backbone()(pixels()), embedded(model))


def test_from_pretrained_and_save_pretrained_give_it_back_bit_for_bit(
    hub, folder, model, tmp_path, offline
):
    found = hub.PretrainedBackbone.from_pretrained(folder)
    assert not found.training
    with torch.no_grad():
        assert torch.equal(found(pixels()), embedded(model))
    assert any(parameter.requires_grad for parameter in found.parameters()), "it may be trained on"
    found.save_pretrained(tmp_path / "again")
    for name in ("config.json", "preprocessor_config.json"):
        assert (tmp_path / "again" / name).read_text() == (folder / name).read_text()
    assert torch.equal(embedded(tmp_path / "again"), embedded(model))
    assert "library_name: partialfc" in (tmp_path / "again" / "README.md").read_text()


def test_from_pretrained_takes_all_tensors_or_none(hub, folder, tmp_path, offline):
    """The mixin's own way leaves what is missing as it was initialised."""
    other = build_backbone("convnet_m", embedding_dim=DIM, image_size=SIZE).state_dict()
    hub_folder.write_hub_folder(tmp_path, KNOWN, other, {})
    for read in (hub.PretrainedBackbone.from_pretrained, open_backbone):
        with pytest.raises(ForeignError, match=r"says that it is convnet_s .*Copy both files"):
            read(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ForeignError, match=r"it has no config\.json"):
        hub.PretrainedBackbone.from_pretrained(tmp_path)


def test_a_run_starts_from_the_folder(folder, model):
    config = settings(
        data={"train": "x.rec", "global_batch": 24, "image_size": SIZE},
        backbone={"name": "convnet_s", "embedding_dim": DIM},
    )
    live = build(config, runtime(), 10)
    warm_start(folder, config, live, runtime(), None)
    state = torch.load(model, weights_only=True)
    assert all(torch.equal(value, state[k]) for k, value in live.backbone.state_dict().items())


def test_the_card_is_as_the_hub_reads_it(folder):
    text = (folder / "README.md").read_text()
    found = yaml.safe_load(text.split("---\n")[1])
    assert found["library_name"] == "partialfc"
    assert {"face-recognition", "convnet_s"} <= {*found["tags"]}
    assert "ONNX" not in text.split("## Use")[0]
    assert "PretrainedBackbone.from_pretrained" in text


def test_the_runs_accuracies_are_in_the_metadata(tmp_path, monkeypatch):
    """A name of a set is a stranger's, and must not end the block."""
    name = 'a: "b"\n---\n# c'
    run = tmp_path / "run"
    run.mkdir()
    numbers = {"accuracy": 0.75, "accuracy_std": 0.1, "tar_at_far": {}}
    summary = {"steps": 7, "verification": {"sets": {name: numbers}}}
    (run / "summary.json").write_text(json.dumps(summary))
    trained = TrainedBackbone(run, KNOWN, {}, config=object(), step=7)
    front = front_matter(trained, [{"format": "onnx"}])
    found = yaml.safe_load(front.split("---\n")[1])
    (result,) = found["model-index"][0]["results"]
    assert (result["dataset"]["name"], result["metrics"][0]["value"]) == (name, 0.75)
    assert "onnx" in found["tags"]
    assert front.splitlines().count("---") == 2
    other = TrainedBackbone(run, KNOWN, {}, config=object(), step=8)
    assert "model-index" not in front_matter(other, []), "of another checkpoint"
    cards = pytest.importorskip("huggingface_hub.repocard", exc_type=ImportError)
    (read,) = cards.ModelCard(front).data.eval_results
    assert (read.dataset_name, read.metric_value) == (name, 0.75)


def test_the_cards_lines_run_the_folder(hub, folder, model, offline, monkeypatch, capsys):
    from PIL import Image

    text = (folder / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    images = np.random.default_rng(0).integers(0, 256, (2, SIZE, SIZE, 3), np.uint8)
    monkeypatch.chdir(folder)
    for image, file in zip(images, ("one.png", "other.png"), strict=True):
        Image.fromarray(image).save(file)
    capsys.readouterr()
    exec(code.replace(".jpg", ".png"), {})
    for file in ("one.png", "other.png"):
        (folder / file).unlink()
    values = torch.from_numpy((images.astype(np.float32).transpose(0, 3, 1, 2) - 127.5) / 127.5)
    backbone = open_backbone(model, image_size=SIZE).backbone()
    unit = unit_of(backbone(values) + backbone(values.flip(3)))
    said = capsys.readouterr().out.splitlines()[-1]
    assert float(said) == pytest.approx(float(unit[0] @ unit[1]), abs=1e-5)


def unit_of(rows):
    return rows / rows.norm(dim=1, keepdim=True)


def test_the_preprocessor_gives_the_pixels_that_the_network_was_trained_on(folder):
    steps = json.loads((folder / "preprocessor_config.json").read_text())
    assert steps["size"] == {"height": SIZE, "width": SIZE}
    every = np.arange(256)
    made = (every * steps["rescale_factor"] - steps["image_mean"][0]) / steps["image_std"][0]
    np.testing.assert_allclose(made, (every - 127.5) / 127.5, atol=1e-6)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("[" * 100_000, "it is no JSON that can be read"),
        ('{"model_type": "partialfc"}', "backbone = None: must be the name of a backbone"),
        ({"backbone": ["iresnet18"]}, "backbone = ['iresnet18']: must be"),
        ({"backbone": "os:system"}, "'os:system': there is no such backbone"),
        ({"options": [1]}, "options = [1]: must be options by name"),
        ({"options": {"depth": 10**9}}, "convnet_s has no such option"),
        ({"embedding_dim": 10**30}, "embedding_dim = 1" + "0" * 30 + ": must be an integer in"),
        ({"embedding_dim": True}, "embedding_dim = True: must be"),
        ({"image_size": 1 << 20}, "image_size = 1048576: must be an integer in"),
        ({"image_size": 50}, "image_size = 50: convnet_s halves"),
    ],
)
def test_a_config_that_is_not_sound_is_refused_before_anything_is_built(config, message, tmp_path):
    """A folder is a stranger's: an embedding of 10^30 numbers would be all memory and more."""
    hub_folder.write_hub_folder(tmp_path, KNOWN, {"a": torch.zeros(1)}, {})
    whole = hub_folder.config_of(KNOWN)
    text = config if isinstance(config, str) else json.dumps({**whole, **config})
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ForeignError) as error:
        open_backbone(tmp_path)
    assert message in str(error.value)
    assert str(tmp_path / "config.json") in str(error.value)


@pytest.mark.parametrize("called", ["getoutput", "made"])
def test_a_folder_calls_no_function_of_a_plugin(called, tmp_path, monkeypatch):
    """It is a stranger's: what stands in the user's module is not there for it to run."""
    (tmp_path / "faces_of_mine.py").write_text(
        "from subprocess import getoutput\n"
        "def made(embedding_dim, **more): getoutput(more['cmd'])\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(plugins, "_loaded", {})
    plugins.load(["faces_of_mine"])
    ran = tmp_path / "ran"
    config = {
        "backbone": f"faces_of_mine:{called}",
        "embedding_dim": 8,
        "image_size": 48,
        "options": {"cmd": f"touch {ran}"},
    }
    with pytest.raises(ForeignError, match=r"torch\.nn\.Module of a plug-in"):
        hub_folder.known_of(config, tmp_path / "config.json")
    with pytest.raises(ValueError, match="takes the keyword embedding_dim"):
        build_backbone("faces_of_mine:getoutput", cmd=f"touch {ran}")
    assert not ran.exists()


def test_options_are_told_and_no_path_of_the_machine():
    known = Known("vit_s", 64, 48, {"pretrained": Path("/home/me/a.pt"), "depth": 2})
    assert hub_folder.config_of(known)["options"] == {"depth": 2}
    assert "options" not in hub_folder.config_of(KNOWN)


def test_a_foreign_config_is_left_alone_and_the_weights_tell(model, tmp_path):
    state = torch.load(model, weights_only=True)
    hub_folder.write_hub_folder(tmp_path, KNOWN, state, {})
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    assert open_backbone(tmp_path, image_size=SIZE).known == KNOWN


def test_formats_that_leave_out_the_folders_own_are_refused(model, tmp_path):
    words = [str(model), str(tmp_path / "out"), "--huggingface", "--formats", "onnx"]
    with pytest.raises(ValueError, match="--huggingface safetensors must be among them"):
        export.main(words)
    assert not (tmp_path / "out").exists()


def test_weights_of_timm_alone_are_refused_with_what_is_read_instead(tmp_path):
    """Their tensors are no backbone's here; the card of an export must not send anybody to them."""
    known = Known("timm/test_vit", 8, 160)
    trained = TrainedBackbone(tmp_path / "run", known, recognition.build(known).state_dict())
    hub_folder.write_hub_folder(tmp_path / "hub", known, trained.state, {})
    assert open_backbone(tmp_path / "hub").known == known
    with pytest.raises(ForeignError, match=r"the folder of its run, or .* export --huggingface"):
        open_backbone(tmp_path / "hub" / hub_folder.WEIGHTS)

    row = {"file": "model.safetensors", "format": "safetensors", "mark": "", "fine": True}
    row |= {"bytes": 1, "change": 0.0, "width": 0.0, "threshold_at_far": {}}
    said = {}
    for name in ("timm/test_vit", "convnet_s"):
        named = replace(trained, known=replace(known, name=name))
        more = {"inside": False, "licence": "CC0", "checked_on": "pairs", "flip": False}
        write_card(tmp_path / "README.md", named, [row], **more)
        said[name] = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "`partialfc export --huggingface` writes" in said["timm/test_vit"]
    assert "takes the safetensors" not in said["timm/test_vit"]
    assert "takes the safetensors" in said["convnet_s"]
