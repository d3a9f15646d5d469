"""What is in one shard: its images with their places and labels; image bytes are not looked at.

An image's identity is in the member ``x.cls`` of the same sample, in ``x.json`` as ``label``,
``cls`` or ``identity``, or else is the folder that the image is in. A sample's name ends at the
first dot of the last part of its path, as in WebDataset: that of ``0001.face.jpg`` is in
``0001.cls``.
"""

import json
import tarfile
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import BinaryIO, NamedTuple

from partialfc.data.files.index import is_hidden, is_image
from partialfc.data.images.formats import MOST_BYTES

_LONGEST_LABEL = 256
_LONGEST_JSON = 1 << 16
_CLS, _JSON = ".cls", ".json"
_FIELDS = ("label", "cls", "identity")
_PADDING = 1 << 20


class Member(NamedTuple):
    """An image of a shard: its path in it, where its bytes begin, how many, and whose it is."""

    name: str
    offset: int
    size: int
    identity: str


@dataclass
class Listing:
    """What a shard holds.

    Attributes:
        images: Those that have a label, in the order in which their names come first.
        ignored: How many members are neither images nor labels, by name.
        faults: Members that cannot be used, and why.
        broken: Where and why the shard cannot be read further; "" if it is whole.
    """

    images: list[Member] = field(default_factory=list)
    ignored: Counter[str] = field(default_factory=Counter)
    faults: list[tuple[str, str]] = field(default_factory=list)
    broken: str = ""


def list_shard(file: BinaryIO, end: int) -> Listing:
    """Return what a shard of ``end`` bytes holds; one that is damaged or cut, as far as it goes.

    Args:
        file: At its beginning; it is read from front to back, large images are passed over.
        end: Its bytes.
    """
    found = Listing()
    places: dict[str, tuple[int, int]] = {}
    labels: dict[str, dict[str, str]] = {_CLS: {}, _JSON: {}}
    for member, content in _members(file, end, found):
        path = PurePosixPath(member.name)
        hidden = [part for part in path.parts if is_hidden(part)]
        if hidden:
            found.ignored[hidden[0]] += 1
        elif content is not None:
            try:
                label = _label(path.suffix, content)
            except UnicodeDecodeError:
                found.faults.append((path.name, "its label is no text of UTF-8"))
                continue
            if label:
                labels[path.suffix][str(path.with_suffix(""))] = label
            elif path.suffix == _JSON:
                found.ignored[path.name] += 1
        elif is_image(path.name):
            if str(path) in places:
                found.faults.append(
                    (str(path), "it comes twice in the shard; the last one is taken")
                )
            places[str(path)] = (member.offset_data, member.size)
        else:
            found.ignored[path.name] += 1
    for name, (offset, size) in places.items():
        path = PurePosixPath(name)
        identity = _label_of(path, labels)
        if not identity:
            found.faults.append((name, f"no {_CLS} beside it, and in no folder"))
        elif size > MOST_BYTES:
            found.faults.append((name, f"{size:,} bytes, at most {MOST_BYTES:,} are read"))
        else:
            found.images.append(Member(name, offset, size, identity))
    return found


def _label(suffix: str, content: bytes) -> str:
    """What a member says of whose images those beside it are; "" if it does not."""
    if suffix == _CLS:
        return content.decode().strip()
    with suppress(ValueError, RecursionError):
        found = json.loads(content)
        if isinstance(found, dict):
            for name in _FIELDS:
                value = found.get(name)
                if isinstance(value, int | str) and not isinstance(value, bool):
                    label = str(value).strip()
                    return label if len(label) <= _LONGEST_LABEL else ""
    return ""


def _label_of(path: PurePosixPath, labels: dict[str, dict[str, str]]) -> str:
    sample = path.name.partition(".")[0]
    stems = (str(path.with_suffix("")), str(path.with_name(sample) if sample else path))
    for of_kind in labels.values():
        for stem in stems:
            if label := of_kind.get(stem):
                return label
    return "" if path.parent == PurePosixPath() else str(path.parent)


def _members(
    file: BinaryIO, end: int, found: Listing
) -> Iterator[tuple[tarfile.TarInfo, bytes | None]]:
    """The regular files of a shard that are whole, with the content of those that are labels."""
    at = 0
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            try:
                for member in archive:
                    if member.isreg() and member.offset_data + member.size <= end:
                        yield member, _label_content(archive, member)
                        archive.members.clear()  # type: ignore[attr-defined]  # all that it has seen
                    elif not (member.isreg() or member.isdir()):
                        found.ignored["link"] += 1
            finally:
                at = archive.offset
        _require_end(file, at)
    except tarfile.TarError as error:
        remedy = "Copy it again" if at else "It must be a tar that is not compressed"
        found.broken = f"byte {min(at, end)} of {end}: {error}. {remedy}"


def _label_content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes | None:
    most = {_CLS: _LONGEST_LABEL, _JSON: _LONGEST_JSON}.get(PurePosixPath(member.name).suffix, -1)
    if member.size > most:
        return None
    content = archive.extractfile(member)
    assert content is not None, "a regular file"
    return content.read()


def _require_end(file: BinaryIO, at: int) -> None:
    """Raise ReadError if there is no end mark at byte ``at``: tarfile ends there without a word."""
    file.seek(at)
    mark, rest = file.read(tarfile.BLOCKSIZE), file.read(_PADDING)
    if mark != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError("neither a file nor an end mark, so it is cut or damaged")
    if rest.strip(b"\0"):
        raise tarfile.ReadError("more follows the end mark, which no reader comes to")
