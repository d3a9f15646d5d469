"""Checkpoints of a run: find the newest valid one, load it on any number of ranks, save.

:mod:`partialfc.checkpoint.folder` says what is in one, :mod:`partialfc.checkpoint.saving` writes
them. Centers are stored by global row, so any number of ranks reads them; no rank opens more than
the files that have its rows, and it reads those in pieces. No pickle anywhere.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import nn

from partialfc.checkpoint.content import sizes_of
from partialfc.checkpoint.disk import Disk
from partialfc.checkpoint.folder import (
    BY_NUMBER,
    leftovers,
    path_of,
    read_manifest,
    set_aside,
    step_of,
    steps,
)
from partialfc.checkpoint.optimizer_states import restore_states, with_names
from partialfc.checkpoint.parts import ENDING, head_of
from partialfc.checkpoint.reading import (
    complete,
    read_centers,
    read_statistics,
    read_tensors,
    refuse_rows_behind,
)
from partialfc.checkpoint.saving import Saver
from partialfc.checkpoint.verifying import verify
from partialfc.config.tree import STAGE
from partialfc.distributed.agreement import from_leader, words_of_any
from partialfc.errors import CheckpointError, DamagedError, OtherFormatError
from partialfc.model.build import Model
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
    "read_centers",
    "read_tensors",
    "save",
    "verify",
]

_NONE = -1

CONFIG_HASH = "config_hash"
"""The one fact that may differ when a run goes on."""
NAME_ANOTHER = "Name a folder such as runs/mine/checkpoints/step_00002000, or another checkpoint."
"""What to do where the one that somebody chose is of no use."""
LABELS = "labels"
"""The one fact that a checkpoint of before it was known may lack."""


def save(
    folder: Path, step: int, model: Model, facts: Mapping[str, Any], runtime: Runtime, *, keep: int
) -> Path:
    """Write one checkpoint and return when it is complete; see :class:`Saver`. Collective."""
    with Saver(folder, facts, runtime, keep=keep) as saver:
        saver.save(step, model)
    return path_of(folder, step)


def newest(
    folder: Path,
    runtime: Runtime,
    *,
    tidy: bool = True,
    content: bool = True,
    damaged: Mapping[Path, str] = MappingProxyType({}),
) -> Path | None:
    """Return the newest checkpoint whose files are as its manifest says. Collective.

    Every rank verifies a share of the files. Newer ones that are not valid are set aside as
    ``.step_….invalid``, with a message. What a kill left half-written or half-deleted is removed.

    Args:
        folder: Of the checkpoints.
        runtime: This rank.
        tidy: Without it nothing is touched: another process may be writing.
        content: Whether checksums are compared; otherwise :func:`load` is to do it.
        damaged: What loading has found to be wrong with some.

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
        problem = damaged.get(path) or _problem_of(path, runtime, content=content)
        if not problem:
            if runtime.leads and tidy:
                set_aside(invalid)
            return path
        if runtime.leads and path not in damaged:  # that has been said
            print(f"{path}: not a valid checkpoint: {problem}", flush=True)
        invalid.append(path)
    if invalid:
        raise CheckpointError(
            f"{folder}: no checkpoint in it is valid; the oldest: {problem}. Copy a good one "
            "back, or start again in another run.folder."
        )
    return None


def named(path: Path, runtime: Runtime, *, content: bool = True) -> Path:
    """Return a checkpoint that somebody chose, verified by all ranks. Collective.

    Args:
        path: Of it.
        runtime: This rank.
        content: As of :func:`newest`.

    Raises:
        CheckpointError: If it is none, corrupt, or of another format.
    """
    if problem := _problem_of(path, runtime, content=content):
        raise CheckpointError(f"{path}: not a valid checkpoint: {problem}. {NAME_ANOTHER}")
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
    verified: bool = False,
) -> int:
    """Read a checkpoint into the live objects; return its step. Collective: two all-reduces.

    The number of ranks may differ from the one that wrote it. Settings of the optimizers (rate,
    momentum, weight decay) stay those of the run.

    Args:
        path: Of the checkpoint.
        model: Filled; one without heads with the backbone alone.
        facts: What the checkpoint must say.
        runtime: This rank.
        begins: Whether a stage begins with it, whose head may keep more than that of the stage
            before, or less: what the checkpoint has not stays new.
        verified: Whether its files were just verified; otherwise each rank compares the checksums
            of what it reads.

    Raises:
        DamagedError: On every rank, if a file that any rank reads is not as it was written. The
            model is half filled.
        CheckpointError: On every rank, if the checkpoint is of another run, or something is not in
            it: the message names what.
    """
    damage, problem, manifest = "", "", {}
    try:
        manifest = read_manifest(path)
        _same_run(path, manifest, model.heads, facts)
        _fill(path, manifest, model, runtime, begins=begins, compare=not verified)
    except DamagedError as error:
        damage = str(error)
    except CheckpointError as error:
        problem = str(error)
    if damage := words_of_any(damage, runtime.ranks):
        raise DamagedError(f"{path}: {damage}")
    if problem := words_of_any(problem, runtime.ranks):
        raise CheckpointError(problem)
    _say_what_differs(path, manifest, model, runtime)
    return int(manifest["step"])


def _fill(
    path: Path,
    manifest: Mapping[str, Any],
    model: Model,
    runtime: Runtime,
    *,
    begins: bool,
    compare: bool,
) -> None:
    """Fill the model, with no collective; what is wrong is said with the checkpoint's name."""
    device = str(runtime.device)
    try:
        found = read_tensors(path, "backbone", manifest, device, model.shards, compare=compare)
        if model.own is not None and found.keys() != model.own:
            raise CheckpointError(f"it has other tensors than {', '.join(sorted(model.own))}")
        model.load(found)
        read_statistics(path, manifest, model, runtime, compare=compare)
        states = read_tensors(path, "optimizer", manifest, device, model.shards, compare=compare)
        if manifest["format"] == BY_NUMBER:
            states = with_names(states, model.parameters())
        restore_states(model.optimizer, model.parameters(), states)
        for name, head in model.heads.items():
            read_centers(path, manifest, head, name, begins=begins, compare=compare)
            if begins:
                refuse_rows_behind(path, manifest, head, name, compare=compare)
            head.optimizer.param_groups[0]["steps"] = manifest["step"]
            if shared := head.shared_state():
                has_it = f"{head_of(name)}{ENDING}" in manifest["files"] or not begins
                found = (
                    read_tensors(path, head_of(name), manifest, device, compare=compare)
                    if has_it
                    else {}
                )
                head.load_shared_state({**shared, **found} if begins else complete(shared, found))
        if model.scaler.is_enabled():
            model.scaler.load_state_dict(manifest["scaler"])
    except DamagedError:
        raise
    except (RuntimeError, ValueError, KeyError, OSError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def _problem_of(path: Path, runtime: Runtime, *, content: bool) -> str:
    """What the first rank that finds anything wrong says; each verifies a share of the files."""
    ranks, problem, refusal = runtime.ranks, None, ""
    try:
        problem = verify(path, part=ranks.rank, of=ranks.size, content=content)
    except OtherFormatError as error:
        refusal = str(error)
    if refusal := words_of_any(refusal, ranks):  # it is whole: not to be set aside
        raise OtherFormatError(refusal)
    return words_of_any(problem or "", ranks)


def _same_run(
    path: Path, manifest: Mapping[str, Any], heads: Heads, facts: Mapping[str, Any]
) -> None:
    sizes = {"heads": None, **sizes_of(heads)} if heads else {}
    expected = {STAGE: None, **sizes, **facts}
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
