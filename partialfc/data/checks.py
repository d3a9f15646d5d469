"""What can be wrong with a pack, in levels that cost more and more.

The index alone; the header of every record; the labels together; images, decoded. The functions
check a range of records each, so that many run at once; ``partialfc validate`` does that.

Shape suffixes: M = records of the pack, N = records of a range, C = identities.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from partialfc.data.images.formats import decode_image
from partialfc.data.packs.pack import Pack
from partialfc.data.packs.recordio import LABEL_LIMIT, RecordError
from partialfc.data.skip_list import BadRecord


class HeadersChecked(NamedTuple):
    """The bad ones among some records, and the labels of the good images."""

    bad: list[BadRecord]
    identity_N: NDArray[np.int64]


class ImageChecked(NamedTuple):
    """What one image is: its problem or "", and its RGB pixels if it could be decoded."""

    problem: str
    pixels: NDArray[np.uint8] | None = None


def check_index(pack: Pack) -> list[BadRecord]:
    """Return where offsets do not grow with the keys, or the file does not begin or end right.

    Opening the pack has found keys and offsets that come twice, are not aligned or lie outside.
    """
    offset_M, bad = pack.index.offset_M, []
    if offset_M[0] != 0:
        bad.append(_record(pack, 0, "the first record must be at offset 0"))
    for at in np.flatnonzero(offset_M[1:] <= offset_M[:-1])[:100].tolist():
        bad.append(_record(pack, at + 1, f"it must be after key {pack.index.key_M[at]}"))
    last = int(np.argmax(offset_M))
    try:
        end = pack.file.next_offset(int(offset_M[last]))
    except RecordError as error:
        bad.append(_record(pack, last, error.problem))
    else:
        if end != pack.file.size:
            rest = pack.file.size - end
            bad.append(_record(pack, last, f"{rest} bytes follow the last record, must be none"))
    return bad


def check_headers(pack: Pack, start: int, stop: int) -> HeadersChecked:
    """Check the headers of records [start, stop): their magic, parts, length and label.

    The length must be that of the gap to the record that follows in the index.
    """
    offset_M = pack.index.offset_M
    offset_N = offset_M[start:stop]
    end_N = offset_M[start + 1 : stop + 1]
    if len(end_N) < len(offset_N):
        end_N = np.append(end_N, pack.file.size)
    whole_N = pack.file.whole(offset_N, end_N)
    bad: list[BadRecord] = []
    sound_N = whole_N.copy()
    for at in np.flatnonzero(~whole_N).tolist():
        problem = _problem(pack, int(offset_N[at]), int(end_N[at]))
        if problem:
            bad.append(_record(pack, start + at, problem))
        sound_N[at] = not problem
    is_image_N = np.zeros(len(offset_N), bool)
    is_image_N[max(pack.images.start - start, 0) : max(pack.images.stop - start, 0)] = True
    images = np.flatnonzero(sound_N & is_image_N)
    headers = pack.file.headers(offset_N[images])
    label_N, filled_N = headers.label_N, headers.image_bytes_N > 0
    limit = min(pack.declared_identities or LABEL_LIMIT, LABEL_LIMIT)
    right_N = (label_N >= 0) & (label_N < limit) & (label_N == np.floor(label_N))
    for at in np.flatnonzero(~(right_N & filled_N)).tolist():
        problem = f"label {label_N[at]:.9g} must be a whole number in [0, {limit})"
        bad.append(_record(pack, start + int(images[at]), "0 bytes" if right_N[at] else problem))
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
    for count, what in ((0, "have no image"), (1, "have one image")):
        number = int((images_C == count).sum())
        if number:
            hints.append(f"{number:,} of {len(images_C):,} identities {what}")
    return hints


def check_image(pack: Pack, image: int) -> ImageChecked:
    """Decode one image."""
    pack.will_need(np.array([image]))
    try:
        return ImageChecked("", decode_image(pack.jpeg_view(image)))
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
