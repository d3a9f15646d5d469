"""Embeddings of packs that were made beforehand, looked up by sample: mapped, never read whole.

``people.npy`` is fp32 [n, L]. ``people.origin.json`` beside it says which pack its rows are of, how
many images that has, and which of them have no row because they could not be used.

Shape suffixes: N = rows of a file, L = embedding, B = samples asked for, S = images without a row.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from partialfc.data.npy import mapped_array
from partialfc.data.packs.pack import Pack
from partialfc.errors import in_words
from partialfc.writing import read_text, write_json

if TYPE_CHECKING:  # they need Pillow, and who looks up embeddings none
    from partialfc.data.dataset import DataSet
    from partialfc.data.source import Source

_DTYPES = {"fp16": "<f2", "fp32": "<f4", "fp64": "<f8"}
_MOST_BYTES = 1 << 30
_LOOKED_AT = 1024
"""Rows of a file that its digest has: all of them would take minutes at every start."""


@dataclass(frozen=True, slots=True)
class Origin:
    """The pack that embeddings are of.

    Attributes:
        fingerprint: Of the pack.
        images: That it has.
        left_out: Image indices without a row, ascending.
    """

    fingerprint: str
    images: int
    left_out: tuple[int, ...]


def origin_path(path: Path) -> Path:
    """Return where an ``.npy`` says what its rows are of."""
    return path.with_suffix(".origin.json")


def write_origin(path: Path, origin: Origin | None) -> None:
    """Say it beside the ``.npy``; for ``None``, what a file before it said is removed."""
    if origin is None:
        origin_path(path).unlink(missing_ok=True)
        return
    values = {"fingerprint": origin.fingerprint, "images": origin.images}
    write_json(origin_path(path), {**values, "left_out": origin.left_out})


def read_origin(path: Path) -> Origin:
    """Return what an ``.npy`` is of.

    Raises:
        ValueError: If nothing sound says it; the message names the file.
        OSError: If it cannot be read.
    """
    beside = origin_path(path)
    try:
        found = json.loads(read_text(beside, most=_MOST_BYTES))
        origin = Origin(found["fingerprint"], found["images"], tuple(found["left_out"]))
    except FileNotFoundError:
        raise ValueError(
            f"{beside.name} is not beside it, which says of which pack it is. partialfc embed "
            "MODEL PACK.rec --out FILE.npy writes both."
        ) from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{beside.name} is damaged: {type(error).__name__}: {error}") from None
    left_out, numbers = origin.left_out, (origin.images, *origin.left_out)
    if not isinstance(origin.fingerprint, str) or any(type(one) is not int for one in numbers):
        raise ValueError(f"{beside.name} must have a fingerprint, and image numbers.")
    limits = (-1, *left_out, origin.images)
    if any(low >= high for low, high in pairwise(limits)):
        raise ValueError(f"{beside.name}: left_out must be images of the pack, ascending.")
    return origin


class Vectors:
    """The embeddings of all samples of a data set; memory is that of the pages looked at.

    Args:
        paths: An ``.npy`` for each pack, in the order of the packs.
        dataset: Of the samples.

    Raises:
        ValueError: If a file is none, damaged, not of its pack, or lacks a sample; the message
            names it.
        OSError: If it cannot be read.
    """

    def __init__(self, paths: Sequence[Path], dataset: "DataSet") -> None:
        if len(paths) != len(dataset.packs):
            raise ValueError(
                f"{len(paths)} files of embeddings for the {len(dataset.packs)} packs of "
                "data.train; give one for each, in the same order."
            )
        self._dataset = dataset
        self._parts = [_Part.of(*pair) for pair in zip(paths, dataset.packs, strict=True)]
        for number, part in enumerate(self._parts):
            part.refuse_missing(dataset.skipped_of(number))
        widths = {part.row_NL.shape[1] for part in self._parts}
        if len(widths) > 1:
            raise ValueError(
                f"{', '.join(map(str, paths))}: their embeddings have {sorted(widths)} numbers; "
                "all must be of one model."
            )
        (self.dim,) = widths

    @property
    def digest(self) -> str:
        """16 hexadecimal digits of the packs, the sizes and rows spread over all files."""
        digest = hashlib.blake2b(digest_size=8)
        for part in self._parts:
            digest.update(f"{part.origin.fingerprint} {part.row_NL.shape}".encode())
            digest.update(spread_over(part.row_NL))
        return digest.hexdigest()

    def of(self, sample_id_B: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return the embeddings [B, L] of samples: a copy."""
        pack_B, image_B = self._dataset.places(sample_id_B)
        found_BL = np.empty((len(image_B), self.dim), np.float32)
        for number in np.unique(pack_B).tolist():
            of_pack_B = pack_B == number
            found_BL[of_pack_B] = self._parts[number].of_images(image_B[of_pack_B])
        return found_BL


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    """The rows of one pack."""

    path: Path
    row_NL: NDArray[np.float32]
    origin: Origin
    left_out_S: NDArray[np.int64]

    @classmethod
    def of(cls, path: Path, pack: "Source") -> "_Part":
        try:
            row_NL, origin = mapped(path), read_origin(path)
        except ValueError as error:
            raise ValueError(f"{path}: {in_words(error)}") from None
        if not isinstance(pack, Pack) or (pack.fingerprint, len(pack)) != (
            origin.fingerprint,
            origin.images,
        ):
            raise ValueError(
                f"{path}: its embeddings are of a pack of {origin.images:,} images with the "
                f"fingerprint {origin.fingerprint}, and {pack.path} of data.train has "
                f"{len(pack):,} and {pack.fingerprint}. Embed {pack.path.name} anew."
            )
        if len(row_NL) + len(origin.left_out) != len(pack):
            raise ValueError(
                f"{path}: {len(row_NL):,} rows, and {len(origin.left_out):,} left out, of "
                f"{len(pack):,} images: the file is another one than {origin_path(path).name} was "
                "written for. Embed anew."
            )
        return cls(path, row_NL, origin, np.asarray(origin.left_out, np.int64))

    def refuse_missing(self, skipped: NDArray[np.int64]) -> None:
        """Refuse images without a row, but for those that are no samples."""
        missing = np.setdiff1d(self.left_out_S, skipped)
        if len(missing):
            others = f" and {len(missing) - 1:,} others" if len(missing) > 1 else ""
            raise ValueError(
                f"{self.path}: it has no embedding of image {missing[0]}{others}, which partialfc "
                f"embed could not use. Leave {'them' if others else 'it'} out with data.skip."
            )

    def of_images(self, image_B: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return the rows [B, L] of images of the pack."""
        before_B = np.searchsorted(self.left_out_S, image_B)
        return np.asarray(self.row_NL[image_B - before_B])


def spread_over(row_NL: NDArray[Any]) -> bytes:
    """Return the bytes of some rows, evenly from the first to the last: enough to tell files."""
    chosen = np.linspace(0, len(row_NL) - 1, _LOOKED_AT).astype(np.int64)
    return row_NL[np.unique(chosen)].tobytes()


def mapped(path: Path, formats: Sequence[str] = ("fp32",)) -> NDArray[Any]:
    """Return an ``.npy`` of rows [N, L], mapped; the file is as long as its header says.

    Args:
        path: Of embeddings, or of other vectors.
        formats: That its numbers may have: fp16, fp32, fp64.

    Raises:
        ValueError: If it is another array, or none.
        OSError: If it cannot be read.
    """
    row_NL = mapped_array(path)
    allowed = [np.dtype(_DTYPES[name]) for name in formats]
    if row_NL.ndim != 2 or row_NL.dtype not in allowed:
        raise ValueError(
            f"holds {row_NL.dtype} {list(row_NL.shape)}, must be {' or '.join(formats)} "
            "[rows, embedding], row by row."
        )
    return row_NL
