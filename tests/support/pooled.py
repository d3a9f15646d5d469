"""A network that takes images of any size, as a plug-in: named "tests.support.pooled:Pooled"."""

from torch import nn


class Pooled(nn.Sequential):
    """Images of any size to embeddings: a convolution and the mean over its grid."""

    def __init__(self, *, embedding_dim: int) -> None:
        super().__init__(
            nn.Conv2d(3, 8, 5, stride=3),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Dropout(0.1),
            nn.Linear(32, embedding_dim),
        )
