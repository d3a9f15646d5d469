"""What arcface_torch left in a folder: backbone, class centers of every rank, optimizer states.

    checkpoint_gpu_{r}.pt                 backbone, centers of rank r, both states, step
    model.pt | backbone.pth               backbone
    softmax_fc_gpu_{r}.pt                 centers of rank r
    rank_{r}_softmax_weight.pt, _mom.pt   centers of rank r and their velocity ("rank:{r}" in 2020)

Rank r of W has ``C // W + (r < C % W)`` identities. Shape suffixes: C = identities of a shard,
D = embedding.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from partialfc.checkpoint.foreign import (
    BACKBONES_IN_FOLDERS,
    backbone_in,
    finite,
    matrix,
    read,
    read_backbone,
    tensors,
)
from partialfc.errors import ForeignError, near

States = dict[str, Tensor]
"""States of one parameter by torch's names: momentum_buffer, or step, exp_avg, exp_avg_sq."""

_STATES = {"momentum_buffer", "step", "exp_avg", "exp_avg_sq"}
_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
_FULL = "checkpoint_gpu_{}.pt"


@dataclass(frozen=True, slots=True)
class RankCenters:
    """The class centers of one of their ranks: [C, D] and their states."""

    path: Path
    centers_CD: Tensor
    states: States


@dataclass(frozen=True, slots=True)
class Layout:
    """What was found, as closures over files: a shard is read when it is wanted.

    Attributes:
        kind: Of files, in words.
        source: The file that has the backbone.
        backbone: Its state_dict.
        backbone_states: States of the backbone's parameters by name; may be empty.
        shards: One for each of their ranks, in order; empty where there are no centers.
        step: Optimizer steps taken, or ``None`` where the files do not say.
        sampled_only: Whether their optimizer touched sampled rows only (version 1 of Partial FC).
    """

    kind: str
    source: Path
    backbone: dict[str, Tensor]
    backbone_states: dict[str, States] = field(default_factory=dict)
    shards: Sequence[Callable[[], RankCenters]] = ()
    step: int | None = None
    sampled_only: bool = False


def find(path: Path) -> Layout:
    """Return what a folder, or a single file of a backbone, holds.

    Raises:
        ForeignError: If there is nothing of arcface_torch in it, a rank's file is missing, or a
            file does not hold what its name says.
    """
    if not path.exists():
        raise ForeignError(f"{path}: there is no such file or folder. {near(path)}")
    if not path.is_dir():
        if re.fullmatch(r"checkpoint_gpu_\d+\.pt", path.name):
            return _checkpoints(_by_rank(path.parent, _FULL))
        return Layout("a backbone", path, read_backbone(path))
    if full := _by_rank(path, _FULL):
        return _checkpoints(full)
    source = backbone_in(path)
    if source is None:
        raise ForeignError(
            f"{path}: it has no checkpoint_gpu_*.pt, {' or '.join(BACKBONES_IN_FOLDERS)}. Give the "
            "output folder of arcface_torch, or the file of a backbone."
        )
    backbone = read_backbone(source)
    if second := _by_rank(path, "softmax_fc_gpu_{}.pt"):
        shards = [_reader(file, None) for file in second]
        return Layout(f"{source.name} and softmax_fc_gpu_*.pt", source, backbone, shards=shards)
    for mark in ("_", ":"):
        first = _by_rank(path, f"rank{mark}{{}}_softmax_weight.pt")
        if not first:
            continue
        moments = _by_rank(path, f"rank{mark}{{}}_softmax_weight_mom.pt")
        if moments and len(moments) != len(first):
            raise ForeignError(
                f"{path}: centers of {len(first)} ranks and velocities of {len(moments)}. Copy the "
                "missing *_mom.pt, or remove all of them to start without velocities."
            )
        given: list[Path | None] = [*moments] or [None] * len(first)
        shards = [_reader(*pair) for pair in zip(first, given, strict=True)]
        kind = f"{source.name} and rank_*_softmax_weight.pt"
        return Layout(kind, source, backbone, shards=shards, sampled_only=True)
    return Layout("a backbone", source, backbone)


def rows_of(num_identities: int, rank: int, ranks: int) -> range:
    """Return the identities of one of their ranks."""
    each, more = divmod(num_identities, ranks)
    start = each * rank + min(rank, more)
    return range(start, start + each + (rank < more))


