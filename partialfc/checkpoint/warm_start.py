"""How a new run begins with something trained: a backbone alone, or with class centers.

``run.start_from`` names it. What is trained is the weights: optimizers, schedule and step are new.
Class centers come from a folder that ``partialfc identities`` wrote, which says which identity of
the new run each of them is.

Shape suffixes: R = rows of this rank, D = embedding.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from partialfc.backbones.lora import is_adapter
from partialfc.checkpoint import loading as checkpoint
from partialfc.checkpoint.disk import Disk
from partialfc.checkpoint.folder import commit, read_manifest, write_text
from partialfc.checkpoint.recognition import difference
from partialfc.checkpoint.tensor_file import MadeRows, write_tensors
from partialfc.checkpoint.trained_backbone import is_start, open_backbone
from partialfc.config import Config, ConfigError
from partialfc.data.dataset import DataSet
from partialfc.data.names import NAMES, Names, first_difference, names_of, read_names
from partialfc.distributed.agreement import words_of_any
from partialfc.head.rows.formats import FIRST_SCALE, FORMATS
from partialfc.model.build import Model
from partialfc.runtime.process import Runtime


def warm_start(
    path: Path, config: Config, model: Model, runtime: Runtime, dataset: DataSet
) -> Path:
    """Put what was trained into a new model; return where it lies. Collective.

    Args:
        path: ``run.start_from``: a folder of ``partialfc identities``; or a run's folder, one of
            its checkpoints or a file of weights, for the backbone alone.
        config: Of the new run.
        model: As it was built.
        runtime: This rank.
        dataset: What the new run trains on.

    Raises:
        ConfigError: If it does not fit the backbone or the identities of the new run.
        CheckpointError: If it is corrupt.
    """
    if not is_start(path):
        trained = open_backbone(path, image_size=config.data.image_size)
        _fill(path, model, trained.state, config)
        return trained.place
    checkpoint.named(path, runtime)
    if len(model.heads) > 1:
        raise ConfigError(
            f"run.start_from = {str(path)!r}: it has the class centers of one head, and this run "
            f"has the heads {', '.join(model.heads)}. Take over the backbone alone: name a run's "
            "folder."
        )
    manifest, head = read_manifest(path), model.head
    has = manifest["num_identities"]
    if has != head.sharding.num_identities:
        raise ConfigError(
            f"run.start_from = {str(path)!r}: it has the class centers of {has:,} identities, and "
            f"data.train has {head.sharding.num_identities:,}. Make another one with "
            "partialfc identities --names NEW.identities.json, or, if the old ones keep their "
            f"numbers, with partialfc identities --identities {head.sharding.num_identities}."
        )
    wrong = _others(path, manifest, dataset) if runtime.leads else ""
    if wrong := words_of_any(wrong, runtime.ranks):
        raise ConfigError(wrong)
    if head.centers.dtype in FIRST_SCALE:
        raise ConfigError(
            f'head.center_format = "{FORMATS[head.centers.dtype]}" with run.start_from: class '
            "centers are taken over into fp32 or bf16. Leave it out."
        )
    if manifest["facts"]["dim"] != head.centers.shape[1] or (
        manifest["facts"]["centers_per_identity"] != head.centers_per_identity
    ):
        raise ConfigError(
            f"run.start_from = {str(path)!r}: it has {manifest['facts']['centers_per_identity']} "
            f"rows of {manifest['facts']['dim']} for each identity, and this head "
            f"{head.centers_per_identity} of {head.centers.shape[1]}. Choose the head.margin and "
            "backbone.embedding_dim that they were trained with, or the backbone alone."
        )
    state = checkpoint.read_tensors(path, "backbone", manifest, str(runtime.device))
    _fill(path, model, state, config)
    checkpoint.read_centers(path, manifest, head, with_states=False)
    return path.resolve()


def _others(path: Path, manifest: Mapping[str, Any], dataset: DataSet) -> str:
    """In words, that a center is another person's than the data says; "" if none is."""
    if manifest.get("names") is None:
        return ""
    try:
        found, mine = _named(path, manifest), names_of(dataset)
    except (OSError, ValueError) as error:
        return f"run.start_from = {str(path)!r}: {error}"
    if mine is None:
        print(
            f"warning: run.start_from = {str(path)!r}: data.train does not say who its identities "
            "are, so nobody can look whether each gets its own class center.",
            flush=True,
        )
        return ""
    if (number := first_difference(found, mine)) is None:
        return ""
    return (
        f"run.start_from = {str(path)!r}: identity {number} is {found[number]!r} there, and "
        f"{mine[number]!r} in data.train: the data was numbered again. Make another one with "
        "partialfc identities --names NEW.identities.json, which gives every center to its own."
    )


def _named(path: Path, manifest: Mapping[str, Any]) -> Names:
    file = path / NAMES
    if hashlib.sha256(file.read_bytes()).hexdigest() != manifest["names"]:
        raise ValueError(f"{file}: it is not as it was written.")
    return read_names(file)


def write_start(
    path: Path,
    backbone: Mapping[str, Tensor],
    centers_RD: Tensor | MadeRows,
    about: Mapping[str, Any],
    names: Names | None = None,
) -> None:
    """Write a folder that :func:`warm_start` reads, whole or not at all.

    Args:
        path: A folder that does not exist.
        backbone: Its tensors by name.
        centers_RD: Rows of all identities of the new run, fp32, or what makes them; R may be
            several for each. What goes wrong there leaves nothing behind.
        about: ``num_identities`` and ``centers_per_identity``.
        names: Of the identities of the new run, if they are known.
    """
    disk = Disk()
    temporary = path.with_name(f".{path.name}.partial")
    if os.path.lexists(temporary):
        disk.remove(temporary)
    disk.make_folder(temporary)
    if isinstance(centers_RD, Tensor):
        centers_RD = centers_RD.contiguous()
    whole: dict[str, dict[str, Tensor | MadeRows]] = {
        "backbone": {name: value.detach().cpu().contiguous() for name, value in backbone.items()},
        "centers_0000000000": {"centers": centers_RD},
    }
    try:
        notes = {
            f"{name}.safetensors": write_tensors(temporary / f"{name}.safetensors", tensors, disk)
            for name, tensors in whole.items()
        }
    except BaseException:
        disk.remove(temporary)
        raise
    digest = None
    if names is not None and any(name is not None for name in names):
        text = json.dumps(names, indent=0)
        write_text(temporary / NAMES, text, disk)
        digest = hashlib.sha256(text.encode()).hexdigest()
    manifest = {
        "names": digest,
        "step": 0,
        "world_size": 1,
        "num_identities": about["num_identities"],
        "canonical_shards": 1,
        "facts": {
            "dim": centers_RD.shape[1],
            "centers_per_identity": about["centers_per_identity"],
        },
        "scaler": {},
        "settings": "",
        "versions": {"torch": torch.__version__},
    }
    commit(temporary, path, manifest, notes, disk)


def _fill(path: Path, model: Model, state: Mapping[str, Tensor], config: Config) -> None:
    plain = {k: v for k, v in model.backbone.state_dict().items() if not is_adapter(k)}
    wanted, found = (
        {name: tuple(value.shape) for name, value in one.items()} for one in (plain, state)
    )
    if wanted != found:
        ours = config.backbone
        raise ConfigError(
            f"run.start_from = {str(path)!r}: it is another backbone than {ours.name} with "
            f"embeddings of {ours.embedding_dim} for images of {config.data.image_size} pixels, "
            f"which the settings say: {difference(wanted, found)}."
        )
    model.load({**model.state(), **state})
    if model.average is not None:
        model.average.begin()
