"""What the class centers of a new run begin with: ``head.start``.

Any number of ranks gets the same bits: a row is a function of the file's row alone, or of the mean
of embeddings that are summed in the order of the samples.

Shape suffixes: C = identities of this rank, D = embedding, n = samples, rows or pairs of a sample
and an identity at hand.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress

from partialfc.checkpoint.center_file import open_centers
from partialfc.checkpoint.trained_backbone import is_start
from partialfc.config import Config, ConfigError
from partialfc.config.heads import each_head, section_of_head
from partialfc.data.dataset import DataSet
from partialfc.definitions.phrases import to_value
from partialfc.distributed.agreement import total, words_of_any
from partialfc.distributed.ranks import moved, sum_over_ranks
from partialfc.errors import in_words
from partialfc.evaluation.means import Reading
from partialfc.evaluation.sets import Evaluation
from partialfc.head import PartialFC
from partialfc.head.centers import begin_at_
from partialfc.head.rows.staging import host_tensor
from partialfc.model.build import Model
from partialfc.runtime.process import Runtime

_SAMPLES = 4096
"""Embedded at once; a constant, so that sums are the same on any number of ranks."""
_ROWS = 4096

Pieces = Iterator[tuple[int, NDArray[np.float64]]]
"""The first identity of some that follow one another, and their directions [n, D]."""


def refuse_two_starts(config: Config) -> None:
    """Refuse ``head.start`` beside a ``run.start_from`` that has class centers, too.

    Raises:
        ConfigError: If it is so.
    """
    place = config.run.start_from
    for name, one in each_head(config).items():
        if one.head.start != "random" and place is not None and is_start(place):
            key = f"{section_of_head(name)}.start"
            raise ConfigError(
                f"{key} = {to_value(one.head.start)} with run.start_from = {to_value(place)}: "
                f"that folder has class centers, of added identities too. Remove {key}, or name "
                "the run itself, for its backbone alone."
            )


def begin_centers(
    config: Config, runtime: Runtime, model: Model, dataset: DataSet, evaluation: Evaluation
) -> None:
    """Put what ``head.start`` names into the centers of a new run, head by head. Collective.

    Memory: a piece of the file; for the mean of images, fp32 rows of this rank's identities.

    Args:
        config: Of the run.
        runtime: This rank.
        model: With the backbone that the run begins with.
        dataset: What it trains on.
        evaluation: Embeds.

    Raises:
        ConfigError: If the file does not fit, is damaged or has a number that is not finite.
    """
    for name, one in each_head(config).items():
        if one.head.start != "random":
            _begin(one, runtime, model, name, dataset, evaluation)


def _begin(
    config: Config,
    runtime: Runtime,
    model: Model,
    name: str,
    dataset: DataSet,
    evaluation: Evaluation,
) -> None:
    """Of the head of a name, whose settings are ``config.head``."""
    settings, head = config.head, model.heads[name]
    key = f"{section_of_head(name)}.start"
    if settings.start_file is None:
        pieces = _means(config, runtime, model, name, dataset, evaluation)
    else:
        pieces = _rows(settings.start_file, head)
    without, problem = 0, ""
    try:
        head.optimizer.settle()
        for first, direction_nD in pieces:
            without += begin_at_(
                head.centers.data,
                head.owned,
                first,
                direction_nD,
                states=head.optimizer.states(),
                per_identity=head.centers_per_identity,
            )
    except (OSError, ValueError) as error:
        problem = in_words(error)
    if problem := words_of_any(problem, runtime.ranks):
        raise ConfigError(f"{key} = {to_value(settings.start)}: {problem}")
    without = total(without, head.copies.within)
    if runtime.leads:
        count = head.sharding.num_identities
        others = f"; {without:,} without one stay random" if without else ""
        print(
            f"class centers{name and f' of {name}'} begin at {settings.start}: "
            f"{count - without:,} of {count:,}{others}",
            flush=True,
        )


def _rows(path: Path, head: PartialFC) -> Pieces:
    file = open_centers(path, head.sharding.num_identities, head.embedding_dim)
    for start in range(head.owned.start, head.owned.stop, file.piece):
        yield start, file.rows(start, min(start + file.piece, head.owned.stop))


def _means(
    config: Config,
    runtime: Runtime,
    model: Model,
    name: str,
    dataset: DataSet,
    evaluation: Evaluation,
) -> Pieces:
    """The sums of unit embeddings of each own identity. Collective, before the first piece.

    Two collectives for every ``_SAMPLES`` images. What cannot be decoded is left out.
    """
    head, unusable = model.heads[name], 0
    owned = head.owned
    size = len(owned), head.embedding_dim
    problem = ""
    try:
        sum_CD = host_tensor("start", size, torch.float32, config.head.host_folder, pinned=False)
    except OSError as error:
        problem = in_words(error)
    if problem := words_of_any(problem, runtime.ranks):  # before others wait in a collective
        raise ValueError(problem)
    with Progress(console=Console(stderr=True), disable=not runtime.leads) as bar:
        task = bar.add_task("class centers: embedding", total=len(dataset))
        for start in range(0, len(dataset), _SAMPLES):
            sample_n = np.arange(start, min(start + _SAMPLES, len(dataset)))
            bar.advance(task, len(sample_n))
            moved()
            of_n, of_run_n, weight_n = _pairs(dataset, sample_n)
            identity_n = model.heads.numbered(name, torch.from_numpy(of_run_n)).numpy()
            if not ((identity_n >= 0) & (identity_n < head.sharding.num_identities)).any():
                continue  # all are of other heads
            dataset.will_need(sample_n)
            reading = Reading(dataset.jpeg_view, sample_n, config.data.image_size)
            row_nD = evaluation.embed(model, dataset.name, len(sample_n), reading)
            times_n = torch.from_numpy(reading.bad_n).to(runtime.device, torch.int32)
            bad_n = sum_over_ranks(times_n, runtime.ranks).cpu().numpy() > 0
            unusable += int(bad_n.sum())
            unit_nD = _unit(row_nD)
            own_n = ~bad_n[of_n] & (identity_n >= owned.start) & (identity_n < owned.stop)
            at_n = torch.from_numpy(identity_n[own_n] - owned.start)
            own_nD = unit_nD[of_n[own_n]] * weight_n[own_n, None]
            sum_CD.index_add_(0, at_n, torch.from_numpy(own_nD))
    if unusable and runtime.leads:
        print(f"warning: head.start: {unusable:,} images cannot be used, and count in no mean.")
    for start in range(0, len(owned), _ROWS):
        yield owned.start + start, sum_CD[start : start + _ROWS].double().numpy()


def _unit(row_nD: NDArray[np.float64]) -> NDArray[np.float32]:
    """Rows divided by their lengths; one of zeros stays."""
    length_n1 = np.linalg.norm(row_nD, axis=1, keepdims=True)
    return np.asarray(row_nD / np.where(length_n1 == 0, 1, length_n1), np.float32)


def _pairs(
    dataset: DataSet, sample_n: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """Places in ``sample_n``, the identities of these samples, and what each pair counts for.

    In the order of the samples. An identity that a sample names twice counts once, and its weights
    are added.
    """
    try:
        identities = dataset.identities(sample_n)
    except ValueError:  # a record is damaged
        if len(sample_n) == 1:
            raise
        return _pairs_one_by_one(dataset, sample_n)
    of_n = np.repeat(np.arange(len(sample_n)), identities.size // len(sample_n))
    pair_n2 = np.stack([of_n, identities.ravel()], axis=1)
    weights = dataset.weights(sample_n)
    if weights is not None:
        return pair_n2[:, 0], pair_n2[:, 1], weights.ravel()
    if identities.ndim > 1:
        pair_n2 = np.unique(pair_n2, axis=0)
    return pair_n2[:, 0], pair_n2[:, 1], np.ones(len(pair_n2), np.float32)


def _pairs_one_by_one(
    dataset: DataSet, sample_n: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """The same where records are damaged: their samples have no pair."""
    found = []
    for place in range(len(sample_n)):
        try:
            of_1, identity, weight = _pairs(dataset, sample_n[place : place + 1])
        except ValueError:
            continue
        found.append((of_1 + place, identity, weight))
    if not found:
        return np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32)
    of_n, identity_n, weight_n = map(np.concatenate, zip(*found, strict=True))
    return of_n, identity_n, weight_n
