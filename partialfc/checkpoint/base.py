"""The base of an adapted backbone: where it lies, and that it is the one its adapters belong to.

A checkpoint of a run with ``backbone.lora`` holds the adapters and what is trained beside them. Its
facts say which base they belong to: the place that the run began with, and the SHA-256 of the
tensors (:func:`partialfc.model.adapted.digest_of`), whichever file they are in. Of pretrained
weights these are the file's own: timm resamples them to the size of images, to other bits on
another CPU.
"""

from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor, nn

from partialfc.backbones.lora import merged_state
from partialfc.checkpoint.folder import read_manifest, step_of, steps
from partialfc.checkpoint.pretrained import weights_in
from partialfc.config import Config, ConfigError, load
from partialfc.errors import CheckpointError, ForeignError
from partialfc.model.adapted import base_of, digest_of

Read = Callable[[Path, Config], Mapping[str, Tensor]]
"""Returns the tensors of a backbone at a place, for the run with these settings."""

BASE = "base"
"""The fact of a checkpoint that says which base it has."""

_LONGEST_PLACE = 4096
_MOST_BASES = 8
_WITHIN: ContextVar[tuple[Path, ...]] = ContextVar("within", default=())
"""The checkpoints whose bases are being read: a base may be a run of adapters itself."""

_UNREADABLE = (
    ConfigError,
    CheckpointError,
    ForeignError,
    SafetensorError,
    OSError,
    ValueError,
    KeyError,
)


def fact_of(place: Path, network: nn.Module, config: Config) -> dict[str, Any]:
    """Return what a checkpoint notes of the base that a new run begins with; nothing without LoRA.

    Args:
        place: What the network was filled with: a checkpoint, a folder or a file.
        network: The backbone, filled.
        config: Of the run.
    """
    if not config.backbone.lora.rank:
        return {}
    return {BASE: {"place": str(place), "sha256": _digest(place, network.state_dict(), config)}}


def may_vanish(place: Path, config: Config) -> str:
    """Return in a sentence that the base may be deleted by the run that it is of; else ``""``.

    Args:
        place: As of :func:`fact_of`.
        config: Of the new run.
    """
    run = place.parent.parent
    if not config.backbone.lora.rank or place not in steps(run / "checkpoints"):
        return ""
    every = load(run / "config.toml", own=False).checkpoint.keep_every_steps
    if every and step_of(place) % every == 0:
        return ""
    return (
        f"the adapters are of no use without {place}, which its run deletes if it goes on for "
        "some checkpoints more: set checkpoint.keep_every_steps of that run to a divisor of "
        f"{step_of(place)}, or begin with a copy (partialfc export --huggingface)."
    )


def restore_base(path: Path, network: nn.Module, config: Config, read: Read) -> dict[str, Any]:
    """Give a backbone the base of a checkpoint; return the fact to be noted again.

    What is not the base is left as it is. Nothing is done without LoRA.

    Args:
        path: The checkpoint.
        network: The backbone.
        config: Of this start.
        read: :func:`partialfc.checkpoint.trained_backbone.state_at`.

    Raises:
        CheckpointError: If it is neither where the checkpoint says nor where the settings do; the
            message names both.
    """
    if not config.backbone.lora.rank:
        return {}
    place, digest, base = _found(path, config, read)
    network.load_state_dict(base, strict=False)
    return {BASE: {"place": str(place), "sha256": digest}}


def merged(path: Path, own: Mapping[str, Tensor], config: Config, read: Read) -> dict[str, Tensor]:
    """Return the state of a run's backbone, its base put in and its adapters merged.

    Args:
        path: The checkpoint.
        own: The tensors of the backbone that it holds, which are all of them without LoRA.
        config: Of its run.
        read: As in :func:`restore_base`.

    Raises:
        CheckpointError: As :func:`restore_base`.
    """
    if not config.backbone.lora.rank:
        return dict(own)
    _, _, base = _found(path, config, read)
    return merged_state({**base, **own}, config.backbone.lora.factor)


def _found(path: Path, config: Config, read: Read) -> tuple[Path, str, dict[str, Tensor]]:
    """Where the base is, its digest and its tensors."""
    within = _WITHIN.get()
    if path.resolve() in within:
        raise CheckpointError(f"{path}: it is the base of its own adapters")
    if len(within) == _MOST_BASES:
        raise CheckpointError(f"{path}: more than {_MOST_BASES} runs of adapters, one on another")
    token = _WITHIN.set((*within, path.resolve()))
    try:
        return _looked_up(path, config, read)
    finally:
        _WITHIN.reset(token)


def _looked_up(path: Path, config: Config, read: Read) -> tuple[Path, str, dict[str, Tensor]]:
    noted, problems = _noted(path), []
    for place in _places(noted["place"], config):
        try:
            state = read(place, config)
            digest = _digest(place, state, config)
        except _UNREADABLE as error:
            said = str(error).rstrip(".")
            problems.append(said if str(place) in said else f"{place}: {said}")
            continue
        if digest == noted["sha256"]:
            return place, digest, base_of(state, config.backbone.lora.also_train)
        problems.append(f"{place}: it holds other weights")
    raise CheckpointError(
        f"{path}: it holds adapters, and the weights that they belong to (SHA-256 "
        f"{noted['sha256'][:16]}...) are not there: {'; '.join(problems)}. Put them back "
        "where they were; a run that goes on may also be told another place, with run.start_from "
        "or backbone.pretrained."
    )


def _digest(place: Path, state: Mapping[str, Tensor], config: Config) -> str:
    if config.backbone.pretrained is not None:
        return digest_of(weights_in(place, config))
    return digest_of(base_of(state, config.backbone.lora.also_train))


def _noted(path: Path) -> dict[str, str]:
    noted = read_manifest(path)["facts"].get(BASE)
    keys = ("place", "sha256")
    if not isinstance(noted, dict) or not all(
        isinstance(noted.get(key), str) and len(noted[key]) <= _LONGEST_PLACE for key in keys
    ):
        raise CheckpointError(f"{path}: it does not say which weights its adapters belong to")
    return {key: noted[key] for key in keys}


def _places(noted: str, config: Config) -> Iterator[Path]:
    yield Path(noted)
    asked = config.run.start_from or config.backbone.pretrained
    if asked not in (None, Path(noted)):
        yield asked
