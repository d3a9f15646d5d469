"""MobileFaceNet (Chen et al. 2018, https://arxiv.org/abs/1804.07573) at twice and at four times its
width.

The widths, the depths and the names are those of arcface_torch's ``mbf`` and ``mbf_large``, so that
their state_dicts load strictly. Against the paper's Table 1: the stages are wider, inside the
bottlenecks the widths are the paper's, and the second convolution has 64 groups of two channels;
the large one has residual bottlenecks in its place. It ends in a global depthwise convolution: per
channel, a learned average over the grid.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from partialfc.backbones.parts import BatchNorm2d, count_batch, run_block, run_in_weight_dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class MobileShape:
    """What the two sizes differ in.

    Attributes:
        width: Channels of the first stage; those after it have twice as many.
        depths: Residual bottlenecks of each stage; a first stage of 1 is the grouped convolution.
    """

    width: int
    depths: tuple[int, int, int, int]


SHAPES = {
    "mobilefacenet": MobileShape(width=128, depths=(1, 4, 6, 2)),
    "mobilefacenet_large": MobileShape(width=256, depths=(2, 8, 12, 4)),
}


class MobileFaceNet(nn.Module):
    """Images [b, 3, S, S] in [-1, 1] to embeddings [b, D].

    Under autocast all but ``conv_sep`` and ``features``, which make the embedding, run in its
    dtype.

    Args:
        shape: Width and depths.
        embedding_dim: D, >= 1.
        image_size: S in pixels, a multiple of 16.
        checkpoint_activations: Recompute the bottlenecks' activations in backward.
    """

    def __init__(
        self,
        shape: MobileShape,
        *,
        embedding_dim: int = 512,
        image_size: int = 112,
        checkpoint_activations: bool = False,
    ) -> None:
        super().__init__()
        self.checkpoint_activations = checkpoint_activations
        grid, width, wide, depths = image_size // 16, shape.width, 2 * shape.width, shape.depths
        self.layers = nn.Sequential(
            _conv(3, width, 3, stride=2),
            _conv(width, width, 3, groups=64)
            if depths[0] == 1
            else _residuals(depths[0], width, hidden=128),
            _bottleneck(width, width, hidden=128),
            _residuals(depths[1], width, hidden=128),
            _bottleneck(width, wide, hidden=256),
            _residuals(depths[2], wide, hidden=256),
            _bottleneck(wide, wide, hidden=512),
            _residuals(depths[3], wide, hidden=256),
        )
        self.conv_sep = _conv(wide, 512, 1)
        self.features = _Layers(
            _Layers(nn.Conv2d(512, 512, grid, groups=512, bias=False), BatchNorm2d(512)),
            nn.Flatten(),
            nn.Linear(512, embedding_dim, bias=False),
            nn.BatchNorm1d(embedding_dim),
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Return embeddings [b, D] of images [b, 3, S, S], in the dtype of the weights."""
        count_batch(self)
        for stage in self.layers:
            for block in stage.layers if isinstance(stage, _Residuals) else [stage]:
                x = run_block(block, x, recompute=self.checkpoint_activations)
        return run_in_weight_dtype(x, self.conv_sep, self.features)


class _Layers(nn.Module):
    """A sequence under the name ``layers``, as in arcface_torch's state_dicts."""

    indivisible = True  # a bottleneck is one layer to a rate that falls from layer to layer

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

    indivisible = False


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> _Layers:
    return _Layers(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        BatchNorm2d(outputs),
        nn.PReLU(outputs),
    )


def _bottleneck_layers(inputs: int, outputs: int, hidden: int, stride: int) -> list[nn.Module]:
    return [
        _conv(inputs, hidden, 1),
        _conv(hidden, hidden, 3, stride, groups=hidden),
        _Layers(nn.Conv2d(hidden, outputs, 1, bias=False), BatchNorm2d(outputs)),
    ]


def _bottleneck(inputs: int, outputs: int, hidden: int) -> _Layers:
    return _Layers(*_bottleneck_layers(inputs, outputs, hidden, stride=2))


def _residuals(number: int, channels: int, hidden: int) -> _Residuals:
    return _Residuals(
        *(_Residual(*_bottleneck_layers(channels, channels, hidden, 1)) for _ in range(number))
    )
