"""The sets that partialfc evaluate measures: what a word on the command line names, opened."""

# Shape suffixes: N = images, P = probes, T = templates, K = pairs, D = embedding.

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from partialfc.alignment.crop import align
from partialfc.commands._evaluate.people import (
    Person,
    ScoredPair,
    lines_of_pairs,
    lines_of_people,
    people_of,
)
from partialfc.config import ConfigError
from partialfc.data.names import own_names
from partialfc.data.packs.pack import open_pack
from partialfc.data.sets.benchmarks import read_ijb, read_image, read_megaface
from partialfc.data.sets.pair_lists import read_pair_list
from partialfc.data.sets.pairs import Image
from partialfc.distributed.agreement import largest
from partialfc.distributed.ranks import gather_rows
from partialfc.errors import in_words
from partialfc.evaluation.sets import open_pairs, require_folds
from partialfc.protocols import all_to_all, unit_rows
from partialfc.protocols.curves import Curves, curves
from partialfc.protocols.distractors import with_distractors
from partialfc.protocols.identification import first_of_each, ranks, rates
from partialfc.protocols.open_set import open_set
from partialfc.protocols.templates import (
    Modes,
    pair_scores,
    search_insightface,
    search_templates,
    templates,
)
from partialfc.protocols.verification import tar_at_far, validate, verify
from partialfc.runtime.process import Runtime

Embed = Callable[[str, int, Callable[[int], Image]], NDArray[np.float64]]
Bar = Callable[[str, int], Callable[[int], object]]
"""Starts a progress bar of a name and a total; returns what advances it."""
Numbers = dict[str, Any]

CMC = tuple(range(1, 51))


@dataclass(frozen=True, slots=True)
class Measured:
    """The numbers of one set.

    Attributes:
        protocol: What was done, with every mode that changes the numbers.
        numbers: By name; nested ones by target or k.
        curves: ROC and histogram, where pairs were scored.
        cmc: Rank-k rates for k = 1, 2, ..., where identities were searched.
        people: How each identity of a pack was found, the least found first.
        pairs: Of a list, whose images have names.
    """

    protocol: str
    numbers: Numbers
    curves: Curves | None = None
    cmc: list[float] = field(default_factory=list)
    people: list[Person] = field(default_factory=list)
    pairs: list[ScoredPair] = field(default_factory=list)

    @property
    def lines(self) -> list[str]:
        """For the table: who is recognised worst."""
        return [*lines_of_people(self.people), *lines_of_pairs(self.pairs)]


@dataclass(frozen=True, slots=True)
class Ways:
    """How sets are measured.

    Attributes:
        flip: Whether mirrored images are added, for the names of modes.
        modes: Of templates.
        compat: Whose thresholds; ``None`` for exact ones.
        targets: False accept rates of all-to-all.
    """

    flip: bool
    modes: Modes
    compat: Any
    targets: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Set:
    """One set: its name, and how it is measured. Collective."""

    name: str
    measure: Callable[[Embed, Runtime, Bar], Measured]


def open_set_of(word: str, ways: Ways) -> Set:
    """Return the set that a word names: a path, or ``KIND:path``.

    Raises:
        ConfigError: If it is missing or not of its kind; the message names it.
    """
    kind, _, rest = word.partition(":")
    if kind not in _KINDS or not rest:
        kind, rest = _kind_of(Path(word)), word
    try:
        return _KINDS[kind](Path(rest).expanduser(), ways)
    except (OSError, ValueError) as error:
        said = in_words(error).removeprefix(f"{Path(rest).expanduser()}: ")
        raise ConfigError(f"{word}: {said}") from error


def _kind_of(path: Path) -> str:
    if path.suffix == ".bin" or (path.suffix == ".txt" and path.is_file()):
        return "pairs"
    if path.suffix == ".rec":
        return "identification"
    if (path / "megaface_lst").is_file():
        return "megaface"
    if (path / "meta").is_dir():
        return "ijb"
    there = "" if path.exists() else " There is nothing of that name."
    raise ConfigError(
        f"{path}: not a set: must be a .bin or a list of pairs, a .rec pack, a folder of IJB (with "
        f"meta/) or of MegaFace (with megaface_lst), or KIND:path with one of {', '.join(_KINDS)}."
        f"{there}"
    )


