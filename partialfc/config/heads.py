"""Several heads of one run: what each of them takes, and what goes wrong between them.

A run has one head, ``[head]``, or one for each section ``[heads.NAME]``. Code that knows one head
is given the settings of a run that had this head alone.

Shape suffixes: B = places of a global batch, b = those of a rank or of its micro-batch.
"""

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from partialfc.config.head import Head
from partialfc.config.labels import Labelled
from partialfc.config.schema import OneOrMore, Section
from partialfc.data.parts import parts_of_batch
from partialfc.definitions import Range
from partialfc.definitions.phrases import to_value
from partialfc.distributed.shares import Shares, uneven_copies, wrong_copies
from partialfc.records.metrics import NAMES

if TYPE_CHECKING:
    from partialfc.config.tree import Config

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,39}")


class Named(Section):
    """One of several heads. NAME is a word of yours. It has all settings of [head], and these."""

    sets: Annotated[tuple[str, ...], OneOrMore] = Field(default=(), strict=False)
    """The sets of ``data.sets`` whose images it trains on. Its identities are those of the sets,
    one after the other. Left out, the set of its own name."""

    weight: Annotated[float, Range(gt=0, le=1e6)] = 1.0
    """Factor of its loss, the mean over its images of the batch, in the sum of all heads."""

    ranks: Annotated[int, Range(ge=1)] | None = None
    """Ranks that its class centers lie on, for a head so small that there is little to share. Heads
    that say it take the ranks in turn, in the order of the file. Left out, or more than there are:
    all. It may change when a run goes on."""


class NamedHead(Head, Named):
    """One of several heads."""


class Heads(Section):
    """Several heads by name, instead of [head]."""


class HeadsInHelp(Heads):
    """Several heads by name, instead of [head]."""

    NAME: Named


def each_head(config: "Config") -> dict[str, "Config"]:
    """Return, by name, the settings of a run that had one of the heads as its ``[head]``.

    The head of a run without ``[heads]`` is called "".
    """
    named = dict(config.heads)
    if not named:
        return {"": config}
    return {
        name: config.model_copy(update={"head": head, "heads": Heads()})
        for name, head in named.items()
    }


def section_of_head(name: str) -> str:
    """Return the section of a head in the file."""
    return f"heads.{name}" if name else "head"


def sets_of(config: "Config") -> dict[str, tuple[str, ...]]:
    """Return the names of the sets of each head of several."""
    return {name: head.sets or (name,) for name, head in config.heads}


def labelled_of(config: "Config", head: str) -> list[Labelled]:
    """Return the images of a head, or the sets of them, that have labels beside them."""
    if not head:
        return [*config.data.labelled]
    sets = config.data.by_set
    named = dict(config.heads).get(head) or config.head
    wanted = getattr(named, "sets", ()) or (head,)
    return [sets[one] for one in wanted if one in sets and sets[one].labels is not None]


def name_problem(name: str, losses: Mapping[str, Any]) -> str:
    """Return what is wrong with the name of a head, or ""."""
    if not _NAME.fullmatch(name) or hasattr(Section, name):
        return (
            f"[heads.{name}]: it must be a word of up to 40 letters, digits and _ that begins with "
            "a letter. Choose another."
        )
    if f"loss_{name}" in NAMES or name in losses:
        return f"[heads.{name}]: loss_{name} is another number of metrics.jsonl. Choose another."
    return ""


def conflicts_of_heads(config: "Config") -> Iterator[str]:
    """Yield a line for each mistake among several heads."""
    used, sets = sets_of(config), tuple(config.data.by_set)
    if not used:
        return
    if config.head != type(config.head)():
        yield (
            f"[head] with [heads.{next(iter(used))}]: a run has one head or several named ones. "
            "Move what [head] says into each of [heads.NAME]."
        )
    if len({name.lower() for name in used}) < len(used):
        yield (
            f"[heads]: {', '.join(used)}: two names differ in capital letters alone, and some file "
            "systems take them for one. Rename one."
        )
    for name in used:
        for other in used:
            if name in (f"{other}_center", f"{other}_inter_class"):
                yield f"[heads.{name}]: a loss of heads.{other} has this name. Choose another."
    for name, wanted in used.items():
        key = f"heads.{name}.sets = {to_value(list(wanted))}"
        for one in wanted:
            if one not in sets:
                there = f"those are {', '.join(sets)}" if sets else "data.sets names none"
                yield f"{key}: there is no [data.sets.{one}]: {there}. Add it, or name another."
        if len(set(wanted)) < len(wanted):
            yield f"{key}: name each set once."
    yield from _of_their_sets(config)
    for one in sets:
        if not any(one in wanted for wanted in used.values()):
            yield f"[data.sets.{one}]: no head trains on it. Name it in sets of one, or remove it."


