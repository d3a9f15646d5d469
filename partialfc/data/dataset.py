"""The images that a run trains on: those of packs, folders, lists and shards, but the skipped.

Packs stands for all of them.

Shape suffixes: N = samples of the data set, B = images asked for, P = packs, S = skipped images,
C = identities of a pack.
"""

import hashlib
import warnings
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from partialfc.data.files.image_files import ImageFiles
from partialfc.data.label_file import LabelFile
from partialfc.data.packs.labels import BAD
from partialfc.data.packs.recordio import RecordError
from partialfc.data.skip_list import BadRecord, read_skip_lists
from partialfc.data.source import Source, labels_fingerprint_of, labels_of, open_source
from partialfc.data.tars.tar_images import TarImages
from partialfc.definitions.urls import shown

T = TypeVar("T")

_CHUNK = 1 << 20
_AT_ONCE = 256


def open_dataset(
    packs: Sequence[Path],
    skip: Sequence[Path] = (),
    *,
    labels: Path | None = None,
    weights: Path | None = None,
    num_identities: int | None = None,
) -> "DataSet":
    """Open packs as one data set.

    Args:
        packs: ``.rec`` files, folders of folders, lists and tar shards, in the order of their
            identities.
        skip: Lists of images that are left out; see :mod:`partialfc.data.skip_list`.
        labels: Whom the images show, instead of what the packs say; see
            :mod:`partialfc.data.label_file`.
        weights: Of these labels.
        num_identities: Of these labels; left out, it follows from them.

    Raises:
        ValueError: If a pack, a list or a label breaks a rule, or no image is left.
        OSError: If a file cannot be read.
    """
    opened = [open_source(path) for path in packs]
    own = None
    if labels is not None:
        images = sum(map(len, opened))
        own = LabelFile(labels, images, weights=weights, num_identities=num_identities)
    return DataSet(opened, read_skip_lists(skip, opened) if skip else None, own)


class Part(NamedTuple):
    """A set within a data set.

    Attributes:
        name: "" where it is the only one and has none.
        samples: Those of its images.
        identities: Those that are its own: the people whom no set before it has.
        most: As of :class:`DataSet`.
    """

    name: str
    samples: range
    identities: range
    most: int | None


def most_of(found: Sequence[int | None]) -> int | None:
    """Return K of data sets together, each as :attr:`DataSet.most`."""
    return max(one or 1 for one in found) if any(found) else None


