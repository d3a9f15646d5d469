"""Networks of timm: ten families by the contract of the backbones, and weights that were trained.

The members are small; those whose names begin with ``test_`` timm has for this purpose.
"""

import copy
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from partialfc.backbones import build_backbone, timm_import
from partialfc.backbones.timm_import import timm
from partialfc.backbones.timm_network import TimmNetwork, normalisation, with_sync_batch_norm
from partialfc.definitions.backbones import TIMM
from partialfc.model.groups import matrices_of
from tests.backbones.test_backbones import (
    assert_autocast_keeps_fp32_embeddings,
    assert_same_training,
    train_once,
)
from tests.support.processes import python

FAMILIES = {
    "test_resnet": 64,
    "test_convnext": 64,
    "test_efficientnet": 64,
    "test_nfnet": 64,
    "test_byobnet": 64,
    "test_vit": 64,
    "mobilenetv3_small_050": 64,
    "regnetx_002": 64,
    "eva02_tiny_patch14_224": 56,
    "swin_tiny_patch4_window7_224": 56,
}
"""A small member of each family, and a size of images that it takes."""


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def made(name: str, size: int | None = None, **settings: Any) -> TimmNetwork:
    image_size = size or FAMILIES[name]
    model = build_backbone(TIMM + name, embedding_dim=16, image_size=image_size, **settings)
    assert isinstance(model, TimmNetwork)
    return model


QUICK = ("test_resnet", "test_efficientnet", "test_vit")


@pytest.fixture(
    scope="module",
    params=[
        name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES
    ],
)
def network(request: pytest.FixtureRequest) -> TimmNetwork:
    """Built once for all tests of its family, which take copies."""
    torch.manual_seed(0)
    return made(request.param)


def images(model: TimmNetwork, batch: int = 4) -> Tensor:
    size = FAMILIES[model.name.removeprefix(TIMM)]
    return torch.rand(batch, 3, size, size) * 2 - 1


# The contract


def test_every_position_makes_the_embedding_and_every_trainable_weight_gets_a_gradient(
    network: TimmNetwork,
) -> None:
    """DDP waits in vain for a gradient that never comes; channels were taken for positions."""
    model: Any = copy.deepcopy(network)
    embeddings = train_once(model, images(model))
    assert embeddings.shape == (4, 16)
    assert model.norm.num_features == model.network.num_features
    missing = [
        name
        for name, weight in model.named_parameters()
        if weight.requires_grad and weight.grad is None
    ]
    assert missing == []
    assert model.features.weight.requires_grad is False


def test_autocast_gives_fp32_embeddings_closer_than_bf16_weights(network: TimmNetwork) -> None:
    assert_autocast_keeps_fp32_embeddings(copy.deepcopy(network).eval(), images(network))


def test_channels_last_rounds_no_worse_than_contiguous(network: TimmNetwork) -> None:
    model, x = copy.deepcopy(network).eval(), images(network)
    truth = copy.deepcopy(model).double()(x.double())
    contiguous = model(x)
    model.to(memory_format=torch.channels_last)
    channels_last = model(x.contiguous(memory_format=torch.channels_last))
    allowance = 8 * (contiguous - truth).abs().max() + 1e-7
    assert (channels_last - truth).abs().max() <= allowance


def test_recomputed_activations_train_the_same(network: TimmNetwork) -> None:
    """Also BatchNorm's statistics, which timm's own switch moves twice."""
    plain = copy.deepcopy(network)
    recomputing = made(network.name.removeprefix(TIMM), checkpoint_activations=True)
    recomputing.load_state_dict(plain.state_dict())
    x = images(network)
    kept, kept_recomputing = SavedBytes(), SavedBytes()
    with kept:
        expected = train_once(plain, x)
    with kept_recomputing:
        found = train_once(recomputing, x)
    assert torch.equal(found, expected)
    assert_same_training(recomputing, plain)
    assert kept_recomputing.bytes < kept.bytes


class SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """Counts what autograd keeps for backward."""

    def __init__(self) -> None:
        self.bytes = 0
        super().__init__(self._count, lambda tensor: tensor)

    def _count(self, tensor: Tensor) -> Tensor:
        self.bytes += tensor.numel() * tensor.element_size()
        return tensor


def test_a_state_dict_is_all_that_a_network_needs_to_go_on(network: TimmNetwork) -> None:
    torch.manual_seed(5)
    other = made(network.name.removeprefix(TIMM))
    other.load_state_dict(network.state_dict())
    one, x = copy.deepcopy(network), images(network)
    assert torch.equal(train_once(other, x), train_once(one, x))
    assert_same_training(other, one)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["test_vit", "test_efficientnet"])
def test_compiles_as_one_graph_to_the_same_training(name: str) -> None:
    plain = made(name, checkpoint_activations=True)
    compiled, x = copy.deepcopy(plain), images(plain)
    run = torch.compile(compiled, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(train_once(compiled, x, run), train_once(plain, x), rtol=0, atol=0)
    assert_same_training(compiled, plain)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_onnx_of_any_batch_is_the_original(name: str, tmp_path: Path) -> None:
    from partialfc.commands._export import onnx_file

    model = made(name).eval().requires_grad_(False)
    path, x = tmp_path / "a.onnx", images(model, 3)
    onnx_file.write_onnx(model, path, image_size=x.shape[-1], inside=False, metadata={})
    found = torch.from_numpy(np.asarray(onnx_file.runner(path)(x.numpy())))
    assert F.cosine_similarity(found, model(x)).min() >= 0.9999


def test_synchronised_norms_keep_the_activations_that_timm_puts_into_them() -> None:
    """torch's own conversion makes plain norms of them, and the network linear."""
    model = made("test_efficientnet").eval()
    x = images(model)
    before, names = model(x), [*model.state_dict()]
    converted = with_sync_batch_norm(model)
    assert any(isinstance(one, nn.SyncBatchNorm) for one in converted.modules())
    assert [*converted.state_dict()] == names
    assert torch.equal(converted(x), before)


# What it is made of


def test_pooled_features_of_normalised_pixels_are_timms_own() -> None:
    """A network that is given other pixels than its weights were trained on learns from scratch."""
    model: Any = made("mobilenetv3_small_050", pooled=True).eval()
    seen: list[Tensor] = []
    model.norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    x = images(model)
    model(x)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in normalisation(model.name))
    assert mean.tolist() != [[[0.5]]] * 3
    torch.testing.assert_close(seen[0], model.network((x * 0.5 + 0.5 - mean) / std))


