"""Names and shapes of the backbones' state_dicts: arcface_torch's where it has the network."""

import math
from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch

from partialfc.backbones import build_backbone

Shapes = Iterator[tuple[str, tuple[int, ...]]]

IRESNET_DEPTHS = {
    "iresnet18": [2, 2, 2, 2],
    "iresnet34": [3, 4, 6, 3],
    "iresnet50": [3, 4, 14, 3],
    "iresnet100": [3, 13, 30, 3],
    "iresnet200": [6, 26, 60, 6],
    "iresnet50_se": [3, 4, 14, 3],
    "iresnet100_se": [3, 13, 30, 3],
    "iresnet2060": [3, 128, 896, 3],
}
VIT_SIZES = {
    "vit_t": (256, 12),
    "vit_s": (512, 12),
    "vit_b": (512, 24),
    "vit_l": (768, 24),
    "vit_h": (1024, 48),
}
MOBILE_SIZES = {"mobilefacenet": (128, [1, 4, 6, 2]), "mobilefacenet_large": (256, [2, 8, 12, 4])}
CONVNET_WIDTHS = {"convnet_s": [16, 32, 64, 128], "convnet_m": [32, 64, 128, 128]}
PARAMETERS = {  # at 512 dimensions and 112 pixels
    "iresnet18": 24_025_600,
    "iresnet34": 34_139_328,
    "iresnet50": 43_590_848,
    "iresnet100": 65_156_160,
    "iresnet200": 118_833_920,
    "iresnet50_se": 43_813_568,
    "iresnet100_se": 65_528_384,
    "iresnet2060": 1_122_301_120,
    "mobilefacenet": 2_059_520,
    "mobilefacenet_large": 6_314_880,
    "vit_t": 19_137_792,
    "vit_s": 76_023_296,
    "vit_b": 113_833_472,
    "vit_l": 255_684_352,
    "vit_h": 756_393_984,
    "convnet_s": 3_309_968,
    "convnet_m": 3_453_472,
}


def norm_shapes(name: str, channels: int) -> Shapes:
    for entry in ("weight", "bias", "running_mean", "running_var"):
        yield f"{name}.{entry}", (channels,)
    yield f"{name}.num_batches_tracked", ()


