"""Readers of benchmarks as they are laid out on a disk: IJB-B, IJB-C and MegaFace.

Every line of every list is checked before it is used; an error names file and line.

Shape suffixes: N = images, P = pairs.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from partialfc.data.images.formats import MOST_BYTES, decode_image
from partialfc.writing import read_bytes

Ids = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Ijb:
    """An IJB set in insightface's layout.

    Attributes:
        name: ``ijbb`` or ``ijbc``.
        images: Files of loosely cut faces, [N].
        landmarks: fp64 [N, 5, 2].
        detector_score: fp64 [N].
        template: Of each image, [N].
        media: Of each image, [N]; frames of one video share theirs.
        pairs: Template, template, and 1 for one subject; [P, 3].
        galleries: By name, templates and their subjects, [G, 2]; empty where 1:N is not there.
        probes: Templates and their subjects; [.., 2].
    """

    name: str
    images: list[Path]
    landmarks: NDArray[np.float64]
    detector_score: NDArray[np.float64]
    template: Ids
    media: Ids
    pairs: Ids
    galleries: Mapping[str, Ids]
    probes: Ids


@dataclass(frozen=True, slots=True, eq=False)
class MegaFace:
    """MegaFace in insightface's layout: aligned images of a probe set, and distractors.

    Attributes:
        probes: Files of the probe set (FaceScrub).
        identity: Of each probe.
        distractors: Files.
        noisy_probes, noisy_distractors: Whether a file is in the list of wrong labels.
    """

    probes: list[Path]
    identity: Ids
    distractors: list[Path]
    noisy_probes: NDArray[np.bool_]
    noisy_distractors: NDArray[np.bool_]


def read_ijb(folder: Path) -> Ijb:
    """Read ``meta/ijbc_*`` or ``meta/ijbb_*`` and the names of ``loose_crop``.

    Raises:
        ValueError: If a list is not as it must be; the message names file and line.
        OSError: If a file is missing.
    """
    meta = folder / "meta"
    names = [n for n in ("ijbc", "ijbb") if (meta / f"{n}_face_tid_mid.txt").is_file()]
    if len(names) != 1:
        raise ValueError(f"{meta}: must have ijbc_face_tid_mid.txt or ijbb_face_tid_mid.txt.")
    name = names[0]
    files, points = [], []
    crops = meta / f"{name}_name_5pts_score.txt"
    for line, words in _lines(crops, columns=12):
        files.append(words[0])
        points.append(_numbers(words[1:], crops, line, float))
    members: list[list[float]] = []
    listed = meta / f"{name}_face_tid_mid.txt"
    for line, words in _lines(listed, columns=3):
        if len(members) < len(files) and words[0] != files[len(members)]:
            raise ValueError(
                f"{listed}, line {line}: {words[0]}, and {crops.name} has {files[len(members)]} "
                "there; both lists must be of the same images in the same order."
            )
        members.append(_numbers(words[1:], listed, line, int))
    if len(members) != len(files) or not files:
        raise ValueError(f"{listed}: {len(members)} images, and {len(files)} in {crops.name}.")
    pairs, of_pairs = [], meta / f"{name}_template_pair_label.txt"
    for line, words in _lines(of_pairs, columns=3):
        pairs.append(_numbers(words, of_pairs, line, int))
        if pairs[-1][2] not in (0, 1):
            raise ValueError(f"{of_pairs}, line {line}: {words[2]} must be 0 or 1.")
    point_N11 = np.array(points, dtype=np.float64)
    member_N2 = np.array(members, dtype=np.int64)
    letters = ("G1", "G2") if name == "ijbc" else ("S1", "S2")
    lists = {letter: meta / f"{name}_1N_gallery_{letter}.csv" for letter in letters}
    searched = meta / f"{name}_1N_probe_mixed.csv"
    with_search = searched.is_file() or any(path.is_file() for path in lists.values())
    return Ijb(
        name=name,
        images=[folder / "loose_crop" / _inside(file, crops) for file in files],
        landmarks=point_N11[:, :10].reshape(-1, 5, 2),
        detector_score=point_N11[:, 10],
        template=member_N2[:, 0],
        media=member_N2[:, 1],
        pairs=np.array(pairs, dtype=np.int64).reshape(-1, 3),
        galleries={k: _subjects(path) for k, path in lists.items()} if with_search else {},
        probes=_subjects(searched) if with_search else np.empty((0, 2), dtype=np.int64),
    )


def read_megaface(folder: Path) -> MegaFace:
    """Read ``facescrub_lst``, ``megaface_lst``, the noise lists and the names of the images.

    Lists have one file a line below ``facescrub_images`` and ``megaface_images``; the folder of a
    probe is its identity. The lists of noises (``facescrub_noises.txt``, ``megaface_noises.txt``)
    have file names or paths, one a line.

    Raises:
        ValueError: If a list is empty or has a path that leads outside.
        OSError: If a list is missing.
    """
    lists = folder / "facescrub_lst", folder / "megaface_lst"
    names = [[_inside(words[0], path) for _, words in _lines(path, columns=1)] for path in lists]
    for path, found in zip(lists, names, strict=True):
        if not found:
            raise ValueError(f"{path}: it has no image.")
    people = [str(name.parent) for name in names[0]]
    noisy = []
    for kind, found in zip(("facescrub", "megaface"), names, strict=True):
        path = folder / f"{kind}_noises.txt"
        bad = {words[0] for _, words in _lines(path, columns=1) if not words[0].startswith("#")}
        noisy.append(np.array([str(n) in bad or n.name in bad for n in found], dtype=np.bool_))
    return MegaFace(
        probes=[folder / "facescrub_images" / name for name in names[0]],
        identity=np.unique(people, return_inverse=True)[1].astype(np.int64),
        distractors=[folder / "megaface_images" / name for name in names[1]],
        noisy_probes=noisy[0],
        noisy_distractors=noisy[1],
    )


def read_image(path: Path) -> NDArray[np.uint8]:
    """Return the upright RGB pixels [H, W, 3] of an image; its headers are checked first.

    Raises:
        ValueError: If it is no image that is read, or cannot be decoded; the message names it.
        OSError: If the file cannot be read, or is too large.
    """
    data = read_bytes(path, most=MOST_BYTES)
    try:
        return decode_image(np.frombuffer(data, np.uint8))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _lines(path: Path, *, columns: int) -> Iterator[tuple[int, list[str]]]:
    """Numbers and words of the lines that are not empty."""
    with path.open(encoding="utf-8") as file:
        for number, text in enumerate(file, 1):
            words = text.split() if columns > 1 else [text.strip()]
            if words in ([], [""]):
                continue
            if len(words) != columns:
                raise ValueError(f"{path}, line {number}: {len(words)} words, must be {columns}.")
            yield number, words


def _subjects(path: Path) -> Ids:
    """Templates and subjects of a list with a header; each template once."""
    found: dict[int, int] = {}
    with path.open(encoding="utf-8") as file:
        for number, text in enumerate(file, 1):
            words = text.strip().split(",")
            if number == 1 or words == [""]:
                continue
            if len(words) < 2:
                raise ValueError(f"{path}, line {number}: must begin with template,subject.")
            template, subject = _numbers(words[:2], path, number, int)
            if found.setdefault(int(template), int(subject)) != subject:
                raise ValueError(
                    f"{path}, line {number}: template {template:.0f} is of subject {subject:.0f} "
                    f"here and of {found[int(template)]} above."
                )
    return np.array(list(found.items()), dtype=np.int64).reshape(-1, 2)


def _numbers(words: list[str], path: Path, line: int, kind: type) -> list[float]:
    try:
        values = [kind(word) for word in words]
    except ValueError:
        raise ValueError(f"{path}, line {line}: {' '.join(words)}: must be numbers.") from None
    if not np.isfinite(values).all():
        raise ValueError(f"{path}, line {line}: {' '.join(words)}: must be finite.")
    return values


def _inside(name: str, path: Path) -> Path:
    """A relative path that stays where it is."""
    inner = Path(name)
    if inner.is_absolute() or ".." in inner.parts or not inner.parts:
        raise ValueError(f"{path}: {name!r} must be a path inside the folder of the images.")
    return inner
