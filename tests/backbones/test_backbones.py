"""Backbones: numbers by an independent fp64 computation, and the ways to run them."""

import copy
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from partialfc.backbones import BACKBONES, build_backbone, convnet, parts
from partialfc.backbones.iresnet import IResNet
from partialfc.backbones.mobilefacenet import SHAPES, MobileFaceNet, MobileShape
from partialfc.backbones.vit import VisionTransformer, ViTShape, _Block
from tests.support.backbone_truth import TRUTH

SMALL_VIT = ViTShape(width=64, depth=2)
LARGE = MobileShape(width=64, depths=(2, 1, 2, 1))
STRIDED = convnet.Layers((4, 8, 16, 32), pooled=False)
SMALL: dict[str, Callable[..., nn.Module]] = {
    "iresnet": lambda **settings: IResNet((1, 2, 1, 1), **settings),
    "iresnet_se": lambda **s: IResNet((1, 2, 1, 1), squeeze_excitation=True, **s),
    "mobilefacenet": lambda **settings: MobileFaceNet(SHAPES["mobilefacenet"], **settings),
    "mobilefacenet_large": lambda **settings: MobileFaceNet(LARGE, **settings),
    "vit": lambda **settings: VisionTransformer(SMALL_VIT, masked=0.1, drop_path=0.3, **settings),
    "convnet": lambda **settings: convnet.ConvNet(STRIDED, **settings),
    "pooled": lambda **settings: convnet.ConvNet(STRIDED._replace(pooled=True), **settings),
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def small(family: str, **settings: Any) -> nn.Module:
    """A small network of a family, with weights and statistics that hide no term."""
    model = SMALL[family](embedding_dim=16, image_size=32, **settings)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.LayerNorm | nn.PReLU):
            for parameter in module.parameters():
                nn.init.uniform_(parameter, 0.2, 1.0)
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model


def images(batch: int = 6) -> Tensor:
    return torch.rand(batch, 3, 32, 32) * 2 - 1


def train_once(
    model: nn.Module, x: Tensor, run: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """One forward and backward with the same random draws and loss each time; the embeddings."""
    torch.manual_seed(1)
    embeddings = (model if run is None else run)(x)
    (embeddings * torch.linspace(-1, 1, embeddings.numel()).view_as(embeddings)).sum().backward()
    return embeddings.detach()


def assert_same_training(model: nn.Module, other: nn.Module) -> None:
    for (name, ours), (_, theirs) in zip(
        model.named_parameters(), other.named_parameters(), strict=True
    ):
        assert (ours.grad is None) == (theirs.grad is None), name
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=0, msg=name)
    for (name, ours), (_, theirs) in zip(model.named_buffers(), other.named_buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, msg=name)


# The registry


def test_unknown_name_lists_the_valid_ones_and_the_nearest() -> None:
    with pytest.raises(ValueError, match="Did you mean 'iresnet50'") as error:
        build_backbone("resnet50")
    assert all(name in str(error.value) for name in BACKBONES)


def test_embedding_dim_must_be_positive() -> None:
    with pytest.raises(ValueError, match="embedding_dim = 0: must be an integer >= 1"):
        build_backbone("convnet_s", embedding_dim=0)


@pytest.mark.parametrize("name", [name for name in BACKBONES if not name.startswith("vit")])
def test_image_size_off_the_stride_is_refused_with_the_sizes_that_work(name: str) -> None:
    with (
        torch.device("meta"),
        pytest.raises(ValueError, match=r"image_size = 100.*multiple of 16. Use 96 or 112"),
    ):
        build_backbone(name, image_size=100)


def test_image_size_below_the_smallest_is_refused_with_one_that_works() -> None:
    with pytest.raises(ValueError, match=r"image_size = 8.*Use 16 or 32"):
        build_backbone("convnet_s", image_size=8)
    with pytest.raises(ValueError, match=r"image_size = 23.*at least 24"):
        build_backbone("vit_t", image_size=23)


@pytest.mark.parametrize("name", ["iresnet18", "mobilefacenet", "vit_t", "convnet_s"])
def test_every_architecture_maps_every_size_to_embeddings(name: str) -> None:
    odd_sizes = [33, 47, 100] if name.startswith("vit") else []
    with torch.device("meta"):
        for image_size in (32, 48, 112, 224, *odd_sizes):
            model = build_backbone(name, embedding_dim=128, image_size=image_size).eval()
            assert model(torch.empty(2, 3, image_size, image_size)).shape == (2, 128)


# What trains


