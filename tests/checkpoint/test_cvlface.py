"""Folders as CVLface has them, against its networks written down again: the same embeddings."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from partialfc.backbones import build_backbone
from partialfc.checkpoint.foreign import read_backbone
from partialfc.checkpoint.recognition import Known, recognise
from partialfc.checkpoint.trained_backbone import open_backbone
from partialfc.commands._convert_checkpoint import layouts
from partialfc.errors import ForeignError

SIZE, DIM = 32, 24
KNOWN = Known("iresnet18", DIM, SIZE)


class TheirBlock(nn.Module):
    def __init__(self, inputs, channels, stride):
        super().__init__()
        self.stride = stride
        if inputs != channels:
            self.shortcut_layer = nn.Sequential(
                nn.Conv2d(inputs, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )
        self.res_layer = nn.Sequential(
            nn.BatchNorm2d(inputs),
            nn.Conv2d(inputs, channels, 3, 1, 1, bias=False),
            nn.BatchNorm2d(channels),
            nn.PReLU(channels),
            nn.Conv2d(channels, channels, 3, stride, 1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x):
        step = self.stride
        if hasattr(self, "shortcut_layer"):
            return self.res_layer(x) + self.shortcut_layer(x)
        return self.res_layer(x) + x[..., ::step, ::step]


class TheirNetwork(nn.Module):
    """IR-18 of models/iresnet: no convolution beside the first block, no weight at the end."""

    def __init__(self):
        super().__init__()
        self.input_layer = nn.Sequential(
            nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.PReLU(64)
        )
        channels = [64, 64, 64, 128, 128, 256, 256, 512, 512]
        self.body = nn.Sequential(
            *(TheirBlock(*channels[i : i + 2], 2 - i % 2) for i in range(len(channels) - 1))
        )
        self.output_layer = nn.Sequential(
            nn.BatchNorm2d(512),
            nn.Identity(),
            nn.Flatten(),
            nn.Linear(512 * (SIZE // 16) ** 2, DIM),
            nn.BatchNorm1d(DIM, affine=False),
        )

    def forward(self, x):
        return self.output_layer(self.body(self.input_layer(x)))


@pytest.fixture(scope="module")
def network():
    """Statistics are those of some images, as after training."""
    torch.manual_seed(0)
    network = TheirNetwork().train()
    images = torch.randn(32, 3, SIZE, SIZE)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.momentum = None  # the mean over all batches
        for _ in range(2):
            network(images)
    return network.eval()


def cvlface(folder, state, colours="RGB", config_says=None):
    """A folder with its programs, which must not be run."""
    (folder / "pretrained_model").mkdir(parents=True)
    (folder / "models").mkdir()
    for program in ("wrapper.py", "models/__init__.py"):
        (folder / program).write_text("raise SystemExit('it was run')\n")
    (folder / "pretrained_model" / "model.yaml").write_text(
        f"input_size:\n- 3\n- 112\n- 112\ncolor_space: {colours}\nname: ir18\noutput_dim: {DIM}\n"
        "yaml_path: models/iresnet/configs/v1_ir18.yaml\n"
    )
    config = {"auto_map": {"AutoModel": "wrapper.CVLFaceRecognitionModel"}}
    config["conf"] = {"color_space": config_says or colours, "name": "ir18"}
    (folder / "config.json").write_text(json.dumps(config))
    theirs = {f"model.net.{name}": value for name, value in state.items()}
    save_file(theirs, folder / "model.safetensors")
    pt = {f"net.{name}": value for name, value in state.items()}
    torch.save(pt, folder / "pretrained_model" / "model.pt")
    return folder


def closest(ours, theirs):
    return float(nn.functional.cosine_similarity(ours, theirs).min())


@pytest.mark.parametrize("colours", ["RGB", "BGR"])
def test_a_folder_makes_the_embeddings_that_cvlface_makes(network, tmp_path, colours):
    """A layer in another's place, the missing shortcut or the wrong colour would show here."""
    images = torch.randn(5, 3, SIZE, SIZE)
    with torch.no_grad():
        truth = network(images.flip(1) if colours == "BGR" else images)
    folder = cvlface(tmp_path / "theirs", network.state_dict(), colours, config_says="RGB")
    trained = open_backbone(folder, image_size=SIZE)
    assert trained.known == KNOWN
    found = trained.backbone()(images)
    torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-5)
    (folder / "model.safetensors").unlink()
    layout = layouts.find(folder)
    assert layout.source == folder / "pretrained_model" / "model.pt", "convert-checkpoint takes it"
    assert all(torch.equal(layout.backbone[name], value) for name, value in trained.state.items())


def test_fine_tuning_begins_where_their_network_is(network, tmp_path):
    """In training a BatchNorm uses the batch's statistics: a shortcut that normalises is another
    network."""
    images = torch.randn(32, 3, SIZE, SIZE)
    folder = cvlface(tmp_path / "theirs", network.state_dict())
    state = open_backbone(folder, image_size=SIZE).state
    ours = build_backbone("iresnet18", embedding_dim=DIM, image_size=SIZE)
    ours.load_state_dict(state)
    with torch.no_grad():
        found, truth = ours.train()(images), network.train()(images)
        network.eval()
        assert closest(found, truth) > 0.98
        ours.layer1[0].downsample[1].reset_parameters()
        assert closest(ours(images), truth) < 0.95, "as an ordinary shortcut would begin"


def test_the_other_kind_has_our_names_already(tmp_path):
    """iresnet_insightface, whose colours config.json alone may say."""
    torch.manual_seed(0)
    state = build_backbone("iresnet18", embedding_dim=DIM, image_size=SIZE).state_dict()
    folder = cvlface(tmp_path / "theirs", state)
    assert all(
        torch.equal(value, state[name])
        for name, value in open_backbone(folder, image_size=SIZE).state.items()
    )
    (folder / "pretrained_model" / "model.yaml").unlink()
    config = {"conf": {"color_space": "BGR"}}
    (folder / "config.json").write_text(json.dumps(config))
    turned = read_backbone(folder / "model.safetensors")
    assert torch.equal(turned["conv1.weight"], state["conv1.weight"].flip(1))
    for text in ("[" * 100_000, "[]", '{"conf": 3}', "\0"):
        (folder / "config.json").write_text(text)
        assert torch.equal(read_backbone(folder / "model.safetensors")["conv1.weight"],
                           state["conv1.weight"])  # fmt: skip


def test_networks_that_are_none_of_ours_are_refused_with_what_differs(network, tmp_path):
    state = network.state_dict()
    squeezing = {**state, "body.0.res_layer.se_block.fc1.weight": torch.zeros(4, 64, 1, 1)}
    folder = cvlface(tmp_path / "se", squeezing)
    with pytest.raises(ForeignError, match=r"is iresnet18: 1 tensor is too many \(layer1.0"):
        open_backbone(folder, image_size=SIZE)
    with torch.device("meta"):
        state = build_backbone("vit_s", embedding_dim=512).state_dict()
        state["pos_embed"] = torch.empty(1, 196, 512)  # patches of 8 pixels
    del state["mask_token"]
    with pytest.raises(ForeignError, match=r"vit_s: 1 tensor .*pos_embed is \[1, 196, 512\]"):
        recognise(state, Path("model.pt"))
