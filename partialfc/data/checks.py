"""What can be wrong with a pack, in levels that cost more and more.

The index alone; the header of every record; the labels together; images, decoded. The functions
check some records each, so that many run at once; ``partialfc validate`` does that.

Shape suffixes: M = records of the pack, N = some of them, C = identities.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from partialfc.data.images.formats import check_image as frame_of
from partialfc.data.images.formats import decode_image
from partialfc.data.packs.pack import Pack
from partialfc.data.packs.recordio import LABEL_LIMIT, RecordError
from partialfc.data.skip_list import BadRecord
from partialfc.data.source import Source
from partialfc.data.tars.store import ShardError

_SIDE = 112


class HeadersChecked(NamedTuple):
    """The bad ones among some records, and the labels of the good images."""

    bad: list[BadRecord]
    identity_N: NDArray[np.int64]


class ImageChecked(NamedTuple):
    """What one image is: its problem or "", and if it could be decoded its RGB pixels and its size.

    The pixels of a photo that is larger than loaders take are fewer than its size (height, width).
    """

    problem: str
    pixels: NDArray[np.uint8] | None = None
    size: tuple[int, int] | None = None


def check_index(pack: Pack) -> list[BadRecord]:
    """Return where the file does not begin or end with a record; in which order they lie is free.

    Opening the pack has found keys and offsets that come twice, are not aligned or lie outside.
    """
    offset_M, bad = pack.index.offset_M, []
    first, last = int(np.argmin(offset_M)), int(np.argmax(offset_M))
    if offset_M[first] != 0:
        bad.append(_record(pack, first, "the first record must be at offset 0"))
    try:
        end = pack.file.next_offset(int(offset_M[last]))
    except RecordError as error:
        bad.append(_record(pack, last, error.problem))
    else:
        if end != pack.file.size:
            rest = pack.file.size - end
            bad.append(_record(pack, last, f"{rest} bytes follow the last record, must be none"))
    return bad


def check_headers(pack: Pack, at_N: NDArray[np.int64]) -> HeadersChecked:
    """Check the headers of records [N], places in [M]: their magic, parts, length and label.

    The length must be that of the gap to the record that follows in the file.
    """
    offset_N = pack.index.offset_M[at_N]
    end_N = pack.index.stops(at_N, pack.file.size)
    whole_N = pack.file.whole(offset_N, end_N)
    bad: list[BadRecord] = []
    sound_N = whole_N.copy()
    for i in np.flatnonzero(~whole_N).tolist():
        problem = _problem(pack, int(offset_N[i]), int(end_N[i]))
        if problem:
            bad.append(_record(pack, int(at_N[i]), problem))
        sound_N[i] = not problem
    is_image_N = (at_N >= pack.images.start) & (at_N < pack.images.stop)
    images = np.flatnonzero(sound_N & is_image_N)
    headers = pack.file.headers(offset_N[images])
    label_N, filled_N = headers.label_N, headers.image_bytes_N > 0
    limit = min(pack.declared_identities or LABEL_LIMIT, LABEL_LIMIT)
    right_N = (label_N >= 0) & (label_N < limit) & (label_N == np.floor(label_N))
    for i in np.flatnonzero(~(right_N & filled_N)).tolist():
        problem = f"label {label_N[i]:.9g} must be a whole number in [0, {limit})"
        place = int(at_N[images[i]])
        bad.append(_record(pack, place, "0 bytes" if right_N[i] else problem))
    return HeadersChecked(bad, label_N[right_N & filled_N].astype(np.int64))


def check_labels(images_C: NDArray[np.int64]) -> list[str]:
    """Return what is unusual about how many images the identities have; nothing of it is wrong."""
    (some,) = np.nonzero(images_C)
    hints = []
    if not len(some):
        return ["no image has a good label"]
    if some[0] > 0:
        hints.append(f"the smallest label is {some[0]}, not 0")
    if some[-1] < len(images_C) - 1:
        hints.append(f"the largest label is {some[-1]}, not {len(images_C) - 1}")
    without = "have no image; partialfc convert pack numbers the others without gaps"
    for count, what in ((0, without), (1, "have one image")):
        number = int((images_C == count).sum())
        if number:
            hints.append(f"{number:,} of {len(images_C):,} identities {what}")
    return hints


def check_image(source: Source, image: int) -> ImageChecked:
    """Decode one image; a photo that is larger than loaders take, at a smaller scale."""
    if isinstance(source, Pack):
        source.will_need(np.array([image]))
    try:
        view = source.jpeg_view(image)
        frame = frame_of(view)
        stored = (frame.height, frame.width)
        size = stored[::-1] if frame.orientation >= 5 else stored  # it is turned a quarter
        return ImageChecked("", decode_image(view, _SIDE), size)
    except ShardError:  # of all its images, and none is to blame
        raise
    except RecordError as error:
        return ImageChecked(error.problem)
    except ValueError as error:
        return ImageChecked(str(error))


def _problem(pack: Pack, offset: int, end: int) -> str:
    """Why a record that is not one whole part cannot be used; "" if it is only cut."""
    try:
        pack.file.read(offset)
        found = pack.file.next_offset(offset)
    except RecordError as error:
        return error.problem
    return "" if found == end else f"the record ends at {found}, the next one begins at {end}"


def _record(pack: Pack, at: int, problem: str) -> BadRecord:
    """Of the record at place ``at`` of the index."""
    image = at - pack.images.start if at in pack.images else None
    return BadRecord(image, int(pack.index.key_M[at]), int(pack.index.offset_M[at]), problem)