def _pairs(path: Path, ways: Ways) -> Set:
    """Of a ``.bin``; or of a list and its folder of images, ``LIST`` or ``LIST,FOLDER``."""
    if path.suffix == ".bin":
        pairs = open_pairs(path)
        return _verification(path.stem, pairs.same, pairs.images.__getitem__, [], ways)
    words = [str(path)] if path.exists() else str(path).rsplit(",", 1)
    folder, listed = read_pair_list(*(Path(word).expanduser() for word in words))
    files = [str(file) for pair in listed for file in (pair.first, pair.second)]
    same = np.array([pair.same for pair in listed])
    require_folds(same)

    def image(index: int) -> Image:
        return (folder / files[index]).read_bytes()

    return _verification(Path(words[0]).stem, same, image, files, ways)


def _verification(
    name: str,
    same: NDArray[np.bool_],
    image: Callable[[int], Image],
    files: Sequence[str],
    ways: Ways,
) -> Set:
    """Of 2n images; ``files`` are their names, where they have some."""

    def measure(embed: Embed, runtime: Runtime, bar: Bar) -> Measured:
        embeddings_ND = embed(name, 2 * len(same), image)
        unit_ND = unit_rows(embeddings_ND, name)
        cosine = (unit_ND[0::2] * unit_ND[1::2]).sum(1)
        numbers = asdict(verify(embeddings_ND, same))
        if ways.compat:
            del numbers["threshold_at_far"]  # those of the exact rates
            numbers["threshold"] = best = numbers.pop("threshold")
            numbers["threshold_squared_distance"] = 2 - 2 * best
            numbers["tar_at_far"] = tar_at_far(cosine, same, compat=ways.compat)
            numbers["val_at_far_0.001"] = asdict(validate(embeddings_ND, same))
        protocol = f"ten-fold verification, {_threshold(ways)}"
        found = zip(files[0::2], files[1::2], same.tolist(), cosine.tolist(), strict=False)
        listed = [ScoredPair(*pair) for pair in found]
        return Measured(protocol, numbers, curves(cosine, same), pairs=listed)

    return Set(name, measure)


def _identification(path: Path, ways: Ways) -> Set:
    pack = open_pack(path)
    identity_N = pack.identities(np.arange(len(pack)))
    gallery, probes = first_of_each(identity_N)
    if not len(probes):
        raise ValueError("no identity has a second image, so nothing can be searched for")
    names = own_names(pack)

    def measure(embed: Embed, runtime: Runtime, bar: Bar) -> Measured:
        embeddings_ND = embed(path.stem, len(pack), pack.jpeg)
        rank_P, place_P = ranks(
            embeddings_ND[gallery],
            identity_N[gallery],
            embeddings_ND[probes],
            identity_N[probes],
        )
        found = rates(rank_P, len(gallery), CMC)
        numbers = {**asdict(found), "rate": {k: found.rate[k] for k in (1, 5, 10)}}
        return Measured(
            "closed-set identification, first image of each identity as gallery",
            numbers,
            cmc=[found.rate[k] for k in CMC],
            people=people_of(identity_N[probes], rank_P, identity_N[gallery][place_P], names),
        )

    return Set(path.stem, measure)


def _open(path: Path, ways: Ways) -> Set:
    words = str(path).split(",")
    if len(words) != 2:
        raise ValueError("open: wants two packs, open:KNOWN.rec,STRANGERS.rec")
    known, strangers = (open_pack(Path(word).expanduser()) for word in words)
    identity_N = known.identities(np.arange(len(known)))
    gallery, probes = first_of_each(identity_N)

    def measure(embed: Embed, runtime: Runtime, bar: Bar) -> Measured:
        embeddings_ND = embed(known.path.stem, len(known), known.jpeg)
        found = open_set(
            embeddings_ND[gallery],
            identity_N[gallery],
            embeddings_ND[probes],
            identity_N[probes],
            embed(strangers.path.stem, len(strangers), strangers.jpeg),
        )
        return Measured("open-set identification, rank 1 above an exact threshold", asdict(found))

    name = f"{known.path.stem} against {strangers.path.stem}"
    return Set(name, measure)


