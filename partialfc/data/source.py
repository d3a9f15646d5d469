"""What a data set is made of: packs, images in files of their own, and tar shards.

Shape suffix: N = images of the source.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from partialfc.data.files.image_files import ImageFiles, open_image_files
from partialfc.data.files.index import NO_FILE
from partialfc.data.packs.labels import labels, labels_fingerprint
from partialfc.data.packs.pack import Pack, open_pack
from partialfc.data.tars.places import are_tars
from partialfc.data.tars.tar_images import TarImages, open_tar_images
from partialfc.definitions import plugins
from partialfc.definitions.urls import url_of

Source: TypeAlias = Pack | ImageFiles | TarImages
"""Images by index, with their identities and bytes."""


def open_source(path: Path) -> Source:
    """Open a ``.rec``, a folder with a folder of images for each identity, a list, or shards.

    Shards are one or several ``.tar``, a folder of them, or what is at a URL.

    Raises:
        ValueError: If it breaks a rule.
        OSError: If it cannot be read.
    """
    if are_tars(path):
        return open_tar_images(path)
    if plugins.place_of(path.name) and not path.exists():
        raise ValueError(
            f"{path.name}: images are not read by a plug-in: their order, their checks and both "
            "loaders know packs and files. Write them into a pack, with partialfc pack or with "
            "partialfc.data.packs.writer."
        )
    is_pack = path.suffix == ".rec" and not path.is_dir()
    return open_pack(path) if is_pack else open_image_files(path)


def labels_of(source: Source) -> NDArray[np.int32]:
    """Return the identities [N] of all images; see :func:`~partialfc.data.packs.labels.labels`."""
    return labels(source) if isinstance(source, Pack) else source.index.identity_N


def labels_fingerprint_of(source: Source) -> str:
    """Return 16 hexadecimal digits, a function of the identities of the images.

    See :func:`~partialfc.data.packs.labels.labels_fingerprint`; that of files is in their own.
    """
    return labels_fingerprint(source) if isinstance(source, Pack) else source.fingerprint


def files_of(source: Source) -> Iterator[Path]:
    """Yield the files that the images are in, those that are there; none at a URL."""
    if not isinstance(source, ImageFiles | TarImages):  # one file, also of arrays
        yield source.path
        return
    if isinstance(source, TarImages):
        if url_of(source.path) is None:
            yield from map(Path, source.index.shards)
        return
    for image in np.flatnonzero(source.index.size_N != NO_FILE).tolist():
        yield source.root / source.index.name(image)
