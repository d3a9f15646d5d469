"""Begin a new run with a trained head whose identities are added, removed, merged or renumbered.

    partialfc identities runs/a starts/b                       # the same identities
    partialfc identities runs/a starts/b --identities 9000     # more of them, behind the old
    partialfc identities runs/a starts/b --names packs/b.identities.json
    partialfc identities runs/a starts/b --map map.csv --mean-of packs/b.rec
    torchrun ... -m partialfc train CONFIG.toml data.train=packs/b.rec run.start_from=starts/b

With --names, an identity goes on as the new one of its name, however the new data is numbered. A
map has a line "old,new" for every identity that goes on: one without a line is removed, several
with the same new number are merged into the mean of their directions, and a new number that no line
has is added. Rows of added identities are what a new run would begin with, a function of run.seed
and the identity; with --mean-of they are the mean embedding of their images in that pack, under its
numbers. Momentum begins anew.
"""

# Shape suffixes: N = images, C = identities of a pack, A = added ones, D = embedding.

import csv
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from partialfc.checkpoint.folder import free_bytes
from partialfc.checkpoint.stored_rows import StoredRows
from partialfc.checkpoint.tensor_file import MadeRows
from partialfc.checkpoint.warm_start import write_start
from partialfc.commands._command import add_plugin_option, command_parser
from partialfc.commands._identities.rows import OldRows, new_rows
from partialfc.config import ConfigError
from partialfc.data.dataset import DataSet
from partialfc.data.names import Names, names_of, read_names
from partialfc.data.packs.pack import Pack, open_pack
from partialfc.errors import DataError
from partialfc.training.open_run import OpenRun, open_run
from partialfc.words import size

CHUNK = 4096
_MOST = 1 << 40


def main(arguments: list[str]) -> int:
    """Run the command; return its exit status."""
    parser = command_parser("identities", __doc__)
    parser.add_argument("run", type=Path, help="folder of a run")
    add_plugin_option(parser)
    parser.add_argument("out", type=Path, help="folder to write, for run.start_from")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--map", type=Path, help="CSV of old,new")
    which.add_argument(
        "--names",
        type=Path,
        nargs="+",
        metavar="JSON",
        help="names of the new identities, as partialfc pack writes them; before them those of the "
        "old ones, if the run's data has none",
    )
    parser.add_argument("--identities", type=int, help="of the new run; as many as the map needs")
    parser.add_argument("--mean-of", type=Path, help="pack whose images begin added identities")
    options = parser.parse_args(arguments)
    if options.out.exists():
        raise ConfigError(f"{options.out}: it exists already; name another folder.")
    with open_run(options.run, heads=False) as run:
        stored = StoredRows(run.place, run.config)
        old = stored.num_identities
        names, new_names = _names(run.dataset, old, options.names)
        if options.map:
            olds, news = read_map(options.map, old)
        elif new_names is not None:
            assert names is not None
            olds, news = same_names(names, new_names)
        else:
            olds = news = np.arange(old)
        count = options.identities or (len(new_names) if new_names else int(news.max()) + 1)
        if count <= news.max():
            raise ConfigError(
                f"--identities {count}: the largest new number is {news.max()}, so at least "
                f"{news.max() + 1}."
            )
        refuse_more_than_fit(options.out, count, stored)
        pack = open_pack(options.mean_of) if options.mean_of else None
        if pack is not None and pack.num_identities != count:
            raise ConfigError(
                f"{options.mean_of}: it has {pack.num_identities:,} identities, and the new "
                f"run {count:,}. Give its number with --identities, or another map."
            )
        mean = None
        if pack is not None:
            identity_N = pack.identities(np.arange(len(pack)))
            refuse_without_image(pack, identity_N, news)
            mean = partial(mean_embeddings, run, pack, identity_N)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        old_rows = OldRows(stored, options.out.parent)
        write_start(
            options.out,
            run.model.backbone.state_dict(),
            MadeRows(
                (count * stored.per_identity, stored.width),
                new_rows(old_rows, stored, olds, news, count, mean),
            ),
            {"num_identities": count, "centers_per_identity": stored.per_identity},
            new_names or moved_names(names, olds, news, count),
        )
    added = count - len(np.unique(news))
    merged = len(news) - len(np.unique(news))
    print(
        f"{options.out}: {count:,} identities, {added:,} of them added; of {old:,} trained ones "
        f"{old - len(np.unique(olds)):,} removed and {merged:,} merged into others"
    )
    return 0


def _names(
    dataset: DataSet, count: int, given: Sequence[Path] | None
) -> tuple[Names | None, Names | None]:
    """The names of the old identities, where known, and of the new ones, where given."""
    if given and len(given) > 2:
        raise ConfigError(f"--names: old and new ones, or new ones alone; got {len(given)} files.")
    try:
        if not given:
            return names_of(dataset), None
        old = read_names(given[0]) if len(given) == 2 else names_of(dataset)
        new = read_names(given[-1])
    except (OSError, ValueError) as error:
        raise ConfigError(f"names: {error}") from error
    if old is None:
        raise ConfigError("--names: the run's data has no names; give those of the old ones first.")
    if len(old) != count:
        raise ConfigError(f"--names: {len(old):,} old names, and the run has {count:,} identities.")
    return old, new


