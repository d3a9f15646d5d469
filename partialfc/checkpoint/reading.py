"""A checkpoint's tensors into live objects: each rank opens the files that it needs, once each."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from partialfc.checkpoint.folder import note_of
from partialfc.checkpoint.parts import (
    AVERAGE,
    ENDING,
    files_with_rows,
    parts_of,
    statistics_of,
)
from partialfc.checkpoint.tensor_reader import TensorReader, opened_tensors
from partialfc.config.heads import section_of_head
from partialfc.errors import CheckpointError
from partialfc.head import PartialFC
from partialfc.head.nearest import LISTS
from partialfc.head.rows.optimizer import RowOptimizer
from partialfc.head.rows.stored import AT_STEP
from partialfc.model.batch_norm import statistics
from partialfc.model.build import Model
from partialfc.model.fsdp import Shards
from partialfc.runtime.process import Runtime


class HasRows(Protocol):
    """What rows are read into: a :class:`~partialfc.head.PartialFC`, or a part of one."""

    @property
    def owned_rows(self) -> range:
        """Which of those of all identities."""

    @property
    def centers(self) -> nn.Parameter:
        """[rows, D]."""

    @property
    def optimizer(self) -> RowOptimizer:
        """It has their states."""

    def lists(self) -> dict[str, Tensor]:
        """What else a checkpoint has for each row."""

    def loaded(self) -> None:
        """Called before they are filled."""


@contextmanager
def opened_file(
    path: Path, manifest: Mapping[str, Any], file: str, *, compare: bool
) -> Iterator[TensorReader]:
    """Open one of a checkpoint's files, which has the tensors that are noted of it.

    Raises:
        CheckpointError: If it has not, or is not as it was written.
    """
    note = note_of(path, manifest, file)
    with opened_tensors(path / file, note, compare=compare) as reader:
        complete(dict.fromkeys(note.tensors or ()), reader.places)
        yield reader


def read_tensors(
    path: Path,
    name: str,
    manifest: Mapping[str, Any],
    device: str,
    shards: Shards | None = None,
    *,
    compare: bool = True,
) -> dict[str, Tensor]:
    """Return the tensors of one of a checkpoint's files; with ``shards``, this rank's rows of them.

    Args:
        path: Of the checkpoint.
        name: Of the file, without its ending.
        manifest: Of the checkpoint.
        device: Where they go.
        shards: Of a backbone that is divided.
        compare: Whether checksums are compared.

    Raises:
        CheckpointError: If the file, or a tensor that the manifest lists, is missing.
    """
    file = f"{name}{ENDING}"
    if file not in manifest["files"] and file not in parts_of(manifest):
        raise CheckpointError(f"it lacks {file}")
    with opened_file(path, manifest, file, compare=compare) as reader:
        rows: dict[str, slice | None] = {}
        for key, place in sorted(reader.places.items()):
            divided = shards and (name == "optimizer" or key in shards.own) and place.shape
            rows[key] = shards.rows(place.shape[0]) if shards and divided else None
        return {key: value.to(device) for key, value in reader.read(rows).items()}


def read_statistics(
    path: Path, manifest: Mapping[str, Any], model: Model, runtime: Runtime, *, compare: bool
) -> None:
    """Fill BatchNorm's statistics and the average.

    As many ranks as wrote a checkpoint go on with their own statistics; any other number with the
    backbone's, which are their mean. Where the run that wrote it kept no average, it begins at
    these weights.

    Raises:
        CheckpointError: If a tensor is missing.
    """
    device, ranks, live = str(runtime.device), runtime.ranks, statistics(model.backbone)
    own: dict[str, Tensor] = {}
    if live and 1 < ranks.size == manifest["world_size"]:
        own = read_tensors(path, statistics_of(ranks.rank), manifest, device, compare=compare)
        complete(live, own)
        for name, value in live.items():
            value.copy_(own[name])
    if model.average is None:
        return
    if f"average{ENDING}" not in manifest["files"]:
        model.average.begin()
        return
    found = read_tensors(path, "average", manifest, device, model.shards, compare=compare)
    names = model.average.statistics() if own else ()
    complete(dict.fromkeys(AVERAGE + name for name in names), own)
    found |= {name: own[AVERAGE + name] for name in names}
    model.average.load(complete(model.average.tensors, found))


def read_centers(
    path: Path,
    manifest: Mapping[str, Any],
    head: HasRows,
    name: str = "",
    *,
    with_states: bool = True,
    begins: bool = False,
    compare: bool = True,
) -> None:
    """Fill this rank's centers and row states from the files that hold its rows.

    Nothing is read twice, and in memory there are a few pieces of a file beside what is filled.

    Args:
        path: Of the checkpoint.
        manifest: Of it.
        head: Whose centers and states are filled.
        name: Of the head, if it is one of several.
        with_states: Without them, the centers alone are filled, and rounded to their format.
        begins: As of :func:`partialfc.checkpoint.loading.load`.
        compare: Whether checksums are compared.

    Raises:
        CheckpointError: If rows or states are missing, or have another format or shape.
    """
    head.optimizer.settle()
    filled = {"centers": head.centers.data, **(head.optimizer.states() if with_states else {})}
    if with_states and not begins:  # a stage begins with a search
        filled |= head.lists()
    head.loaded()
    done, owned = 0, head.owned_rows
    for first, file in files_with_rows(manifest, name, owned):
        with opened_file(path, manifest, file, compare=compare) as reader:
            if begins and AT_STEP not in reader.places:
                filled.pop(AT_STEP, None)
            complete(dict.fromkeys(filled), reader.places)
            rows = reader.places["centers"].shape[0]
            low, high = max(first, owned.start), min(first + rows, owned.stop)
            for tensor, into in filled.items():
                place = reader.places[tensor]
                if with_states and place.dtype != into.dtype:
                    raise CheckpointError(
                        f"{file}: {tensor} is {place.dtype}, and the settings want {into.dtype}"
                    )
                if place.shape[1:] != into.shape[1:]:
                    raise CheckpointError(
                        f"{file}: {tensor} is {[*place.shape]}, and {_setting_of(tensor, name)} of "
                        f"this run wants {[rows, *into.shape[1:]]}. Use the settings that it "
                        "was written with"
                    )
            if low < high:
                own = slice(low - owned.start, high - owned.start)
                reader.fill({key: (into[own], low - first) for key, into in filled.items()})
                done += high - low
    if done != len(owned):
        raise CheckpointError(f"it has {done} of the {len(owned)} rows of this rank")


def _setting_of(tensor: str, head: str) -> str:
    """The setting that the shape of a row follows from."""
    if tensor == "centers":
        return "backbone.embedding_dim"
    key = "nearest.neighbours" if tensor == LISTS else "optimizer"
    return f"{section_of_head(head)}.{key}"


def refuse_rows_behind(
    path: Path, manifest: Mapping[str, Any], head: PartialFC, name: str, *, compare: bool
) -> None:
    """Rows that moved unsampled must be up to date where from now on they do not.

    The last checkpoint of a stage has them so. That of a run which had ended, and to which a stage
    is added, may not. Each rank looks at the files that have its rows.
    """
    if AT_STEP in head.optimizer.states():
        return
    for _, file in files_with_rows(manifest, name, head.owned_rows):
        with opened_file(path, manifest, file, compare=compare) as reader:
            if AT_STEP not in reader.places:
                continue
            at_step = reader.read({AT_STEP: None})[AT_STEP]
        if at_step.min() != at_step.max():
            raise CheckpointError(
                "its class centers that were not sampled are not up to date, which the last "
                "checkpoint of a stage has. Make the stage before one step longer"
            )


def complete(expected: Collection[str], found: Any) -> Any:
    """Return what was found.

    Raises:
        CheckpointError: If it lacks a tensor that is expected.
    """
    if missing := sorted({*expected} - {*found}):
        raise CheckpointError(f"it lacks the tensor {', '.join(missing)}")
    return found