def _all(path: Path, ways: Ways) -> Set:
    pack = open_pack(path)
    identity_N = pack.identities(np.arange(len(pack)))

    def measure(embed: Embed, runtime: Runtime, bar: Bar) -> Measured:
        embeddings_ND = embed(path.stem, len(pack), pack.jpeg)
        part = all_to_all.search(
            embeddings_ND,
            identity_N,
            ways.targets,
            rank=runtime.ranks.rank,
            ranks=runtime.ranks.size,
            device=runtime.device,
            progress=bar("all to all", len(pack)),
        )
        whole = all_to_all.Tally(
            _of_all_ranks(part.impostor_K, runtime), _of_all_ranks(part.genuine_K, runtime)
        )
        found = all_to_all.combine([whole], identity_N, ways.targets)
        return Measured("all-to-all 1:1 verification, exact threshold", asdict(found))

    return Set(f"all:{path.stem}", measure)


def _of_all_ranks(scores_K: NDArray[np.float64], runtime: Runtime) -> NDArray[np.float64]:
    """Scores of all ranks, which have different numbers of them. Collective."""
    most = largest(len(scores_K), runtime.ranks)
    padded = torch.full((most,), torch.nan, dtype=torch.float64)
    padded[: len(scores_K)] = torch.from_numpy(scores_K)
    gathered: NDArray[np.float64] = (
        gather_rows(padded.to(runtime.device), runtime.ranks).cpu().numpy()
    )
    return gathered[~np.isnan(gathered)]


def _ijb(path: Path, ways: Ways) -> Set:
    ijb = read_ijb(path)
    same = ijb.pairs[:, 2] == 1

    def image(index: int) -> Image:
        return align(read_image(ijb.images[index]), ijb.landmarks[index], smooth=False)

    def measure(embed: Embed, runtime: Runtime, bar: Bar) -> Measured:
        found = templates(
            embed(ijb.name, len(ijb.images), image),
            ijb.template,
            ijb.media,
            ijb.detector_score,
            ways.modes,
        )
        scores = pair_scores(found, ijb.pairs[:, 0], ijb.pairs[:, 1])
        numbers: Numbers = {
            "tar_at_far": tar_at_far(scores, same, compat=ways.compat),
            "num_templates": len(found.id_T),
            "num_pairs": len(same),
        }
        if ijb.galleries:
            numbers["search"] = _searches(found, ijb.galleries, ijb.probes, ways)
        mode = ways.modes.name(ways.flip)
        return Measured(f"templates, {mode}, {_threshold(ways)}", numbers, curves(scores, same))

    return Set(ijb.name, measure)


def _searches(found: Any, galleries: Mapping[str, Any], probes: Any, ways: Ways) -> Numbers:
    if ways.compat:
        merged = np.concatenate(list(galleries.values()))
        parts = {"+".join(galleries): (search_insightface, merged)}
    else:
        parts = {name: (search_templates, gallery) for name, gallery in galleries.items()}
    return {
        name: asdict(search(found, gallery[:, 0], gallery[:, 1], probes[:, 0], probes[:, 1]))
        for name, (search, gallery) in parts.items()
    }


def _megaface(path: Path, ways: Ways) -> Set:
    sets = read_megaface(path)
    files = [*sets.probes, *sets.distractors]

    def measure(embed: Embed, runtime: Runtime, bar: Bar) -> Measured:
        embeddings_ND = embed("megaface", len(files), lambda index: read_image(files[index]))
        probes, others = np.split(embeddings_ND, [len(sets.probes)])
        numbers: Numbers = {}
        for kind, keep, kept in (
            ("cleaned", ~sets.noisy_probes, ~sets.noisy_distractors),
            ("raw", slice(None), slice(None)),
        ):
            found = with_distractors(probes[keep], sets.identity[keep], others[kept], ks=(1,))
            numbers[kind] = asdict(found)
        return Measured("identification with distractors, cleaned and raw", numbers)

    return Set("megaface", measure)


def _threshold(ways: Ways) -> str:
    return "thresholds as insightface" if ways.compat else "exact thresholds"


_KINDS: dict[str, Callable[[Path, Ways], Set]] = {
    "pairs": _pairs,
    "identification": _identification,
    "open": _open,
    "all": _all,
    "ijb": _ijb,
    "megaface": _megaface,
}
KINDS = tuple(_KINDS)
