"""MobileFaceNet (Chen et al. 2018, https://arxiv.org/abs/1804.07573) at twice its width.

The widths, the depths and the names are those of arcface_torch's ``mbf``, so that its state_dicts
load strictly. Against the paper's Table 1: the stages are twice as wide, inside the bottlenecks
the widths are the paper's, and the second convolution has 64 groups of two channels. It ends in a
global depthwise convolution: per channel, a learned average over the grid.
"""

from torch import Tensor, nn

from partialfc.backbones.parts import run_block, run_in_weight_dtype


class MobileFaceNet(nn.Module):
    """Images [b, 3, S, S] in [-1, 1] to embeddings [b, D].

    Under autocast all but ``conv_sep`` and ``features``, which make the embedding, run in its
    dtype.

    Args:
        embedding_dim: D, >= 1.
        image_size: S in pixels, a multiple of 16.
        checkpoint_activations: Recompute the bottlenecks' activations in backward.
    """

    def __init__(
        self,
        *,
        embedding_dim: int = 512,
        image_size: int = 112,
        checkpoint_activations: bool = False,
    ) -> None:
        super().__init__()
        self.checkpoint_activations = checkpoint_activations
        grid = image_size // 16
        self.layers = nn.Sequential(
            _conv(3, 128, 3, stride=2),
            _conv(128, 128, 3, groups=64),
            _bottleneck(128, 128, hidden=128),
            _residuals(4, 128, hidden=128),
            _bottleneck(128, 256, hidden=256),
            _residuals(6, 256, hidden=256),
            _bottleneck(256, 256, hidden=512),
            _residuals(2, 256, hidden=256),
        )
        self.conv_sep = _conv(256, 512, 1)
        self.features = _Layers(
            _Layers(nn.Conv2d(512, 512, grid, groups=512, bias=False), nn.BatchNorm2d(512)),
            nn.Flatten(),
            nn.Linear(512, embedding_dim, bias=False),
            nn.BatchNorm1d(embedding_dim),
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Return embeddings [b, D] of images [b, 3, S, S], in the dtype of the weights."""
        for stage in self.layers:
            for block in stage.layers if isinstance(stage, _Residuals) else [stage]:
                x = run_block(block, x, recompute=self.checkpoint_activations)
        return run_in_weight_dtype(x, self.conv_sep, self.features)


class _Layers(nn.Module):
    """A sequence under the name ``layers``, as in arcface_torch's state_dicts."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return y


class _Residual(_Layers):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class _Residuals(_Layers):
    """Residual bottlenecks one after another."""


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> _Layers:
    return _Layers(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
        nn.PReLU(outputs),
    )


def _bottleneck_layers(inputs: int, outputs: int, hidden: int, stride: int) -> list[nn.Module]:
    return [
        _conv(inputs, hidden, 1),
        _conv(hidden, hidden, 3, stride, groups=hidden),
        _Layers(nn.Conv2d(hidden, outputs, 1, bias=False), nn.BatchNorm2d(outputs)),
    ]


def _bottleneck(inputs: int, outputs: int, hidden: int) -> _Layers:
    return _Layers(*_bottleneck_layers(inputs, outputs, hidden, stride=2))


def _residuals(number: int, channels: int, hidden: int) -> _Residuals:
    return _Residuals(
        *(_Residual(*_bottleneck_layers(channels, channels, hidden, 1)) for _ in range(number))
    )
