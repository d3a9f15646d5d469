"""Checkpoints of a run: find the newest valid one, load it on any number of ranks, save.

:mod:`partialfc.checkpoint.folder` says what is in one, :mod:`partialfc.checkpoint.saving` writes
them. Centers are stored by global row, so any number of ranks reads them; no rank reads more than
its own rows, and those in pieces. No pickle anywhere.
"""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from partialfc.checkpoint.content import sizes_of
from partialfc.checkpoint.disk import Disk
from partialfc.checkpoint.folder import (
    AVERAGE,
    BY_NUMBER,
    centers_of,
    head_of,
    leftovers,
    path_of,
    read_manifest,
    set_aside,
    statistics_of,
    step_of,
    steps,
    verify,
)
from partialfc.checkpoint.optimizer_states import restore_states, with_names
from partialfc.checkpoint.saving import Saver
from partialfc.config.tree import STAGE
from partialfc.distributed.agreement import from_leader, words_of_any
from partialfc.errors import CheckpointError, OtherFormatError
from partialfc.head import PartialFC
from partialfc.head.rows.stored import AT_STEP
from partialfc.model.batch_norm import statistics
from partialfc.model.build import Model
from partialfc.model.fsdp import Shards
from partialfc.model.heads import Heads
from partialfc.runtime.process import Runtime

__all__ = [
    "CONFIG_HASH",
    "CheckpointError",
    "Saver",
    "exist",
    "load",
    "named",
    "newest",
    "save",
    "verify",
]

_NONE = -1
_PIECE_BYTES = 64 << 20

CONFIG_HASH = "config_hash"
"""The one fact that may differ when a run goes on."""
LABELS = "labels"
"""The one fact that a checkpoint of before it was known may lack."""


def save(
    folder: Path, step: int, model: Model, facts: Mapping[str, Any], runtime: Runtime, *, keep: int
) -> Path:
    """Write one checkpoint and return when it is complete; see :class:`Saver`. Collective."""
    with Saver(folder, facts, runtime, keep=keep) as saver:
        saver.save(step, model)
    return path_of(folder, step)


def newest(folder: Path, runtime: Runtime, *, tidy: bool = True) -> Path | None:
    """Return the newest checkpoint whose files are as its manifest says. Collective.

    Every rank verifies a share of the files. Newer ones that are not valid are set aside as
    ``.step_….invalid``, with a message. What a kill left half-written or half-deleted is removed.
    Without ``tidy`` nothing is touched: another process may be writing.

    Raises:
        CheckpointError: If there are checkpoints and none is valid, or one that is newer than all
            valid ones is of another format; nothing is touched then.
    """
    disk, found = Disk(), steps(folder) if runtime.leads else []
    if runtime.leads and tidy:
        for leftover in leftovers(folder):
            disk.remove(leftover)
    invalid: list[Path] = []
    problem = ""
    while True:
        step = from_leader(step_of(found.pop()) if found else _NONE, runtime.ranks)
        if step == _NONE:
            break
        path = path_of(folder, step)
        problem = _problem_of(path, runtime)
        if not problem:
            if runtime.leads and tidy:
                set_aside(invalid)
            return path
        if runtime.leads:
            print(f"{path}: not a valid checkpoint: {problem}", flush=True)
        invalid.append(path)
    if invalid:
        raise CheckpointError(
            f"{folder}: no checkpoint in it is valid; the oldest: {problem}. Copy a good one "
            "back, or start again in another run.folder."
        )
    return None


def named(path: Path, runtime: Runtime) -> Path:
    """Return a checkpoint that somebody chose, verified by all ranks. Collective.

    Raises:
        CheckpointError: If it is none, corrupt, or of another format.
    """
    if problem := _problem_of(path, runtime):
        raise CheckpointError(
            f"{path}: not a valid checkpoint: {problem}. Name a folder such as "
            "runs/mine/checkpoints/step_00002000, or another checkpoint."
        )
    return path


def exist(folder: Path) -> bool:
    """Whether a folder holds any checkpoint, valid or not."""
    return bool(steps(folder))