def iresnet_shapes(depths: list[int], dim: int, grid: int, se: bool) -> Shapes:
    yield "conv1.weight", (64, 3, 3, 3)
    yield from norm_shapes("bn1", 64)
    yield "prelu.weight", (64,)
    inputs = 64
    for layer, depth in enumerate(depths, 1):
        channels = 32 << layer
        for block in range(depth):
            prefix = f"layer{layer}.{block}."
            yield from norm_shapes(prefix + "bn1", inputs)
            yield prefix + "conv1.weight", (channels, inputs, 3, 3)
            yield from norm_shapes(prefix + "bn2", channels)
            yield prefix + "prelu.weight", (channels,)
            yield prefix + "conv2.weight", (channels, channels, 3, 3)
            yield from norm_shapes(prefix + "bn3", channels)
            if se:
                yield prefix + "se.fc1.weight", (channels // 16, channels, 1, 1)
                yield prefix + "se.fc2.weight", (channels, channels // 16, 1, 1)
            if block == 0:
                yield prefix + "downsample.0.weight", (channels, inputs, 1, 1)
                yield from norm_shapes(prefix + "downsample.1", channels)
            inputs = channels
    yield from norm_shapes("bn2", 512)
    yield "fc.weight", (dim, 512 * grid * grid)
    yield "fc.bias", (dim,)
    yield from norm_shapes("features", dim)


def conv_shapes(name: str, *weight: int, activation: bool = True) -> Shapes:
    yield f"{name}.layers.0.weight", weight
    yield from norm_shapes(f"{name}.layers.1", weight[0])
    if activation:
        yield f"{name}.layers.2.weight", (weight[0],)


def bottleneck_shapes(name: str, inputs: int, hidden: int, outputs: int) -> Shapes:
    yield from conv_shapes(f"{name}.layers.0", hidden, inputs, 1, 1)
    yield from conv_shapes(f"{name}.layers.1", hidden, 1, 3, 3)
    yield from conv_shapes(f"{name}.layers.2", outputs, hidden, 1, 1, activation=False)


def mobilefacenet_shapes(width: int, depths: list[int], dim: int, grid: int) -> Shapes:
    yield from conv_shapes("layers.0", width, 3, 3, 3)
    if depths[0] == 1:
        yield from conv_shapes("layers.1", width, width // 64, 3, 3)
    for block in range(depths[0] if depths[0] > 1 else 0):
        yield from bottleneck_shapes(f"layers.1.layers.{block}", width, 128, width)
    wide = 2 * width
    stages = [
        (width, 128, width, depths[1], 128),
        (width, 256, wide, depths[2], 256),
        (wide, 512, wide, depths[3], 256),
    ]
    for stage, (inputs, hidden, channels, depth, hidden_of_residual) in enumerate(stages):
        yield from bottleneck_shapes(f"layers.{2 + 2 * stage}", inputs, hidden, channels)
        for block in range(depth):
            name = f"layers.{3 + 2 * stage}.layers.{block}"
            yield from bottleneck_shapes(name, channels, hidden_of_residual, channels)
    yield from conv_shapes("conv_sep", 512, wide, 1, 1)
    yield from conv_shapes("features.layers.0", 512, 1, grid, grid, activation=False)
    yield "features.layers.2.weight", (dim, 512)
    yield from norm_shapes("features.layers.3", dim)


def vit_shapes(width: int, depth: int, dim: int, tokens: int, patch: int) -> Shapes:
    yield "pos_embed", (1, tokens, width)
    yield "mask_token", (1, 1, width)
    yield "patch_embed.proj.weight", (width, 3, patch, patch)
    yield "patch_embed.proj.bias", (width,)
    for block in range(depth):
        for name in ("norm1", "norm2"):
            yield f"blocks.{block}.{name}.weight", (width,)
            yield f"blocks.{block}.{name}.bias", (width,)
        yield f"blocks.{block}.attn.qkv.weight", (3 * width, width)
        yield f"blocks.{block}.attn.proj.weight", (width, width)
        yield f"blocks.{block}.attn.proj.bias", (width,)
        yield f"blocks.{block}.mlp.fc1.weight", (4 * width, width)
        yield f"blocks.{block}.mlp.fc1.bias", (4 * width,)
        yield f"blocks.{block}.mlp.fc2.weight", (width, 4 * width)
        yield f"blocks.{block}.mlp.fc2.bias", (width,)
    yield "norm.weight", (width,)
    yield "norm.bias", (width,)
    yield "feature.0.weight", (width, tokens * width)
    yield from norm_shapes("feature.1", width)
    yield "feature.2.weight", (dim, width)
    yield from norm_shapes("feature.3", dim)


def convnet_shapes(widths: list[int], dim: int, grid: int) -> Shapes:
    for stage, (inputs, outputs) in enumerate(pairwise([3, *widths])):
        yield f"stages.{stage}.0.weight", (outputs, inputs, 3, 3)
        yield from norm_shapes(f"stages.{stage}.1", outputs)
    yield "fc.weight", (dim, widths[-1] * grid * grid)
    yield from norm_shapes("features", dim)


def specification(name: str, dim: int, image_size: int) -> Shapes:
    if name in IRESNET_DEPTHS:
        return iresnet_shapes(IRESNET_DEPTHS[name], dim, image_size // 16, name.endswith("_se"))
    if name in MOBILE_SIZES:
        return mobilefacenet_shapes(*MOBILE_SIZES[name], dim, image_size // 16)
    if name in CONVNET_WIDTHS:
        return convnet_shapes(CONVNET_WIDTHS[name], dim, image_size // 16)
    tokens, patch = {32: (256, 2), 112: (144, 9), 224: (144, 18)}[image_size]
    return vit_shapes(*VIT_SIZES[name], dim, tokens, patch)


NAMES = [  # of iresnet2060 the modules alone take seconds
    pytest.param(name, marks=pytest.mark.slow if name == "iresnet2060" else ())
    for name in PARAMETERS
]


@pytest.mark.parametrize(("dim", "image_size"), [(512, 112), (128, 32), (256, 224)])
@pytest.mark.parametrize("name", NAMES)
def test_state_dict_has_the_specified_names_and_shapes_in_order(
    name: str, dim: int, image_size: int
) -> None:
    """Otherwise a published checkpoint does not load, or loads into the wrong layers."""
    with torch.device("meta"):
        model = build_backbone(name, embedding_dim=dim, image_size=image_size)
    entries = [(key, tuple(value.shape)) for key, value in model.state_dict().items()]
    assert entries == list(specification(name, dim, image_size))


@pytest.mark.parametrize("name", NAMES)
def test_number_of_parameters(name: str) -> None:
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    specified = sum(
        math.prod(shape)
        for key, shape in specification(name, 512, 112)
        if not key.endswith(statistics)
    )
    with torch.device("meta"):
        built = sum(parameter.numel() for parameter in build_backbone(name).parameters())
    assert built == specified == PARAMETERS[name]