def same_names(old: Names, new: Names) -> tuple[np.ndarray, np.ndarray]:
    """Return the old and the new number of every identity that both name.

    Raises:
        ConfigError: If a name occurs twice, or none is in both.
    """
    for which, names in (("old", old), ("new", new)):
        known = [name for name in names if name is not None]
        if len(set(known)) < len(known):
            twice = next(name for name, times in Counter(known).items() if times > 1)
            raise ConfigError(f"--names: {twice!r} occurs twice among the {which} ones.")
    number_of = {name: number for number, name in enumerate(new) if name is not None}
    pairs = [(number, number_of[name]) for number, name in enumerate(old) if name in number_of]
    if not pairs:
        raise ConfigError("--names: no name is among the old and the new ones.")
    return np.array([one for one, _ in pairs]), np.array([other for _, other in pairs])


def moved_names(
    names: Names | None, olds: np.ndarray, news: np.ndarray, count: int
) -> Names | None:
    """Return the names of the new identities, those that are known: not of added or merged ones."""
    if names is None:
        return None
    times = np.bincount(news, minlength=count)
    moved: Names = [None] * count
    for one, other in zip(olds.tolist(), news.tolist(), strict=True):
        moved[other] = names[one] if times[other] == 1 else None
    return moved


def refuse_more_than_fit(out: Path, count: int, stored: StoredRows) -> None:
    """Refuse identities whose rows, and those of the old ones beside them, the disk cannot hold.

    Raises:
        ConfigError: The message says what they take.
    """
    needed = 4 * (count + stored.num_identities) * stored.per_identity * stored.width
    if needed > (free := free_bytes(out.absolute().parent)):
        raise ConfigError(
            f"{out}: {count:,} identities of the new run take {size(needed)} with the old ones "
            f"beside them, and {size(free)} are free there. Is a new number too large?"
        )


def read_map(path: Path, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the old and the new number of every line.

    Raises:
        ConfigError: If a line is no pair of numbers, or an old number is not in [0, count), or
            occurs twice; the message names the line.
    """
    pairs: dict[int, int] = {}
    with path.open(newline="", encoding="utf-8") as file:
        for line, row in enumerate(csv.reader(file), 1):
            if line == 1 and row == ["old", "new"]:
                continue
            try:
                old, new = (int(cell) for cell in row)
            except ValueError:
                raise ConfigError(f"{path}: line {line}: {row} must be old,new.") from None
            if not 0 <= old < count or not 0 <= new < _MOST:
                raise ConfigError(
                    f"{path}: line {line}: {old},{new}: old numbers must be in [0, {count}), new "
                    f"ones in [0, {_MOST:,})."
                )
            if old in pairs:
                raise ConfigError(f"{path}: line {line}: {old} occurs a second time.")
            pairs[old] = new
    if not pairs:
        raise ConfigError(f"{path}: it has no line old,new.")
    return np.array(list(pairs)), np.array(list(pairs.values()))


def refuse_without_image(pack: Pack, identity_N: np.ndarray, news: np.ndarray) -> None:
    """Refuse added identities that a pack shows no image of, before any is embedded.

    Raises:
        DataError: If there is one.
    """
    fine_C = np.zeros(pack.num_identities, bool)
    fine_C[news] = fine_C[identity_N] = True
    if not fine_C.all():
        raise DataError(f"{pack.path}: identity {fine_C.argmin()} has no image in it.")


def mean_embeddings(run: OpenRun, pack: Pack, identity_N: np.ndarray, identities: Tensor) -> Tensor:
    """Return the mean unit embedding [A, D] of the images of some identities of a pack.

    Args:
        run: With the backbone.
        pack: Images.
        identity_N: Whom each of them shows.
        identities: int64 [A], ascending.
    """
    place_C = np.full(pack.num_identities, -1)
    place_C[identities.numpy()] = np.arange(len(identities))
    images = np.flatnonzero(place_C[identity_N] >= 0)
    total_AD = torch.zeros(len(identities), run.config.backbone.embedding_dim)
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("embedding", total=len(images))
        for start in range(0, len(images), CHUNK):
            some = images[start : start + CHUNK].tolist()
            jpegs = [pack.jpeg(image) for image in some]
            found = run.evaluation.embed(run.model, pack.path.name, len(some), jpegs.__getitem__)
            place = torch.from_numpy(place_C[identity_N[some]])
            total_AD.index_add_(0, place, F.normalize(torch.from_numpy(found).float()))
            progress.advance(task, len(some))
    return total_AD