def load(
    path: Path,
    model: Model,
    facts: Mapping[str, Any],
    runtime: Runtime,
    *,
    begins: bool = False,
) -> int:
    """Read a verified checkpoint into the live objects; return its step.

    The number of ranks may differ from the one that wrote it. Settings of the optimizers (rate,
    momentum, weight decay) stay those of the run.

    Args:
        path: Of the checkpoint.
        model: Filled.
        facts: What the checkpoint must say.
        runtime: This rank.
        begins: Whether a stage begins with it, whose head may keep more than that of the stage
            before, or less: what the checkpoint has not stays new.

    Raises:
        CheckpointError: If the checkpoint is of another run, or something is not in it: the message
            names what.
    """
    manifest = read_manifest(path)
    _same_run(path, manifest, model.heads, facts)
    device = str(runtime.device)
    try:
        found = read_tensors(path, "backbone", manifest, device, model.shards)
        if model.own is not None and found.keys() != model.own:
            raise CheckpointError(f"it has other tensors than {', '.join(sorted(model.own))}")
        model.load(found)
        _read_own_statistics(path, manifest, model.backbone, runtime)
        _read_average(path, manifest, model, runtime)
        states = read_tensors(path, "optimizer", manifest, device, model.shards)
        if manifest["format"] == BY_NUMBER:
            states = with_names(states, model.parameters())
        restore_states(model.optimizer, model.parameters(), states)
        for name, head in model.heads.items():
            read_centers(path, manifest, head, name, begins=begins)
            if begins:
                _refuse_rows_behind(path, manifest, head, name)
            head.optimizer.param_groups[0]["steps"] = manifest["step"]
            if shared := head.shared_state():
                has_it = f"{head_of(name)}.safetensors" in manifest["files"] or not begins
                found = read_tensors(path, head_of(name), manifest, device) if has_it else {}
                head.load_shared_state({**shared, **found} if begins else _complete(shared, found))
        if model.scaler.is_enabled():
            model.scaler.load_state_dict(manifest["scaler"])
    except (RuntimeError, ValueError, KeyError, OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    _say_what_differs(path, manifest, model, runtime)
    return int(manifest["step"])


def read_tensors(
    path: Path, name: str, manifest: Mapping[str, Any], device: str, shards: Shards | None = None
) -> dict[str, Tensor]:
    """Return the tensors of one of a checkpoint's files; with ``shards``, this rank's rows of them.

    Raises:
        CheckpointError: If the file, or a tensor that the manifest lists, is missing.
    """
    file = f"{name}.safetensors"
    if file not in manifest["files"]:
        raise CheckpointError(f"it lacks {file}")
    with safe_open(path / file, framework="pt", device=device) as opened:
        found = {}
        for key in _listed(file, opened.keys(), manifest):
            part = opened.get_slice(key)
            divided = shards and (name == "optimizer" or key in shards.own) and part.get_shape()
            rows = shards.rows(part.get_shape()[0]) if shards and divided else slice(None)
            found[key] = part[rows] if divided else opened.get_tensor(key)
        return found


def _read_own_statistics(
    path: Path, manifest: Mapping[str, Any], backbone: nn.Module, runtime: Runtime
) -> None:
    """As many ranks as wrote it go on with their own; any other number with the backbone's mean."""
    ranks, live = runtime.ranks, statistics(backbone)
    if ranks.size == 1 or ranks.size != manifest["world_size"] or not live:
        return
    found = read_tensors(path, statistics_of(ranks.rank), manifest, str(runtime.device))
    _complete(live, found)
    for name, value in live.items():
        value.copy_(found[name])


def _read_average(path: Path, manifest: Mapping[str, Any], model: Model, runtime: Runtime) -> None:
    """The average goes on; where the run that wrote this kept none, it begins at these weights."""
    if model.average is None:
        return
    device, ranks = str(runtime.device), runtime.ranks
    if "average.safetensors" not in manifest["files"]:
        model.average.begin()
        return
    found = read_tensors(path, "average", manifest, device, model.shards)
    own = {AVERAGE + name for name in model.average.statistics()}
    if ranks.size > 1 and ranks.size == manifest["world_size"] and own:
        kept = read_tensors(path, statistics_of(ranks.rank), manifest, device)
        _complete(dict.fromkeys(own), kept)
        found |= {name.removeprefix(AVERAGE): kept[name] for name in own}
    model.average.load(_complete(model.average.tensors, found))


def read_centers(
    path: Path,
    manifest: Mapping[str, Any],
    head: PartialFC,
    name: str = "",
    *,
    with_states: bool = True,
    begins: bool = False,
) -> None:
    """Fill this rank's centers and row states from the files that hold its rows.

    Nothing is read twice, and in memory there is one piece of a file beside what is filled.

    Args:
        path: Of the checkpoint.
        manifest: Of it.
        head: Whose centers and states are filled.
        name: Of the head, if it is one of several.
        with_states: Without them, the centers alone are filled, and rounded to their format.
        begins: As of :func:`load`.

    Raises:
        CheckpointError: If rows or states are missing, or have another format.
    """
    head.optimizer.settle()
    filled = {"centers": head.centers.data, **(head.optimizer.states() if with_states else {})}
    if with_states and not begins:  # a stage begins with a search
        filled |= head.lists()
    head.loaded()
    done, owned = 0, head.owned_rows
    for first, part_file in _centers_in(manifest, name).items():
        with safe_open(path / part_file, framework="pt", device="cpu") as file:
            listed = _listed(part_file, file.keys(), manifest)
            if begins and AT_STEP not in listed:
                filled.pop(AT_STEP, None)
            _complete(dict.fromkeys(filled), listed)
            slices = {tensor: file.get_slice(tensor) for tensor in filled}
            rows = slices["centers"].get_shape()[0]
            low, high = max(first, owned.start), min(first + rows, owned.stop)
            for tensor, part in slices.items():
                into = filled[tensor]
                for start, stop in _pieces(low, high, part, rows):
                    piece = part[start - first : stop - first]
                    if piece.dtype != into.dtype and with_states:
                        raise CheckpointError(
                            f"{part_file}: {tensor} is {piece.dtype}, and the settings want "
                            f"{into.dtype}"
                        )
                    into[start - owned.start : stop - owned.start] = piece.to(into.device)
            done += max(0, high - low)
    if done != len(owned):
        raise CheckpointError(f"it has {done} of the {len(owned)} rows of this rank")


def _centers_in(manifest: Mapping[str, Any], name: str) -> dict[int, str]:
    """The files of a head's centers by their first row."""
    begin, found = centers_of(name), {}
    for file in sorted(manifest["files"]):
        digits = file.removeprefix(begin).removesuffix(".safetensors")
        if file.startswith(begin) and digits.isdecimal():
            found[int(digits)] = file
    return found


def _refuse_rows_behind(
    path: Path, manifest: Mapping[str, Any], head: PartialFC, name: str
) -> None:
    """Rows that moved unsampled must be up to date where from now on they do not.

    The last checkpoint of a stage has them so. That of a run which had ended, and to which a stage
    is added, may not.
    """
    if AT_STEP in head.optimizer.states():
        return
    for file in _centers_in(manifest, name).values():
        if AT_STEP in manifest["files"][file]["tensors"]:
            with safe_open(path / file, framework="pt", device="cpu") as opened:
                at_step = opened.get_tensor(AT_STEP)
            if at_step.min() != at_step.max():
                raise CheckpointError(
                    "its class centers that were not sampled are not up to date, which the last "
                    "checkpoint of a stage has. Make the stage before one step longer"
                )


def _pieces(low: int, high: int, part: Any, rows: int) -> list[tuple[int, int]]:
    """Cut rows [low, high) into pieces of a bounded size; no dtype is wider than 8 bytes."""
    width = 1
    for size in part.get_shape()[1:]:
        width *= size
    step = max(1, _PIECE_BYTES // (8 * width))
    return [(start, min(start + step, high)) for start in range(low, high, step)]


def _problem_of(path: Path, runtime: Runtime) -> str:
    """What the first rank that finds anything wrong says; each verifies a share of the files."""
    ranks, problem, refusal = runtime.ranks, None, ""
    try:
        problem = verify(path, part=ranks.rank, of=ranks.size)
    except OtherFormatError as error:
        refusal = str(error)
    if refusal := words_of_any(refusal, ranks):  # it is whole: not to be set aside
        raise OtherFormatError(refusal)
    return words_of_any(problem or "", ranks)


def _same_run(
    path: Path, manifest: Mapping[str, Any], heads: Heads, facts: Mapping[str, Any]
) -> None:
    expected = {"heads": None, STAGE: None, **sizes_of(heads), **facts}
    saved = {**manifest, **manifest["facts"]}
    differ = [
        f"{name} = {json.dumps(saved.get(name))}, this run has {json.dumps(value)}"
        for name, value in expected.items()
        if saved.get(name) != value and name != CONFIG_HASH and (name != LABELS or LABELS in saved)
    ]
    if differ:
        raise CheckpointError(
            f"{path}: it was written with {'; with '.join(differ)}. Go on with the same settings, "
            "or start a new run in another run.folder: run.start_from takes over this one's "
            "backbone, and its class centers as partialfc identities writes them."
        )


def _say_what_differs(
    path: Path, manifest: Mapping[str, Any], model: Model, runtime: Runtime
) -> None:
    """What cannot be equal on another number of ranks is said, once."""
    before, now = manifest["world_size"], runtime.ranks.size
    if before == now or not runtime.leads:
        return
    differs = "sums over ranks are rounded in another order"
    layers = [m for m in model.backbone.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if layers and not all(isinstance(layer, nn.SyncBatchNorm) for layer in layers):
        differs += (
            f", and the batch statistics of {len(layers)} BatchNorm layers are now those of a "
            "rank's share of the batch on this number of ranks"
        )
    print(
        f"{path}: written by {before} ranks, going on with {now}: the same images, samples and "
        f"schedule; {differs}.",
        flush=True,
    )


def _listed(file: str, found: Collection[str], manifest: Mapping[str, Any]) -> list[str]:
    """The tensors of a file, which are those that the manifest lists."""
    listed = manifest["files"][file]["tensors"]
    return sorted(_complete(dict.fromkeys(listed), dict.fromkeys(found)))


def _complete(expected: Mapping[str, Any], found: Any) -> Any:
    if missing := sorted(expected.keys() - set(found)):
        raise CheckpointError(f"it lacks the tensor {', '.join(missing)}")
    return found