def test_only_the_scale_of_the_features_and_an_unused_mask_token_are_frozen() -> None:
    """DDP waits in vain for the gradient of a trainable parameter that nothing uses."""
    frozen = {}
    with torch.device("meta"):
        for name in ("iresnet18", "mobilefacenet", "vit_t", "vit_b", "convnet_s"):
            parameters = build_backbone(name).named_parameters()
            frozen[name] = [key for key, value in parameters if not value.requires_grad]
    assert frozen == {
        "iresnet18": ["features.weight"],
        "mobilefacenet": [],
        "vit_t": ["mask_token"],
        "vit_b": [],
        "convnet_s": [],
    }


@pytest.mark.parametrize("family", SMALL)
def test_backward_reaches_every_trainable_parameter(family: str) -> None:
    model = small(family)
    train_once(model, images())
    missing = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and parameter.grad is None
    ]
    assert missing == []


def test_sync_batch_norm_keeps_the_names() -> None:
    for name in ("iresnet18", "mobilefacenet", "vit_t", "convnet_s"):
        with torch.device("meta"):
            model = build_backbone(name)
        names = list(model.state_dict())
        assert list(nn.SyncBatchNorm.convert_sync_batchnorm(model).state_dict()) == names


def test_initial_weights_of_an_iresnet() -> None:
    """Convolutions N(0, 0.1), norms at identity: what arcface_torch's learning rates assume."""
    model = IResNet((1, 1, 1, 1), image_size=32)
    weights = model.state_dict()
    for name, weight in weights.items():
        if weight.ndim == 4:
            standard_error = 0.1 / math.sqrt(weight.numel())
            assert abs(weight.mean()) < 5 * standard_error, name
            assert abs(weight.std() - 0.1) < 5 * standard_error, name
        elif re.search(r"(bn\d|features|downsample\.1)\.weight", name):
            assert (weight == 1).all(), name


# Numbers


@pytest.mark.parametrize(
    ("family", "training"),
    [
        ("iresnet", True),
        ("iresnet", False),
        ("iresnet_se", True),
        ("mobilefacenet", True),
        ("mobilefacenet", False),
        ("vit", False),  # masks and drop path have tests of their own
        ("convnet", True),
        ("convnet", False),
    ],
)
def test_embeddings_and_statistics_equal_an_independent_computation(
    family: str, training: bool
) -> None:
    model = small(family).double().train(training)
    x = images().double()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    truth = TRUTH[family](x, weights, training)
    torch.testing.assert_close(model(x), truth, rtol=1e-9, atol=1e-9)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, weights[name], rtol=1e-9, atol=1e-9, msg=name)


def test_masked_patches_become_the_mask_token_after_the_blocks() -> None:
    model = VisionTransformer(
        ViTShape(width=64, depth=0), masked=0.3, embedding_dim=16, image_size=32
    )
    seen: list[Tensor] = []
    model.feature.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    x = images()
    model.train()(x)
    model.eval()(x)
    trained, evaluated = (tokens.view(6, 256, 64) for tokens in seen)
    masked = (trained == model.mask_token).all(2)
    assert (masked.sum(1) == 256 - int(256 * 0.7)).all()
    assert torch.equal(trained[~masked], evaluated[~masked])
    assert not torch.equal(masked[0], masked[1])


def test_drop_path_keeps_the_expectation_and_acts_per_image() -> None:
    block = _Block(width=64, drop_path=0.25)
    nn.init.zeros_(block.mlp.fc2.weight)
    nn.init.zeros_(block.mlp.fc2.bias)
    x = torch.randn(2000, 3, 64)
    branch = block.eval()(x) - x
    factor = (block.train()(x) - x) / branch
    kept = factor[:, 0, 0].round() == 1
    expected = torch.where(kept, 1 / 0.75, 0.0).view(-1, 1, 1).expand_as(branch) * branch
    torch.testing.assert_close(factor * branch, expected, rtol=1e-4, atol=1e-5)
    assert abs(kept.double().mean() - 0.75) < 5 * math.sqrt(0.75 * 0.25 / 2000)


def test_drop_path_grows_linearly_from_zero() -> None:
    model = VisionTransformer(ViTShape(width=64, depth=3), drop_path=0.2, image_size=32)
    assert [block.drop_path for block in model.blocks] == pytest.approx([0, 0.1, 0.2])


# Ways to run it


