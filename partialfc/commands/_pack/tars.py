"""Images in tar shards, as WebDataset writes them; of a shard the index is read, nothing else.

A place is ``SHARD.tar:offset:size``. An image's identity is in the member ``x.cls`` of the same
sample, or else is the folder that the image is in. A sample's name ends at the first dot of the
last part of the path, as in WebDataset: ``0001.face.jpg`` and ``0001.cls`` are one.
"""

import tarfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from partialfc.commands._bad_files import Fault
from partialfc.commands._command import tracked
from partialfc.commands._pack.survey import Survey
from partialfc.data.files.index import is_hidden, is_image

_LONGEST_LABEL = 256
_LABEL = ".cls"
_PADDING = 1 << 20


def tar_images(shards: list[Path], survey: Survey) -> dict[str, list[str]]:
    """Return the places of the images of every identity, in the order of the shards.

    A shard that is damaged or cut is a fault that says where; the images before it are taken.
    """
    images: dict[str, list[str]] = defaultdict(list)
    for shard in tracked(shards, "shards listed"):
        places: dict[str, str] = {}
        labels: dict[str, str] = {}
        for member, archive in _members(shard, survey):
            path = PurePosixPath(member.name)
            hidden = [part for part in path.parts if is_hidden(part)]
            if hidden:
                survey.ignore(hidden[0])
            elif path.suffix == _LABEL and member.size <= _LONGEST_LABEL:
                content = archive.extractfile(member)
                assert content is not None, "a regular file"
                label = content.read().decode(errors="replace").strip()
                labels[str(path.with_suffix(""))] = label
            elif is_image(path.name):
                if str(path) in places:
                    why = "it comes twice in the shard; the last one is taken"
                    survey.faults.append(Fault(f"{shard.name}: {path}", why))
                places[str(path)] = f"{shard.name}:{member.offset_data}:{member.size}"
            else:
                survey.ignore(path.name)
        for name, place in places.items():
            identity = _label_of(PurePosixPath(name), labels)
            if identity:
                images[identity].append(place)
            else:
                why = f"no {_LABEL} beside it, and in no folder"
                survey.faults.append(Fault(f"{shard.name}: {name}", why))
    return images


def _label_of(path: PurePosixPath, labels: dict[str, str]) -> str:
    sample = path.name.partition(".")[0]
    stems = (path.with_suffix(""), path.with_name(sample) if sample else path)
    found = next((labels[str(stem)] for stem in stems if labels.get(str(stem))), "")
    return found or ("" if path.parent == PurePosixPath() else str(path.parent))


def _members(shard: Path, survey: Survey) -> Iterator[tuple[tarfile.TarInfo, tarfile.TarFile]]:
    """The regular files of a shard that are whole."""
    end, at = shard.stat().st_size, 0
    try:
        with tarfile.open(shard, "r:") as archive:
            try:
                for member in archive:
                    if member.isreg() and member.offset_data + member.size <= end:
                        yield member, archive
                    elif not (member.isreg() or member.isdir()):
                        survey.ignore("link")
            finally:
                at = archive.offset
        _require_end(shard, at)
    except tarfile.TarError as error:
        remedy = "Copy it again" if at else "It must be a tar that is not compressed"
        why = f"byte {min(at, end)} of {end}: {error}. {remedy}; what is before is taken."
        survey.faults.append(Fault(shard.name, why))


def _require_end(shard: Path, at: int) -> None:
    """Raise ReadError if there is no end mark at byte ``at``: tarfile ends there without a word."""
    with shard.open("rb") as file:
        file.seek(at)
        mark, rest = file.read(tarfile.BLOCKSIZE), file.read(_PADDING)
    if mark != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError("neither a file nor an end mark, so it is cut or damaged")
    if rest.strip(b"\0"):
        raise tarfile.ReadError("more follows the end mark, which no reader comes to")
