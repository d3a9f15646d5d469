"""Plain convolutional networks for small images on a CPU: the demo, the tests, handwriting.

Four times a 3 x 3 convolution of stride 2, BatchNorm and ReLU, then a linear layer over the whole
grid and BatchNorm. Of the networks measured it learns most per CPU second: PReLU and residual
convolutions learned less in the same time, pooling instead of strides is several times slower.
``convnet_s`` is for runs of a CPU minute or two; ``convnet_m`` has twice the channels, takes two to
three times as long per image and learns more per epoch. Both are fastest in channels_last.
"""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from partialfc.backbones.parts import run_block, run_in_weight_dtype


class Layers(NamedTuple):
    """Channels of the four convolutions, and whether pooling halves the image or their stride."""

    widths: tuple[int, int, int, int]
    pooled: bool


LAYERS = {
    "convnet_s": Layers((16, 32, 64, 128), pooled=False),
    "convnet_m": Layers((32, 64, 128, 128), pooled=True),
}


class ConvNet(nn.Module):
    """Images [b, 3, S, S] in [-1, 1] to embeddings [b, D].

    Under autocast the convolutions run in its dtype, ``fc`` and ``features`` in fp32.

    Args:
        layers: One of ``LAYERS``.
        embedding_dim: D, >= 1.
        image_size: S in pixels, a multiple of 16.
        checkpoint_activations: Recompute the stages' activations in backward.
    """

    def __init__(
        self,
        layers: Layers,
        *,
        embedding_dim: int = 512,
        image_size: int = 112,
        checkpoint_activations: bool = False,
    ) -> None:
        super().__init__()
        self.checkpoint_activations = checkpoint_activations
        grid = image_size // 16
        self.stages = nn.Sequential(
            *(
                _stage(inputs, outputs, pooled=layers.pooled)
                for inputs, outputs in pairwise((3, *layers.widths))
            )
        )
        self.fc = nn.Linear(layers.widths[-1] * grid * grid, embedding_dim, bias=False)
        self.features = nn.BatchNorm1d(embedding_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return embeddings [b, D] of images [b, 3, S, S], in the dtype of the weights."""
        for stage in self.stages:
            x = run_block(stage, x, recompute=self.checkpoint_activations)
        return run_in_weight_dtype(torch.flatten(x, 1), self.fc, self.features)


def _stage(inputs: int, outputs: int, *, pooled: bool) -> nn.Sequential:
    stride = 1 if pooled else 2
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        *[nn.MaxPool2d(2)] * pooled,
        nn.ReLU(inplace=True),  # last: the same bits as before the pooling, on a quarter of them
    )