def test_dropout_and_drop_path_are_where_they_are_asked_for() -> None:
    model: Any = made("test_vit", dropout=0.4, drop_path=0.2)
    assert model.dropout.p == 0.4
    rates = {one.drop_prob for one in model.modules() if hasattr(one, "drop_prob")}
    assert max(rates) == pytest.approx(0.2)


def test_what_timm_spares_from_decay_is_spared_here() -> None:
    with torch.device("meta"):
        model = made("swin_tiny_patch4_window7_224")
    tables = [one for one, _ in model.named_parameters() if one.endswith("bias_table")]
    assert tables
    assert not {*tables} & matrices_of(model)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("vit_tiny_patch16_225", {}, r"no network 'vit_tiny_patch16_225'.*timm/vit_tiny_patch16_"),
        ("hf-hub:timm/test_vit", {}, "no network 'hf-hub:timm/test_vit'"),
        ("test_vit.best", {}, r"no weights 'best' of test_vit. Use one of timm/test_vit\.\w+"),
        ("hiera_tiny_224", {"size": 100}, "image_size = 100: timm/hiera_tiny_224 .* of 224 pixels"),
        ("test_vit", {"pool": True}, "timm/test_vit has no such option. Did you mean pooled"),
        ("vgg11", {"size": 64, "drop_path": 0.1}, "drop_path_rate"),
        (
            "pit_ti_224",
            {"size": 64, "checkpoint_activations": True},
            "timm does not say which the blocks of timm/pit_ti_224 are",
        ),
    ],
)
def test_what_timm_does_not_have_is_refused_by_name(
    name: str, options: dict[str, Any], message: str
) -> None:
    with torch.device("meta"), pytest.raises(ValueError) as error:
        made(name, **{"size": 64, **options})
    assert re.search(message, str(error.value)), error.value


# Trained weights


def trained(name: str, size: int) -> dict[str, Tensor]:
    """A state_dict as timm saves it, with a classifier, of its usual size of images."""
    torch.manual_seed(3)
    keywords = {"img_size": size} if "vit" in name else {}
    state: dict[str, Tensor] = timm().create_model(name, **keywords).state_dict()
    return state


def test_trained_weights_are_taken_over_for_another_size_of_images() -> None:
    model, state = made("test_vit"), trained("test_vit", 160)
    taken = model.converted(state)
    assert taken.keys() == {name for name in model.state_dict() if name.startswith("network.")}
    for name, tensor in taken.items():
        if name == "network.pos_embed":
            assert tensor.shape == model.state_dict()[name].shape != state["pos_embed"].shape
        else:
            assert torch.equal(tensor, state[name.removeprefix("network.")]), name


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("test_vit", lambda state: state.pop("blocks.3.mlp.fc1.weight"), "blocks.3.mlp.fc1.weight"),
        ("test_vit", lambda state: state.update(extra=torch.zeros(1)), "extra"),
        ("test_resnet", lambda state: None, "timm/test_vit"),
        ("test_vit", lambda state: [state.pop(key) for key in [*state] if "head" not in key], "no"),
    ],
)
def test_weights_of_another_network_or_not_all_are_refused(
    name: str, change: Any, message: str
) -> None:
    """timm itself would leave what is missing as it was drawn, and only log it."""
    model, state = made("test_vit"), trained(name, 160)
    change(state)
    with pytest.raises(ValueError, match=message):
        model.converted(state)


# torchvision


@pytest.mark.slow
def test_a_torchvision_of_another_build_stops_nobody(tmp_path: Path) -> None:
    """It raises RuntimeError, half imported, and stays as it is for whoever asks for it."""
    files = {
        "torchvision/__init__.py": "import torchvision.extension\nraise RuntimeError('no nms')\n",
        "torchvision/extension.py": "",
        # As timm's modules of image transforms and of data sets import it.
        "timm/__init__.py": "import torchvision.transforms.functional as F\n"
        "from torchvision.datasets import CIFAR10\n"
        "from torchvision.ops.misc import FrozenBatchNorm2d\n"
        "from torchvision.transforms.functional import InterpolationMode\n"
        "import torchvision.transforms as transforms\n"
        "names = {InterpolationMode.NEAREST: 0, InterpolationMode.BILINEAR: 1}\n"
        "class ToTensor(transforms.ToTensor): pass\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
from partialfc.backbones.timm_import import timm
assert len(timm().names) == 2
assert not hasattr(sys.modules.get("torchvision"), "ops"), "a stand-in was left behind"
for use in (lambda: __import__("torchvision"), timm().ToTensor):
    try:
        use()
    except (RuntimeError, ImportError) as error:
        print(error)
"""
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    assert "no nms" in done.stdout
    assert "torchvision does not import here" in done.stdout


def test_a_torchvision_that_imports_is_used_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    timm()
    own = ModuleType("torchvision")
    monkeypatch.setitem(sys.modules, "torchvision", own)
    assert timm_import.timm.__wrapped__() is timm()
    assert sys.modules["torchvision"] is own