@pytest.mark.parametrize(
    ("family", "layer"),
    [
        ("iresnet", "layer2.1.conv1"),
        ("mobilefacenet", "layers.3.layers.1.layers.0"),
        ("vit", "blocks.1.attn.qkv"),
        ("convnet", "stages.2.0"),
    ],
)
def test_recomputed_activations_train_the_same(family: str, layer: str) -> None:
    """Also BatchNorm's statistics: a block that runs twice must count its batch once."""
    plain = small(family)
    recomputing = SMALL[family](embedding_dim=16, image_size=32, checkpoint_activations=True)
    recomputing.load_state_dict(plain.state_dict())
    runs: list[Tensor] = []
    recomputing.get_submodule(layer).register_forward_hook(lambda *call: runs.append(call[2]))
    x = images()
    for _ in range(2):
        torch.testing.assert_close(train_once(recomputing, x), train_once(plain, x), rtol=0, atol=0)
    assert_same_training(recomputing, plain)
    assert len(runs) == 4  # forward and backward of both steps


def test_recomputed_activations_allow_a_second_backward() -> None:
    model = small("iresnet", checkpoint_activations=True)
    loss = model(images()).abs().sqrt().mean()
    before = copy.deepcopy(dict(model.named_buffers()))
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    trainable = [model.get_parameter(name) for name in names]
    first = torch.autograd.grad(loss, trainable, retain_graph=True)
    second = torch.autograd.grad(loss, trainable)
    for name, one, two in zip(names, first, second, strict=True):
        assert torch.equal(one, two), name
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name]), name


@pytest.mark.parametrize(
    ("family", "checkpoint_activations"),
    [
        pytest.param("iresnet", False, marks=pytest.mark.slow),
        pytest.param("iresnet", True, marks=pytest.mark.slow),
        ("vit", True),
        ("convnet", True),
    ],
)
def test_compiles_as_one_graph_to_the_same_training(
    family: str, checkpoint_activations: bool
) -> None:
    plain = small(family, checkpoint_activations=checkpoint_activations)
    compiled = copy.deepcopy(plain)
    run = torch.compile(compiled, backend="aot_eager", fullgraph=True)
    x = images()
    torch.testing.assert_close(train_once(compiled, x, run), train_once(plain, x), rtol=0, atol=0)
    assert_same_training(compiled, plain)


def test_batches_are_counted_in_the_graph_of_a_compiled_network() -> None:
    """The compiler refuses some of what Python may write, such as := in a comprehension."""
    norms = [parts.BatchNorm2d(3) for _ in range(3)]
    norms[1].eval()
    torch.compile(parts.count_batch, backend="eager", fullgraph=True)(nn.Sequential(*norms))
    assert [int(norm.get_buffer("num_batches_tracked")) for norm in norms] == [1, 0, 1]


@pytest.mark.parametrize("family", SMALL)
def test_channels_last_rounds_no_worse_than_contiguous(family: str) -> None:
    """Against fp64: a layout that reaches a view or a flatten wrongly gives other numbers."""
    model, x = small(family), images()
    truth = train_once(copy.deepcopy(model).double(), x.double())
    contiguous = train_once(copy.deepcopy(model), x)
    model.to(memory_format=torch.channels_last)
    channels_last = train_once(model, x.contiguous(memory_format=torch.channels_last))
    allowance = 4 * (contiguous - truth).abs().max()
    assert (channels_last - truth).abs().max() <= allowance


@pytest.mark.parametrize("family", SMALL)
def test_autocast_gives_fp32_embeddings_closer_than_bf16_weights(family: str) -> None:
    assert_autocast_keeps_fp32_embeddings(small(family).eval(), images())


def assert_autocast_keeps_fp32_embeddings(model: nn.Module, x: Tensor) -> None:
    """The layers that make the embedding are fp32; the rest is as exact as plain bf16."""
    truth = copy.deepcopy(model).double()(x.double())
    plain_bf16 = copy.deepcopy(model).bfloat16()(x.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        embeddings = model(x)
    assert embeddings.dtype == torch.float32
    assert not torch.equal(embeddings, model(x))
    # CPUs that multiply in bf16 and those that emulate it round differently, hence a tenth.
    assert (embeddings - truth).norm() <= 1.1 * (plain_bf16 - truth).norm()


@pytest.mark.parametrize(
    ("family", "layers"),
    [
        ("iresnet", ["fc", "features"]),
        ("mobilefacenet", ["conv_sep.layers.0", "features.layers.2"]),
        ("vit", ["feature.0", "feature.2"]),
        ("convnet", ["fc", "features"]),
    ],
)
def test_the_layers_that_make_the_embedding_run_in_fp32_under_autocast(
    family: str, layers: list[str]
) -> None:
    """fp16 overflows in a sum over 25,088 activations."""
    model = small(family)
    outputs: list[Tensor] = []
    for layer in layers:
        model.get_submodule(layer).register_forward_hook(lambda *call: outputs.append(call[2]))
    with torch.autocast("cpu", torch.bfloat16):
        model(images())
    assert [output.dtype for output in outputs] == [torch.float32] * len(layers)