def _by_rank(folder: Path, name: str) -> list[Path]:
    """The files of ranks 0, 1, ... in order, none missing; ``{}`` in the name is the rank."""
    found: dict[int, Path] = {}
    for path in folder.iterdir():
        if match := re.fullmatch(re.escape(name).replace(r"\{\}", r"(\d+)"), path.name):
            found[int(match[1])] = path
    missing = next((place for place, rank in enumerate(sorted(found)) if rank != place), None)
    if missing is not None:
        raise ForeignError(
            f"{folder}: {name.format(missing)} is missing, and the file of rank {max(found)} is "
            "there. Copy the files of all ranks into one folder."
        )
    return [found[rank] for rank in sorted(found)]


def _reader(path: Path, moment: Path | None) -> Callable[[], RankCenters]:
    """Centers in a file of their own: a matrix, or a state_dict with "weight"."""

    def shard() -> RankCenters:
        value = read(path)
        weight = value.get("weight") if isinstance(value, Mapping) else value
        states = {}
        if moment is not None:
            states["momentum_buffer"] = matrix(read(moment), moment)
        return _checked(path, matrix(weight, path), states)

    return shard


def _checkpoints(paths: list[Path]) -> Layout:
    first = _checkpoint(paths[0])
    backbone = tensors(first["state_dict_backbone"], paths[0])
    states, number = _optimizer_states(first, paths[0])
    names = [name for name in backbone if not name.endswith(_BUFFERS)]
    if number != len(names):
        raise ForeignError(
            f"{paths[0]}: its optimizer has {number} parameters of the backbone, and the backbone "
            f"has {len(names)}. It is of another program."
        )

    def reader(path: Path) -> Callable[[], RankCenters]:
        def shard() -> RankCenters:
            value = _checkpoint(path)
            if value["global_step"] != first["global_step"]:
                raise ForeignError(
                    f"{path}: it is of step {value['global_step']}, and {paths[0].name} of step "
                    f"{first['global_step']}. Copy the files of one moment."
                )
            own, count = _optimizer_states(value, path)
            fc = value["state_dict_softmax_fc"]
            weight = fc.get("weight") if isinstance(fc, Mapping) else None
            return _checked(path, matrix(weight, path), own.get(count, {}))

        return shard

    return Layout(
        "checkpoint_gpu_*.pt",
        paths[0],
        backbone,
        backbone_states={names[i]: state for i, state in states.items() if i < number},
        shards=[reader(path) for path in paths],
        step=first["global_step"],
    )


def _checkpoint(path: Path) -> dict[str, Any]:
    value = read(path)
    wanted = {"global_step": int, "state_dict_backbone": Mapping, "state_dict_softmax_fc": Mapping,
              "state_optimizer": Mapping}  # fmt: skip
    for name, kind in wanted.items():
        if not isinstance(value, Mapping) or not isinstance(value.get(name), kind):
            raise ForeignError(
                f"{path}: it has no {name}. A checkpoint_gpu_*.pt of arcface_torch has "
                f"{', '.join(wanted)}; a file with the backbone alone is a model.pt."
            )
    if isinstance(value["global_step"], bool) or value["global_step"] < 0:
        raise ForeignError(f"{path}: global_step = {value['global_step']}: must be >= 0.")
    return dict(value)


def _optimizer_states(checkpoint: Mapping[str, Any], path: Path) -> tuple[dict[int, States], int]:
    """States by parameter number, and how many of them are the backbone's; the centers are next."""
    optimizer = checkpoint["state_optimizer"]
    try:
        groups = [list(group["params"]) for group in optimizer["param_groups"]]
        numbers = [number for group in groups for number in group]
        if len(groups) != 2 or len(groups[1]) != 1 or numbers != list(range(len(numbers))):
            raise ValueError("its groups are not those of a backbone and one matrix of centers")
        states: dict[int, States] = {}
        for number, state in optimizer["state"].items():
            kept = {name: value for name, value in state.items() if value is not None}
            if kept.keys() - _STATES or not all(isinstance(v, Tensor) for v in kept.values()):
                raise ValueError(f"its states are {', '.join(map(str, state))}, must be of SGD or "
                                 "AdamW")  # fmt: skip
            states[int(number)] = {
                name: finite(value, f"{name} of its parameter {number}")
                for name, value in kept.items()
            }
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ForeignError(f"{path}: state_optimizer: {error}.") from error
    return states, len(groups[0])


def _checked(path: Path, centers_CD: Tensor, states: States) -> RankCenters:
    for name, value in states.items():
        if value.ndim and value.shape != centers_CD.shape:
            raise ForeignError(
                f"{path}: {name} is {list(value.shape)}, its centers {list(centers_CD.shape)}."
            )
    return RankCenters(path, centers_CD, states)