class DataSet:
    """The samples 0...N-1 of several packs, one pack after the other.

    Identities of a pack follow those of the packs before it. Memory is that of the packs, and 16
    bytes for each skipped image.

    Args:
        packs: At least one.
        skipped: Sorted image indices of each pack that are no samples.
        own_labels: Whom the images show, if not whom the packs say.

    Raises:
        ValueError: If a pack comes twice, or no image is left.
    """

    def __init__(
        self,
        packs: Sequence[Source],
        skipped: Sequence[NDArray[np.int64]] | None = None,
        own_labels: LabelFile | None = None,
    ) -> None:
        self.packs, self.own_labels = tuple(packs), own_labels
        prints = [pack.fingerprint for pack in self.packs]
        for pack, print_ in zip(self.packs, prints, strict=True):
            if prints.count(print_) > 1:
                raise ValueError(
                    f"{shown(pack.path)}: it is among the packs twice (fingerprint {print_}), so "
                    f"its identities would be two each. Name it once."
                )
        self._start_P = np.cumsum([0, *map(len, self.packs)])
        skipped = skipped or [np.empty(0, np.int64)] * len(self.packs)
        pairs = zip(skipped, self._start_P, strict=False)
        self._skipped_S = np.concatenate([images + start for images, start in pairs])
        # Samples up to skipped[s] - s stand before s skipped images, all later ones after them.
        self._before_S = self._skipped_S - np.arange(len(self._skipped_S))
        if not len(self):
            raise ValueError(f"{self.name}: all {self._start_P[-1]} images are skipped.")

    def __len__(self) -> int:
        return int(self._start_P[-1]) - len(self._skipped_S)

    @property
    def name(self) -> str:
        """Of the packs, for messages."""
        return ", ".join(shown(pack.path) for pack in self.packs)

    @property
    def num_skipped(self) -> int:
        """Images of the packs that are no samples."""
        return len(self._skipped_S)

    def skipped_of(self, number: int) -> NDArray[np.int64]:
        """Return the image indices of a pack that are no samples, ascending."""
        start, stop = self._start_P[number : number + 2]
        first, last = np.searchsorted(self._skipped_S, (start, stop))
        skipped: NDArray[np.int64] = self._skipped_S[first:last] - start
        return skipped

    @cached_property
    def _identity_start_P(self) -> NDArray[np.int64]:
        if self.own_labels is not None:  # nobody asks for those of the packs
            return np.zeros(len(self.packs) + 1, np.int64)
        return np.cumsum([0, *(self._identities_of(i) for i in range(len(self.packs)))])

    @property
    def num_identities(self) -> int:
        """Number of identities C of all packs; those without a sample count."""
        if self.own_labels is not None:
            return self.own_labels.num_identities
        return int(self._identity_start_P[-1])

    @property
    def parts(self) -> tuple[Part, ...]:
        """The sets that the samples are of: one, unless it is a
        :class:`~partialfc.data.joined.JoinedSets`."""
        return (Part("", range(len(self)), range(self.num_identities), self.most),)

    def by_identity(self, of_packs: list[T]) -> list[T]:
        """Return what the packs say of their identities, one after the other, by identity [C]."""
        return of_packs

    @cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits, a function of the packs' and of the skipped images."""
        prints = [pack.fingerprint for pack in self.packs]
        if len(prints) == 1 and not self.num_skipped:
            return prints[0]
        digest = hashlib.blake2b(" ".join(prints).encode(), digest_size=8)
        digest.update(self._skipped_S.astype("<i8").tobytes())
        return digest.hexdigest()

    @cached_property
    def labels_fingerprint(self) -> str:
        """16 hexadecimal digits of the identities of the images, which ``fingerprint`` has not."""
        if self.own_labels is not None:
            return self.own_labels.digest
        prints = [labels_fingerprint_of(pack) for pack in self.packs]
        return hashlib.blake2b(" ".join(prints).encode(), digest_size=8).hexdigest()

    def locate(self, sample: int) -> tuple[Source, int]:
        """Return the pack of a sample and its image index there."""
        pack_B, image_B = self.places(np.asarray([sample], np.int64))
        return self.packs[int(pack_B[0])], int(image_B[0])

    def bad(self, sample: int, problem: str) -> tuple[Source, BadRecord]:
        """Return the pack of a sample, and that its record has a problem."""
        pack, image = self.locate(sample)
        return pack, BadRecord.of(pack, image, problem)

    def jpeg(self, sample: int) -> bytes:
        """Return a copy of the JPEG bytes of one sample."""
        return self.jpeg_view(sample).tobytes()

    def jpegs(self, sample_B: NDArray[np.int64]) -> Iterator[bytes]:
        """Yield copies of the JPEG bytes of samples [B] in turn, asked for some time before."""
        for start in range(0, len(sample_B), _AT_ONCE):
            self.will_need(sample_B[start : start + 2 * _AT_ONCE])
            yield from map(self.jpeg, sample_B[start : start + _AT_ONCE].tolist())

    def jpeg_view(self, sample: int) -> NDArray[np.uint8]:
        """Return the JPEG bytes of one sample as
        :meth:`~partialfc.data.packs.pack.Pack.jpeg_view`."""
        pack, image = self.locate(sample)
        return pack.jpeg_view(image)

    @cached_property
    def is_far(self) -> bool:
        """Whether images are at a URL: those of batches to come should be asked for now."""
        return any(isinstance(pack, TarImages) and pack.is_far for pack in self.packs)

    def will_need(self, samples: NDArray[np.int64], stretch: int = 1) -> None:
        """Begin to read samples [B], those of packs and of tar shards.

        See :meth:`~partialfc.data.packs.pack.Pack.will_need`.
        """
        pack_B, image_B = self.places(samples)
        for number in np.unique(pack_B).tolist():
            pack = self.packs[number]
            if not isinstance(pack, ImageFiles):
                pack.will_need(image_B[pack_B == number], stretch)

    def records(self, samples: NDArray[np.int64]) -> Iterator[tuple[int, NDArray[np.uint8]] | str]:
        """Yield identity and JPEG bytes of each sample [B], or what is wrong with its record."""
        pack_B, image_B = self.places(samples)
        starts = self._identity_start_P.tolist()
        for number, image in zip(pack_B.tolist(), image_B.tolist(), strict=True):
            try:
                identity, jpeg = self.packs[number].record(image)
            except RecordError as error:
                yield error.problem
            else:
                yield starts[number] + identity, jpeg

    def identities(self, samples: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the identities [B] of samples [B], in [0, num_identities).

        With labels of one's own, [B, K] of several; see :class:`LabelFile`.
        """
        if self.own_labels is not None:
            return self.own_labels.identities(self._images(np.asarray(samples, np.int64)))
        pack_B, image_B = self.places(np.asarray(samples, np.int64))
        identity_B = np.empty(len(image_B), np.int64)
        for number in np.unique(pack_B).tolist():
            of_pack_B = pack_B == number
            identity_B[of_pack_B] = self.packs[number].identities(image_B[of_pack_B])
        return identity_B + self._identity_start_P[pack_B]

    def labels(self) -> NDArray[np.int64]:
        """Return the identities [N] of all samples; see
        :func:`~partialfc.data.packs.labels.labels`.

        Raises:
            RecordError: If the record of a sample breaks a rule.
            ValueError: If a sample may have several identities, or none.
        """
        if (own := self.own_labels) is not None:
            if own.several:
                raise ValueError(
                    f"{own.path}: an image may have several identities or none, and each must have "
                    "one to be drawn by its identity. Remove data.images_per_identity."
                )
            return self.identities(np.arange(len(self)))
        starts = self._identity_start_P[:-1].tolist()
        of_packs = [self._labels_of(number) for number in range(len(self.packs))]
        return np.concatenate(
            [label_N + np.int64(s) for label_N, s in zip(of_packs, starts, strict=True)]
        )

    def weights(self, samples: NDArray[np.int64]) -> NDArray[np.float32] | None:
        """Return what each of :meth:`identities` counts for; ``None`` where nobody says so."""
        return None if self.own_labels is None else self.own_labels.weights(self._images(samples))

    @property
    def labelled(self) -> bool:
        """Whether the identities are not those of the packs."""
        return self.own_labels is not None

    @property
    def most(self) -> int | None:
        """K, the most identities of a sample; ``None`` where each has one and no weight."""
        own = self.own_labels
        return own.most if own is not None and own.several else None

    def places(self, sample_B: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the numbers of the packs of samples [B], and their image indices there."""
        image_B = self._images(sample_B)
        pack_B = np.searchsorted(self._start_P, image_B, side="right") - 1
        return pack_B, image_B - self._start_P[pack_B]

    def _images(self, sample_B: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return where samples [B] stand among the images of all packs, the skipped ones too."""
        wrong = np.flatnonzero((sample_B < 0) | (sample_B >= len(self)))
        if len(wrong):
            raise IndexError(f"{self.name}: sample {sample_B[wrong[0]]} not in [0, {len(self)}).")
        image_B: NDArray[np.int64] = sample_B + np.searchsorted(
            self._before_S, sample_B, side="right"
        )
        return image_B

    def _identities_of(self, number: int) -> int:
        """Of one pack; a plain one has those of its samples, as skipped images may be damaged."""
        declared = self.packs[number].declared_identities
        if declared:
            return declared
        label_N = self._labels_of(number)
        has_images_C = np.zeros(int(label_N.max(initial=-1)) + 1, np.bool_)
        for start in range(0, len(label_N), _CHUNK):
            has_images_C[label_N[start : start + _CHUNK]] = True
        if not has_images_C.all():
            warnings.warn(
                f"{self.packs[number].path}: {(~has_images_C).sum():,} of its labels "
                f"0...{len(has_images_C) - 1} have no image, and count as identities. partialfc "
                f"convert pack numbers the others without gaps.",
                stacklevel=2,
            )
        return len(has_images_C)

    def _labels_of(self, number: int) -> NDArray[np.int32]:
        """Identities of the samples of one pack, numbered as there."""
        pack = self.packs[number]
        start, stop = self._start_P[number : number + 2]
        skipped = self._skipped_S[(self._skipped_S >= start) & (self._skipped_S < stop)] - start
        label_N = labels_of(pack)
        if len(skipped):
            label_N = np.delete(label_N, skipped)
        wrong = np.flatnonzero(label_N == BAD)
        if len(wrong):
            pack.identities(np.delete(np.arange(len(pack)), skipped)[wrong[:1]])  # says why
        return label_N