def _of_their_sets(config: "Config") -> Iterator[str]:
    """What a set says of other sets, which must be of the same head."""
    above: list[str] = []
    for name, one in config.data.by_set.items():
        of_heads = {head: sets for head, sets in sets_of(config).items() if name in sets}
        for head, sets in of_heads.items():
            if one.map and not set(above) & set(sets):
                yield (
                    f"data.sets.{name}.map with heads.{head}.sets = {to_value(list(sets))}: the "
                    "map gives identities the numbers of a set above it, and this head trains on "
                    f"none. Add that set to heads.{head}.sets, or remove the map."
                )
        if one.same_people != "none" and all(len(sets) == 1 for sets in of_heads.values()):
            yield (
                f'data.sets.{name}.same_people = "{one.same_people}": has no effect, as no head '
                "trains on this set and another. Remove it."
            )
        above.append(name)


def rows_of_heads(config: "Config") -> dict[str, NDArray[np.bool_] | None]:
    """Return which places [B] of a global batch each head trains on; ``None`` is all.

    A pure function of the settings. The head of a run without ``[heads]`` is called "".
    """
    if not dict(config.heads):
        return {"": None}
    set_B = parts_of_batch(config.data.images_of_sets, config.data.images_per_identity or 1)
    numbers = [*config.data.by_set]
    return {
        name: np.isin(set_B, [numbers.index(one) for one in sets])
        for name, sets in sets_of(config).items()
    }


def holders_of_heads(config: "Config", world_size: int) -> dict[str, range | None]:
    """Return the ranks that the class centers of each head lie on; ``None`` is all."""
    holders: dict[str, range | None] = {}
    free = 0
    for name, head in dict(config.heads).items() or {"": config.head}.items():
        wanted = getattr(head, "ranks", None)
        if wanted is None or wanted >= world_size:
            holders[name] = None
            continue
        first = free if free + wanted <= world_size else 0
        free = first + wanted
        holders[name] = range(first, free)
    return holders


def copies_of(config: "Config", world_size: int) -> int:
    """Return how many copies of its class centers a head has."""
    per_copy = config.head.ranks_per_copy or world_size
    return world_size // min(per_copy, world_size)


def ranks_of_centers(config: "Config", world_size: int) -> dict[str, int]:
    """Return over how many ranks the class centers of each head are cut."""
    ranks = {}
    for name, holders in holders_of_heads(config, world_size).items():
        per_copy = each_head(config)[name].head.ranks_per_copy or world_size
        ranks[name] = min(per_copy, world_size) if holders is None else len(holders)
    return ranks


def ranks_of_copies(config: "Config", world_size: int) -> frozenset[int]:
    """Return how many ranks hold a copy of the class centers, of each head that has several."""
    given = (one.head.ranks_per_copy or world_size for one in each_head(config).values())
    return frozenset(ranks for ranks in given if ranks < world_size)


def bad_copies(config: "Config", world_size: int) -> Iterator[str]:
    """Yield a line for each head whose copies cannot be, or not have as many rows as each other."""
    rows, parts = rows_of_heads(config), config.optimizer.accumulation
    of_all, shares = np.ones(config.data.global_batch, bool), config.shares(world_size)
    for name, ranks in ranks_of_centers(config, world_size).items():
        key, own_B = section_of_head(name), rows[name]
        per_copy = each_head(config)[name].head.ranks_per_copy
        if per_copy is None or per_copy >= world_size:
            continue
        if problem := wrong_copies(per_copy, world_size):
            yield f"{key}.{problem}"
            continue
        own_B = of_all if own_B is None else own_B
        cut = [np.split(own_B[shares.rows(rank)], parts) for rank in range(world_size)]
        for part in range(parts):
            sizes = Shares(tuple(int(of_rank[part].sum()) for of_rank in cut))
            if problem := uneven_copies(ranks, sizes):
                yield f"{key}.{problem}. Choose a data.global_batch that the ranks divide."
                break


def few_shards(config: "Config", world_size: int) -> Iterator[str]:
    """Yield a line for each head whose class centers cannot be cut for so many ranks."""
    for name, ranks in ranks_of_centers(config, world_size).items():
        shards = each_head(config)[name].head.canonical_shards
        if shards is not None and shards < ranks:
            yield (
                f"{section_of_head(name)}.canonical_shards = {shards}: must be at least the number "
                f"of ranks, {ranks}. Leave it out, or set the largest number the run will "
                "ever have."
            )


def few_images(config: "Config", world_size: int) -> Iterator[str]:
    """Yield a line for each head that has no image on some rank in some micro-batch."""
    parts = config.optimizer.accumulation
    shares = config.shares(world_size)
    for name, is_own_B in rows_of_heads(config).items():
        if is_own_B is None:
            continue
        for rank in range(world_size):
            cut = np.split(is_own_B[shares.rows(rank)], parts)
            empty = next((part for part, own_b in enumerate(cut) if not own_b.any()), None)
            if empty is None:
                continue
            yield (
                f"heads.{name}: rank {rank} has none of its {is_own_B.sum()} images of "
                f"data.global_batch = {config.data.global_batch} in micro-batch {empty + 1} of "
                f"{parts}. {world_size} ranks x optimizer.accumulation = {parts} want at least "
                f"{2 * world_size * parts} of them: raise the images of its sets, or lower either."
            )
            break
