"""Improved residual networks as arcface_torch trains them, so that its state_dicts load strictly.

A block is BatchNorm, conv, BatchNorm, PReLU, conv, BatchNorm plus the input (ArcFace, section 3.2,
https://arxiv.org/abs/1801.07698). The stem keeps the image's resolution and each of the four
layers halves it, in the second conv of its first block. With squeeze and excitation each block's
branch is scaled per channel before it is added (https://arxiv.org/abs/1709.01507, section 3).
"""

import torch
from torch import Tensor, nn

from partialfc.backbones.parts import BatchNorm2d, count_batch, run_block, run_in_weight_dtype

DEPTHS = {
    "iresnet18": (2, 2, 2, 2),
    "iresnet34": (3, 4, 6, 3),
    "iresnet50": (3, 4, 14, 3),
    "iresnet100": (3, 13, 30, 3),
    "iresnet200": (6, 26, 60, 6),
    "iresnet2060": (3, 128, 896, 3),
}
"""Blocks in each of the four layers."""

WITH_EXCITATION = ("iresnet50", "iresnet100")
"""Those that are there with squeeze and excitation too, as ``iresnet50_se``."""

REDUCTION = 16
"""Channels for each one of the squeezed, as in the paper."""


class IResNet(nn.Module):
    """Images [b, 3, S, S] in [-1, 1] to embeddings [b, D].

    Under autocast the blocks run in its dtype, ``fc`` and ``features`` in fp32. arcface_torch's
    dropout before ``fc``, 0 in its recipes, is left out; it has no entry in a state_dict.

    Args:
        depths: Blocks in each of the four layers.
        embedding_dim: D, >= 1.
        image_size: S in pixels, a multiple of 16.
        checkpoint_activations: Recompute the blocks' activations in backward.
        squeeze_excitation: Scale the channels of each block's branch by what all of the grid says.
    """

    def __init__(
        self,
        depths: tuple[int, int, int, int],
        *,
        embedding_dim: int = 512,
        image_size: int = 112,
        checkpoint_activations: bool = False,
        squeeze_excitation: bool = False,
    ) -> None:
        super().__init__()
        self.checkpoint_activations = checkpoint_activations
        grid = image_size // 16
        self.conv1 = _conv(3, 64, 3)
        self.bn1 = BatchNorm2d(64)
        self.prelu = nn.PReLU(64)
        self.layer1 = _layer(64, 64, depths[0], squeeze_excitation)
        self.layer2 = _layer(64, 128, depths[1], squeeze_excitation)
        self.layer3 = _layer(128, 256, depths[2], squeeze_excitation)
        self.layer4 = _layer(256, 512, depths[3], squeeze_excitation)
        self.bn2 = BatchNorm2d(512)
        self.fc = nn.Linear(512 * grid * grid, embedding_dim)
        self.features = nn.BatchNorm1d(embedding_dim)
        # Frozen at 1: the head's cosine sees every dimension with the same variance.
        self.features.weight.requires_grad_(False)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.1)

    def forward(self, x: Tensor) -> Tensor:
        """Return embeddings [b, D] of images [b, 3, S, S], in the dtype of the weights."""
        count_batch(self)
        x = self.prelu(self.bn1(self.conv1(x)))
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            for block in layer:
                x = run_block(block, x, recompute=self.checkpoint_activations)
        x = torch.flatten(self.bn2(x), 1)
        return run_in_weight_dtype(x, self.fc, self.features)


class _Block(nn.Module):
    def __init__(self, inputs: int, channels: int, stride: int, squeeze_excitation: bool) -> None:
        super().__init__()
        self.bn1 = BatchNorm2d(inputs)
        self.conv1 = _conv(inputs, channels, 3)
        self.bn2 = BatchNorm2d(channels)
        self.prelu = nn.PReLU(channels)
        self.conv2 = _conv(channels, channels, 3, stride)
        self.bn3 = BatchNorm2d(channels)
        self.se = _Excitation(channels) if squeeze_excitation else nn.Identity()
        self.downsample = (
            nn.Identity()
            if stride == 1
            else nn.Sequential(_conv(inputs, channels, 1, stride), BatchNorm2d(channels))
        )

    def forward(self, x: Tensor) -> Tensor:
        residual = self.prelu(self.bn2(self.conv1(self.bn1(x))))
        residual = self.se(self.bn3(self.conv2(residual)))
        y: Tensor = residual + self.downsample(x)
        return y


class _Excitation(nn.Module):
    """Each channel times a number in (0, 1), by two 1 x 1 convolutions of all channels' means."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1 = _conv(channels, channels // REDUCTION, 1)
        self.fc2 = _conv(channels // REDUCTION, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        means = x.mean((2, 3), keepdim=True)
        y: Tensor = x * self.fc2(self.fc1(means).relu()).sigmoid()
        return y


def _layer(inputs: int, channels: int, depth: int, squeeze_excitation: bool) -> nn.Sequential:
    first = _Block(inputs, channels, 2, squeeze_excitation)
    others = (_Block(channels, channels, 1, squeeze_excitation) for _ in range(depth - 1))
    return nn.Sequential(first, *others)


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
