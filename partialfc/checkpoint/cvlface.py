"""Backbones of CVLface (https://github.com/mk-minchul/CVLface), in their folders, as ours.

    model.safetensors               "model.net." before every name
    pretrained_model/model.pt       "net." before every name; model.yaml beside it
    config.json                     the settings of model.yaml under "conf"
    wrapper.py, models/             programs, which are never run

Their iresnet_insightface is our iresnet. Their iresnet names its layers otherwise, and has no
convolution where its first block leaves the block's input at every second pixel: here it is one
that does nothing, whose BatchNorm gives back the mean and variance that it takes away.
"""

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from partialfc.writing import read_text

_STEM = {"input_layer.0.": "conv1.", "input_layer.1.": "bn1.", "input_layer.2.": "prelu."}
_END = {"output_layer.0.": "bn2.", "output_layer.3.": "fc.", "output_layer.4.": "features."}
_BLOCK = {
    "res_layer.0.": "bn1.",
    "res_layer.1.": "conv1.",
    "res_layer.2.": "bn2.",
    "res_layer.3.": "prelu.",
    "res_layer.4.": "conv2.",
    "res_layer.5.": "bn3.",
    "shortcut_layer.": "downsample.",
}
_FIRST, _CHANNELS = "layer1.0.", 64
_EPS = 1e-5
"""Of every BatchNorm, theirs and ours."""

_COLOURS = re.compile(r"^color_space:\s*['\"]?(RGB|BGR)['\"]?\s*$", re.MULTILINE)
_MOST_BYTES = 1 << 20


def as_ours(state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Return a state_dict with our names, for RGB; itself if it is of neither kind.

    Args:
        state: In fp32, without prefixes.
        path: The file that it comes from; files beside it say in which order its colours are.
    """
    if "input_layer.0.weight" in state and "body.0.res_layer.1.weight" in state:
        state = _with_shortcut(dict(_renamed(state)))
    if _colours(path) == "BGR":
        return {name: _turned(tensor) for name, tensor in state.items()}
    return state


def _renamed(state: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Names of ours; what has none keeps its own, and nobody knows it then."""
    places: dict[str, str] = {}
    layer = within = channels = 0
    for number in range(len(state)):
        weight = state.get(f"body.{number}.res_layer.1.weight")
        if weight is None:
            break
        if len(weight) != channels:
            layer, within, channels = layer + 1, 0, len(weight)
        places[f"body.{number}."] = f"layer{layer}.{within}."
        within += 1
    for name, tensor in state.items():
        block = re.match(r"body\.\d+\.", name)
        if block and block[0] in places:
            yield places[block[0]] + _replaced(name[block.end() :], _BLOCK), tensor
        else:
            yield _replaced(name, _STEM | _END), tensor


def _replaced(name: str, starts: dict[str, str]) -> str:
    start = next((start for start in starts if name.startswith(start)), "")
    return starts.get(start, "") + name.removeprefix(start)


def _with_shortcut(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add what they do without: the first block's convolution, and the weight and bias at the end.

    The block's own first BatchNorm knows mean and variance of its input. A BatchNorm that has both
    as bias and squared weight changes nothing, in training neither.
    """
    mean, variance = state.get(f"{_FIRST}bn1.running_mean"), state.get(f"{_FIRST}bn1.running_var")
    last = state.get("features.running_mean")
    more: dict[str, Tensor] = {}
    if mean is not None and variance is not None and mean.shape == variance.shape == (_CHANNELS,):
        shortcut = f"{_FIRST}downsample."
        more |= {
            f"{shortcut}0.weight": torch.eye(len(mean))[:, :, None, None],
            f"{shortcut}1.weight": (variance + _EPS).sqrt(),
            f"{shortcut}1.bias": mean.clone(),
            f"{shortcut}1.running_mean": mean.clone(),
            f"{shortcut}1.running_var": variance.clone(),
        }
        if (counter := state.get(f"{_FIRST}bn1.num_batches_tracked")) is not None:
            more[f"{shortcut}1.num_batches_tracked"] = counter.clone()
    if last is not None:
        more |= {
            "features.weight": torch.ones_like(last),
            "features.bias": torch.zeros_like(last),
        }
    return more | state


def _colours(path: Path) -> str:
    """The order of colours that a network was trained on, by the settings beside its file.

    Their own program goes by model.yaml where there is one, whatever config.json says.
    """
    folder = path.parent
    for settings in (folder / "model.yaml", folder / "pretrained_model" / "model.yaml"):
        with suppress(OSError, UnicodeDecodeError):
            found = _COLOURS.search(read_text(settings, most=_MOST_BYTES))
            if found:
                return found[1]
    with suppress(OSError, ValueError, RecursionError, TypeError, KeyError):
        conf = json.loads(read_text(folder / "config.json", most=_MOST_BYTES))["conf"]
        return str(conf["color_space"])
    return "RGB"


def _turned(tensor: Tensor) -> Tensor:
    """The weight of the one convolution that sees colours, for the other order of them."""
    return tensor.flip(1) if tensor.ndim == 4 and tensor.shape[1] == 3 else tensor
