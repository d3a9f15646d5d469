"""A trained backbone as the Hugging Face hub has models: one folder, and no program in it.

    config.json                which backbone
    model.safetensors          its tensors, under our names
    preprocessor_config.json   how images become its input, as transformers reads it

``partialfc export --huggingface`` writes it, with the card as README.md.
:func:`partialfc.checkpoint.trained_backbone.open_backbone` reads it, and
:class:`partialfc.checkpoint.huggingface.PretrainedBackbone` for people without a run.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor, nn

from partialfc.checkpoint import foreign, recognition
from partialfc.checkpoint.recognition import Known
from partialfc.definitions import plugins
from partialfc.errors import ForeignError
from partialfc.writing import atomic_write, read_text, write_json

CONFIG, WEIGHTS, PREPROCESSOR = "config.json", "model.safetensors", "preprocessor_config.json"
LIBRARY = "partialfc"
"""The hub's ``library_name``, and the ``model_type`` of a config.json of ours."""

TASK = "image-feature-extraction"
TAGS = ("face-recognition", "face-verification")
"""How the hub sorts a model."""

_MOST_BYTES = 1 << 20
_MOST_DIM, _MOST_PIXELS = 1 << 16, 1 << 12
_BILINEAR = 2  # of Pillow


def write_hub_folder(
    folder: Path, known: Known, state: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Write the three files, each whole or not at all.

    Args:
        folder: Made if it does not exist; other files in it stay.
        known: Which backbone.
        state: Its tensors by name.
        metadata: For the head of the weights' file.

    Raises:
        OSError: If a file cannot be written.
    """
    with atomic_write(folder / WEIGHTS) as partial:
        whole = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
        partial.write_bytes(save(whole, metadata={"format": "pt", **metadata}))
    write_json(folder / PREPROCESSOR, preprocessor(known.image_size))
    write_json(folder / CONFIG, config_of(known))


def config_of(known: Known) -> dict[str, Any]:
    """Return what config.json says of a backbone.

    An option that is a path is left out: what its file gave is in the weights.
    """
    options = {key: v for key, v in known.options.items() if not isinstance(v, Path)}
    config = {
        "model_type": LIBRARY,
        "architectures": ["PretrainedBackbone"],
        "backbone": known.name,
        "embedding_dim": known.embedding_dim,
        "image_size": known.image_size,
    }
    return config | ({"options": options} if options else {})


def preprocessor(image_size: int) -> dict[str, Any]:
    """Return the steps from an aligned face to the input: RGB, ``(pixel - 127.5) / 127.5``."""
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": image_size, "width": image_size},
        "resample": _BILINEAR,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }


def known_in(folder: Path) -> Known | None:
    """Return which backbone a folder's config.json says it is; ``None`` if it is not ours.

    Raises:
        ForeignError: If it is ours, and not sound.
    """
    path = folder / CONFIG
    try:
        config = json.loads(read_text(path, most=_MOST_BYTES))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise ForeignError(f"{path}: it is no JSON that can be read: {error}.") from None
    if not isinstance(config, dict) or config.get("model_type") != LIBRARY:
        return None
    return known_of(config, path)


def known_of(config: Mapping[str, Any], path: Path) -> Known:
    """Return which backbone a config.json of ours says it is.

    Nothing is imported for it, and of a plug-in that the user has loaded, it may name a module of
    torch or what the plug-in offers as a backbone, but no function.

    Args:
        config: What it holds.
        path: Where it is, for errors.

    Raises:
        ForeignError: If an entry is missing or outside its range, or the backbone is a plug-in's
            that nobody has loaded.
    """
    name, dim, size = (config.get(key) for key in ("backbone", "embedding_dim", "image_size"))
    options = config.get("options", {})
    if not isinstance(name, str):
        problem = f"backbone = {name!r}: must be the name of a backbone."
    elif type(dim) is not int or not 1 <= dim <= _MOST_DIM:
        problem = f"embedding_dim = {dim!r}: must be an integer in [1, {_MOST_DIM}]."
    elif type(size) is not int or not 1 <= size <= _MOST_PIXELS:
        problem = f"image_size = {size!r}: must be an integer in [1, {_MOST_PIXELS}]."
    elif not isinstance(options, dict):
        problem = f"options = {options!r}: must be options by name."
    elif plugins.place_of(name) and not _is_network(plugins.find("backbone", name) or nn.Module):
        problem = f"backbone = {name!r}: must be a torch.nn.Module of a plug-in that is loaded."
    else:
        whole = {key: tuple(v) if isinstance(v, list) else v for key, v in options.items()}
        known = Known(name, dim, size, whole)
        try:
            recognition.shapes(known)
            return known
        except (ValueError, TypeError) as error:
            problem = str(error)
    raise ForeignError(f"{path}: {problem} Export the model again.")


def _is_network(found: object) -> bool:
    return isinstance(found, type) and issubclass(found, nn.Module)


def read_weights(path: Path, known: Known) -> dict[str, Tensor]:
    """Return the tensors of a backbone in its order, all that it has and no others.

    Raises:
        ForeignError: If the file has others, or cannot be read.
    """
    state = foreign.read_backbone(path)
    wanted = recognition.shapes(known)
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if found != wanted:
        raise ForeignError(
            f"{path}: its {CONFIG} says that it is {known.name} with embeddings of "
            f"{known.embedding_dim} for images of {known.image_size} pixels, and "
            f"{recognition.difference(wanted, found)}. Copy both files from one export."
        )
    return {name: state[name] for name in wanted}
