"""Any network of timm, with the embedding layer that arcface_torch's networks end in.

BatchNorm, dropout, a linear layer and BatchNorm stand in place of the classifier. They get every
position of the last grid, or every token, as arcface_torch's iresnets do; with ``pooled`` what
timm's own pooling leaves. Images come in [-1, 1] and are normalised as the network's weights want
it. The names of a state_dict are timm's under ``network.``.

timm is found by :mod:`partialfc.backbones.timm_import`. Nothing is ever downloaded.
"""

import difflib
import re
from collections.abc import Iterator, Mapping
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from partialfc.backbones.parts import recomputed, run_in_weight_dtype
from partialfc.backbones.timm_import import timm
from partialfc.definitions.backbones import TIMM

_NOWHERE_ELSE = {"url": None, "hf_hub_id": None, "file": None}
"""Keeps timm from looking for weights in the net."""


class TimmNetwork(nn.Module):
    """Images [b, 3, S, S] in [-1, 1] to embeddings [b, D].

    Under autocast timm's part runs in its dtype, the layers that make the embedding in fp32. A
    weight of timm's that the embedding does not depend on, such as a classifier's own norm, is
    frozen.

    Args:
        name: ``timm/`` and a network's name in timm, with or without the tag of its weights, which
            decides the normalisation, such as timm/vit_base_patch16_224.augreg_in21k.
        embedding_dim: D, >= 1.
        image_size: S in pixels; which sizes a network takes it knows itself.
        checkpoint_activations: Recompute the activations of timm's blocks in backward.
        pooled: Make the embedding from timm's pooled features, not from every position.
        dropout: Share of the features that are dropped in training, in [0, 1).
        drop_path: Probability of leaving a branch out in the last block, in [0, 1), where the
            network has such branches.

    Raises:
        ValueError: If timm has no such network, or it does not take such images or options.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        name: str,
        *,
        embedding_dim: int = 512,
        image_size: int = 112,
        checkpoint_activations: bool = False,
        pooled: bool = False,
        dropout: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.name, self.pooled = name, pooled
        self._keywords: dict[str, Any] = {"num_classes": 0}
        config = _config(name)
        if config.fixed_input_size:
            self._keywords["img_size"] = image_size
        if drop_path:
            self._keywords["drop_path_rate"] = drop_path
        with torch.device("meta"):
            trial = self._made(config, image_size)
            features, unused = self._tried(trial, config, image_size)
        self.network = self._made(config, image_size)
        for weight in unused:
            self.network.get_parameter(weight).requires_grad_(False)
        self._axis = _channel_axis(trial, features)
        channels, positions = features[self._axis], features.numel() // features[0]
        # (x / 2 + 1/2 - mean) / std is what a pixel in [0, 1] would be.
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in normalisation(name))
        self.register_buffer("scale", 0.5 / std, persistent=False)
        self.register_buffer("shift", (0.5 - mean) / std, persistent=False)
        self.norm = nn.BatchNorm1d(channels)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(positions, embedding_dim)
        self.features = nn.BatchNorm1d(embedding_dim)
        self.features.weight.requires_grad_(False)  # as arcface_torch's iresnets have it
        if checkpoint_activations:
            _recompute(self.network, name)

    def _made(self, config: Any, image_size: int) -> nn.Module:
        try:
            return _create(self.name, **self._keywords)
        except Exception as error:  # of the network's own constructor
            raise ValueError(self._refused(config, image_size, error)) from error

    def _tried(
        self, trial: nn.Module, config: Any, image_size: int
    ) -> tuple[torch.Size, list[str]]:
        """Return the shape of two images' features, and the weights that they do not depend on."""
        trial.eval()  # no draws, and BatchNorm takes any number of images
        try:
            features = _run(trial, torch.empty(2, 3, image_size, image_size), self.pooled)
            weights = {name: one for name, one in trial.named_parameters() if one.requires_grad}
            gradients = torch.autograd.grad(features.sum(), [*weights.values()], allow_unused=True)
        except Exception as error:  # an assert of the network's, or shapes that do not fit
            raise ValueError(self._refused(config, image_size, error)) from error
        unused = [name for name, one in zip(weights, gradients, strict=True) if one is None]
        return features.shape, unused

    def _refused(self, config: Any, image_size: int, error: Exception) -> str:
        return (
            f"image_size = {image_size}: {self.name} is not made for such images, or not with "
            f"these options: {_short(error)}. Use images of {config.input_size[-1]} pixels, or "
            "another network."
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return embeddings [b, D] of images [b, 3, S, S], in the dtype of the weights."""
        x = _run(self.network, x * self.scale + self.shift, self.pooled)
        x = x.movedim(self._axis, 1).flatten(2) if x.ndim > 2 else x
        return run_in_weight_dtype(x, self.norm, self.dropout, nn.Flatten(), self.fc, self.features)

    def no_weight_decay(self) -> set[str]:
        """Return the ends of the names that timm spares from decay, such as position tables."""
        told = getattr(self.network, "no_weight_decay", set)
        return set(told())

    def converted(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return weights of this network, in any layout that timm reads, under the names here.

        timm resamples position embeddings to this size of images. A classifier is left out.

        Args:
            state: fp32 tensors by name, on the CPU; not changed.

        Raises:
            ValueError: If they are another network's.
        """
        classifiers = _config(self.name).classifier or ()
        names = (classifiers,) if isinstance(classifiers, str) else classifiers
        left_out = {f"{name}.{entry}" for name in names for entry in ("weight", "bias")}
        kept = {name: tensor for name, tensor in state.items() if name not in left_out}
        if not kept:
            raise ValueError(f"there are no weights of {self.name} in it.")
        # With as many classes as this network has, none, timm lets no tensor be missing.
        overlay = {"state_dict": kept, "num_classes": 0, "custom_load": False, **_NOWHERE_ELSE}
        try:
            network = _create(
                self.name, pretrained=True, pretrained_cfg_overlay=overlay, **self._keywords
            )
        except Exception as error:  # timm's converters fail in any way at a stranger's names
            raise ValueError(f"these are not weights of {self.name}: {_short(error)}") from error
        return {f"network.{name}": tensor for name, tensor in network.state_dict().items()}


def normalisation(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of the pixels, in [0, 1], that a network's weights want.

    Raises:
        ValueError: If timm has no such network.
    """
    config = _config(name)
    return tuple(config.mean), tuple(config.std)


@cache
def _config(name: str) -> Any:
    """What timm knows of a network: its normalisation, whether its images have one size."""
    bare = name.removeprefix(TIMM)
    architecture, _, tag = bare.partition(".")
    known = timm().list_models()
    if architecture not in known:
        near = difflib.get_close_matches(architecture, known, n=3, cutoff=0)
        raise ValueError(
            f"name = {name!r}: timm {timm().__version__} has no network {architecture!r}. The "
            f"nearest are {', '.join(TIMM + one for one in near)}; timm.list_models() has all."
        )
    tags = [one.partition(".")[2] for one in timm().list_pretrained(f"{architecture}.*")]
    if tag and tag not in tags:
        raise ValueError(
            f"name = {name!r}: timm {timm().__version__} has no weights {tag!r} of {architecture}. "
            f"Use one of {', '.join(f'{TIMM}{architecture}.{one}' for one in tags) or 'none'}."
        )
    return timm().get_pretrained_cfg(bare)


def _create(name: str, **keywords: Any) -> nn.Module:
    network: nn.Module = timm().create_model(name.removeprefix(TIMM), **keywords)
    return network


def _run(network: Any, x: Tensor, pooled: bool) -> Tensor:
    features = network.forward_features(x)
    y: Tensor = network.forward_head(features, pre_logits=True) if pooled else features
    return y


def _channel_axis(network: Any, features: torch.Size) -> int:
    """Where channels stand: behind the image in NCHW, last in NHWC and in tokens."""
    if len(features) == 4 and getattr(network, "output_fmt", "NCHW") != "NHWC":
        return 1
    return len(features) - 1


def _short(error: Exception) -> str:
    words = " ".join(str(error).split()) or type(error).__name__
    return words if len(words) <= 300 else f"{words[:300]} ..."


def _recompute(network: Any, name: str) -> None:
    """Recompute each of timm's blocks in backward, as all backbones here do.

    timm's own switch would count each batch twice in BatchNorm's statistics.
    """
    blocks = [*_blocks(network)]
    if not blocks:
        raise ValueError(
            f"checkpoint_activations = true: timm does not say which the blocks of {name} are. "
            "Remove it, or use another network."
        )
    for block in blocks:
        block.forward = partial(recomputed, block.forward, block)


def with_sync_batch_norm(backbone: nn.Module) -> nn.Module:
    """Return any backbone with BatchNorms that take statistics over the images of all ranks.

    torch's own conversion would drop the activations that timm's BatchNorms include.
    """
    of_timm = any(isinstance(one, TimmNetwork) for one in backbone.modules())
    convert = (
        timm().layers.convert_sync_batchnorm if of_timm else nn.SyncBatchNorm.convert_sync_batchnorm
    )
    converted: nn.Module = convert(backbone)
    return converted


def _blocks(network: Any) -> Iterator[nn.Module]:
    """The modules that timm calls blocks, in its groups of layers."""
    try:
        groups = network.group_matcher(coarse=False)["blocks"]
    except (AttributeError, KeyError):
        return
    patterns = (
        [groups]
        if isinstance(groups, str)
        else [pattern for pattern, order in groups if order is None]
    )
    for name, module in network.named_modules():
        if any(re.fullmatch(pattern.removeprefix("^"), name) for pattern in patterns):
            yield module
