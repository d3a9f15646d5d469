"""Weights that a timm network begins with: files as timm and others keep them on a disk.

``backbone.pretrained`` names a file, or a folder with one and timm's ``config.json``, as a
repository of the Hugging Face Hub has. They are a stranger's: :mod:`partialfc.checkpoint.foreign`
reads them.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from partialfc.backbones.timm_network import TimmNetwork, normalisation
from partialfc.checkpoint.foreign import read_backbone
from partialfc.config import Config, ConfigError
from partialfc.definitions.backbones import TIMM
from partialfc.model.adapted import base_of
from partialfc.model.build import Model, new_backbone
from partialfc.writing import read_bytes

_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_CONFIG = "config.json"
_MOST_BYTES = 1 << 20


def load_pretrained(path: Path, config: Config, model: Model) -> None:
    """Put pretrained weights into the network of a new run; its embedding layer stays as it is.

    Collective, where the backbone is divided among the ranks.

    Args:
        path: ``backbone.pretrained``.
        config: Of the run.
        model: As it was built.

    Raises:
        ConfigError, ForeignError: As :func:`pretrained_state`; and with ``backbone.lora`` if what
            is not in the file would stay as it was drawn.
    """
    state = pretrained_state(path, config)
    lora, live = config.backbone.lora, model.backbone.state_dict()
    drawn = base_of(live, lora.also_train).keys() - state.keys() if lora.rank else ()
    if drawn:
        layers = list(dict.fromkeys(name.partition(".")[0] for name in live if name in drawn))
        raise ConfigError(
            f"backbone.lora.also_train = {[*lora.also_train]}: {', '.join(layers)} of this network "
            "are not among the pretrained weights, and begin at random. Set also_train = "
            f"{[*lora.also_train, *layers]}."
        )
    model.load({**model.state(), **state})
    if model.average is not None:
        model.average.begin()


def pretrained_state(path: Path, config: Config) -> dict[str, Tensor]:
    """Return pretrained weights under the names of a run's backbone; none of its embedding layer.

    Args:
        path: A file or folder, as ``backbone.pretrained`` names one.
        config: Of the run.

    Raises:
        ConfigError: If they are another network's, or want other images than this one is given.
        ForeignError: If a file is damaged, or holds anything that is not data.
    """
    with torch.device("meta"):
        network = new_backbone(config)
    assert isinstance(network, TimmNetwork), "config.conflicts lets no other backbone through"
    state = weights_in(path, config)
    try:
        return network.converted(state)
    except ValueError as error:
        raise ConfigError(f"{_key(path)}: {error}") from error


def weights_in(path: Path, config: Config) -> dict[str, Tensor]:
    """Return pretrained weights as the file has them, in fp32, a classifier among them.

    Args:
        path: As of :func:`pretrained_state`.
        config: Of the run.

    Raises:
        ConfigError: If the folder has none, or says that they are another network's.
        ForeignError: If a file is damaged, or holds anything that is not data.
    """
    file = path
    if path.is_dir():
        found = [path / one for one in _WEIGHTS if (path / one).is_file()]
        if not found:
            raise ConfigError(
                f"{_key(path)}: it has no {' or '.join(_WEIGHTS)}. Give a file of weights, or a "
                "folder of timm's on the Hugging Face Hub as it was downloaded."
            )
        file = found[0]
        if problem := _of_another(path / _CONFIG, config.backbone.name):
            raise ConfigError(f"{_key(path)}: {problem}")
    return read_backbone(file)


def _key(path: Path) -> str:
    return f"backbone.pretrained = {str(path)!r}"


def _of_another(file: Path, name: str) -> str | None:
    """Why weights with timm's description are not for this network; ``None`` if they are."""
    try:
        about: Any = json.loads(read_bytes(file, most=_MOST_BYTES))
        weights = about.get("pretrained_cfg") or {}
        has, architecture = weights.get("tag"), about.get("architecture")
        wants = [weights.get("mean"), weights.get("std")]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        return f"{_CONFIG} cannot be read: {error}. Repair it, or give the file of weights alone."
    bare = name.removeprefix(TIMM)
    if architecture is not None and architecture != bare.partition(".")[0]:
        return f'{_CONFIG} says {architecture!r}. Set backbone.name = "{TIMM}{architecture}".'
    given = [list(values) for values in normalisation(name)]
    if None not in wants and wants != given:
        return (
            f"{_CONFIG} wants images of mean and std {wants}, and {name} is given {given}. Name "
            f'the weights: backbone.name = "{TIMM}{bare.partition(".")[0]}.{has or "TAG"}".'
        )
    return None
