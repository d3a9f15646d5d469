"""Embeddings of held-out images on all ranks, and the protocols' numbers from them.

Shape suffixes: N = images of a set, D = embedding.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from torch import Tensor

from partialfc.config import Config, ConfigError
from partialfc.data.packs.pack import Pack, open_pack
from partialfc.data.sets.pairs import Image, Pairs, read_pairs
from partialfc.errors import in_words
from partialfc.evaluation.arrays import HeldOut, open_held_out
from partialfc.evaluation.embedding import embed_images, embed_tensors
from partialfc.model.batch_norm import with_mean_statistics
from partialfc.model.build import Model
from partialfc.model.fsdp import free_gathered
from partialfc.protocols import unit_rows
from partialfc.protocols.identification import Identification, first_of_each, rank_k
from partialfc.protocols.verification import Verification, verify
from partialfc.runtime.process import Runtime

Opened = TypeVar("Opened")

_FOLDS = 10


@dataclass(frozen=True, slots=True, eq=False)
class Verified:
    """The numbers of one verification set, and what its pictures need.

    Attributes:
        numbers: Of the protocol.
        cosine: Of every pair.
        same: The truth of every pair.
    """

    numbers: Verification
    cosine: np.ndarray
    same: np.ndarray


@dataclass(frozen=True, slots=True)
class Results:
    """The numbers of all sets, by the name of their file, in the order of the settings."""

    verified: dict[str, Verified]
    identified: dict[str, Identification]

    def headline(self) -> dict[str, float]:
        """The first sets' numbers, as :data:`partialfc.records.metrics.TABLE` names them."""
        values = {}
        for verified in list(self.verified.values())[:1]:
            values["verification_accuracy"] = verified.numbers.accuracy
            values["verification_tar"] = verified.numbers.tar_at_far[1e-3]
        for identified in list(self.identified.values())[:1]:
            values["identification_rank_1"] = identified.rate[1]
        return values


class Evaluation:
    """The held-out sets of a run, open, and how a model is measured on them.

    An embedding is the sum of those of an image and, with ``verification.flip``, its mirror image.

    Raises:
        ConfigError: If a set cannot be opened; the message names it.
    """

    def __init__(self, config: Config, runtime: Runtime) -> None:
        self._config, self._runtime = config, runtime
        sets = config.verification
        self._pairs = _open("verification.pairs", sets.pairs, open_pairs)
        self._packs: dict[str, Pack] = {}
        self._arrays: dict[str, HeldOut] = {}
        key = "verification.identification"
        if (shape := config.data.shape) is not None:
            self._arrays = _open(key, sets.identification, lambda path: open_held_out(path, shape))
        else:
            self._packs = _open(key, sets.identification, _with_probes)

    def measure(self, model: Model) -> Results:
        """Measure a model on all sets. Collective: one all-gather for each set.

        The same on all ranks: with the mean of their BatchNorm statistics; and of the average of
        the weights, where the run keeps one.
        """
        with model.measured(), with_mean_statistics(model.backbone, self._runtime.ranks):
            return self._measure(model)

    def _measure(self, model: Model) -> Results:
        verified, identified = {}, {}
        for name, pairs in self._pairs.items():
            images = pairs.images
            embeddings_ND = self.embed(model, name, len(images), images.__getitem__)
            unit_ND = unit_rows(embeddings_ND, name)
            cosine = (unit_ND[0::2] * unit_ND[1::2]).sum(1)
            verified[name] = Verified(verify(embeddings_ND, pairs.same), cosine, pairs.same)
        for name, pack in self._packs.items():
            identity_N = pack.identities(np.arange(len(pack)))
            embeddings_ND = self.embed(model, name, len(pack), pack.jpeg)
            identified[name] = _identified(embeddings_ND, identity_N)
        for name, held in self._arrays.items():
            embeddings_ND = self._of_tensors(model, name, len(held.file), held.sample)
            identified[name] = _identified(embeddings_ND, held.identity_N)
        return Results(verified, identified)

    def embed(
        self, model: Model, name: str, count: int, image: Callable[[int], Image]
    ) -> np.ndarray:
        """Return fp64 embeddings [count, D] in order, on every rank. Collective: one all-gather.

        Args:
            model: Its backbone is in training mode afterwards.
            name: Of the set, for errors.
            count: Images.
            image: Returns image i: RGB uint8 [H, W, 3], or a JPEG's or PNG's bytes.

        Raises:
            ConfigError: If the run is on arrays.
            DataError: If an image cannot be decoded.
        """
        if self._config.data.kind == "arrays":
            raise ConfigError(
                f"{name}: images, and this run is on arrays, which its backbone takes."
            )
        model.backbone.eval()
        embeddings_ND = embed_images(
            lambda images: model.embed(images, model.backbone),
            name,
            count,
            image,
            self._runtime,
            size=self._config.data.image_size,
            flip=self._config.verification.flip,
            batch=self._config.verification.batch,
            threads=self._config.data.threads,
        )
        return _trains_again(model, embeddings_ND)

    def _of_tensors(
        self, model: Model, name: str, count: int, sample: Callable[[int], Tensor]
    ) -> np.ndarray:
        """As :meth:`embed`, of arrays."""
        model.backbone.eval()
        embeddings_ND = embed_tensors(
            lambda samples: model.embed(samples, model.backbone),
            name,
            count,
            sample,
            self._runtime,
            flip=False,
            batch=self._config.verification.batch,
            threads=self._config.data.threads,
        )
        return _trains_again(model, embeddings_ND)


def _trains_again(model: Model, embeddings_ND: np.ndarray) -> np.ndarray:
    model.train()
    if model.shards:
        free_gathered(model.backbone)
    return embeddings_ND


def _identified(embeddings_ND: np.ndarray, identity_N: np.ndarray) -> Identification:
    """The first of each identity is the gallery, the others are probes."""
    gallery, probes = first_of_each(identity_N)
    return rank_k(
        embeddings_ND[gallery], identity_N[gallery], embeddings_ND[probes], identity_N[probes]
    )


def open_pairs(path: Path) -> Pairs:
    """Return a set that ten-fold verification can measure.

    Raises:
        ValueError: If it is none: it has fewer than ten pairs, or all are of one kind.
        OSError: If it cannot be read.
    """
    pairs = read_pairs(path)
    require_folds(pairs.same)
    return pairs


def require_folds(same: np.ndarray) -> None:
    """Raise ValueError for pairs, bool [n], that ten-fold verification cannot measure."""
    if len(same) < _FOLDS or same.all() or not same.any():
        raise ValueError(
            f"{len(same)} pairs, {int(same.sum())} of them of one identity: ten-fold "
            f"verification needs at least {_FOLDS}, and both kinds"
        )


def _with_probes(path: Path) -> Pack:
    pack = open_pack(path)
    _, probes = first_of_each(pack.identities(np.arange(len(pack))))
    if not len(probes):
        raise ValueError("no identity has a second image, so nothing can be searched for")
    return pack


def _open(key: str, paths: tuple[Path, ...], opener: Callable[[Path], Opened]) -> dict[str, Opened]:
    opened: dict[str, Opened] = {}
    for path in paths:
        try:
            opened[path.stem] = opener(path)
        except (OSError, ValueError) as error:
            said = in_words(error).removeprefix(f"{path}: ")
            raise ConfigError(f"{key}: {path}: {said}") from error
    return opened
