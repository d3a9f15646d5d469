"""Settings of a run that trains on several sets of images, each with its share of every batch."""

import math
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from partialfc.config.labels import Labelled
from partialfc.config.schema import (
    OneOrMore,
    Section,
    SourcePath,
    UserPath,
    nearest_multiples,
)
from partialfc.definitions import Range, Unit
from partialfc.definitions.phrases import to_value

if TYPE_CHECKING:
    from partialfc.config.data import Data


class Set(Labelled):
    """Images that have their share of every batch, an order and epochs of their own. NAME is a word
    of yours. Identities of the sets follow one another in the order of the file, and
    ``run.epochs`` are those of the first."""

    train: Annotated[tuple[SourcePath, ...], OneOrMore, Field(strict=False, min_length=1)]
    """As ``data.train``, which is left out."""

    skip: Annotated[tuple[UserPath, ...], OneOrMore] = Field(default=(), strict=False)
    """Lists of images of this set to leave out. ``data.skip`` may have lists of all sets."""

    images: Annotated[int | None, Range(ge=1), Unit("images")] = None
    """How many of a global batch are of this set, in every step. All sets have this, or all have
    ``share``."""

    share: Annotated[float | None, Range(gt=0, le=1)] = None
    """Part of a global batch that is of this set, rounded to whole images. They sum to 1."""

    map: Annotated[tuple[UserPath, ...], OneOrMore] = Field(default=(), strict=False)
    """Files that say which of its identities are those of a set above it, as partialfc overlap
    writes them. They train one class center."""

    same_people: Literal["none", "unknown"] = "none"
    """Whether people of this set may be in other sets too, where no map says so. ``unknown``: they
    may, so its images push away no class center of another set, and theirs none of this one."""

    @model_validator(mode="after")
    def _labels_are_of_nobody_else(self) -> "Set":
        if self.labels is not None and self.map:
            raise ValueError(
                f"map = {to_value(self.map)} with labels beside it: a map is of the identities of "
                "packs. Remove one of the two."
            )
        return self

    @model_validator(mode="after")
    def _has_one_size(self) -> "Set":
        if (self.images is None) == (self.share is None):
            has = "both" if self.images else "neither"
            raise ValueError(
                f"images and share: one of them says how much of a batch is of this set, and there "
                f"is {has}. Set one."
            )
        return self


class Sets(Section):
    """Several sets of images by name, instead of ``data.train``."""


def images_of_sets(data: "Data") -> tuple[int, ...]:
    """Return how many images of every global batch are of each set, >= 1 each.

    Shares are rounded down to whole images, or identities of ``data.images_per_identity``, and
    what is left goes to those that lost most.

    Raises:
        ValueError: If they cannot make a batch; the message begins with the key within ``data``.
    """
    sets: dict[str, Set] = dict(data.sets)
    together, batch = data.images_per_identity or 1, data.global_batch
    if not sets:
        return (batch,)
    counts = {name: one.images for name, one in sets.items() if one.images is not None}
    if counts and len(counts) < len(sets):
        raise ValueError(
            f"sets.{next(iter(counts))}.images with a share of another set: say images of all sets,"
            " or share of all."
        )
    if not counts:
        counts = _rounded({name: one.share or 0.0 for name, one in sets.items()}, batch // together)
        counts = {name: count * together for name, count in counts.items()}
    for name, count in counts.items():
        if count % together:
            raise ValueError(
                f"sets.{name}.images = {count}: must be a multiple of data.images_per_identity = "
                f"{together}. Nearest: {nearest_multiples(count, together)}."
            )
    if sum(counts.values()) != batch:
        raise ValueError(
            f"sets: their images are {' + '.join(map(str, counts.values()))} = "
            f"{sum(counts.values())}, must be data.global_batch = {batch} together."
        )
    return tuple(counts.values())


def _rounded(share: dict[str, float], units: int) -> dict[str, int]:
    """Whole units by share: largest remainders."""
    if not math.isclose(sum(share.values()), 1, abs_tol=1e-6):
        raise ValueError(
            f"sets: their shares are {' + '.join(map(to_value, share.values()))} = "
            f"{sum(share.values()):g}, must be 1 together."
        )
    exact = {name: round(part * units, 6) for name, part in share.items()}
    counts = {name: math.floor(value) for name, value in exact.items()}
    lost = sorted(share, key=lambda name: round(counts[name] - exact[name], 6))
    for name in lost[: units - sum(counts.values())]:
        counts[name] += 1
    for name, count in counts.items():
        if not count:
            raise ValueError(
                f"sets.{name}.share = {share[name]}: is less than one image, or identity of "
                "data.images_per_identity, of data.global_batch. Raise one of them."
            )
    return counts


def refuse_conflicts(data: "Data") -> None:
    """Refuse what does not go together with sets.

    Raises:
        ValueError: The message begins with the key within ``data``.
    """
    sets: dict[str, Set] = dict(data.sets)
    images_of_sets(data)
    if not sets:
        return
    for key in ("train", "labels"):
        if getattr(data, key):
            raise ValueError(
                f"{key} = {to_value(getattr(data, key))} with data.sets: each set has its own. "
                f"Move it to data.sets.NAME.{key}."
            )
    first, one = next(iter(sets.items()))
    if one.map:
        raise ValueError(
            f"sets.{first}.map = {to_value(one.map)}: no set is above this one, so there is none "
            "whose identities they could be. Write it below the other, which needs no map."
        )
    if len(sets) == 1 and one.same_people != "none":
        raise ValueError(
            f'sets.{first}.same_people = "{one.same_people}": there is no other set. Remove it.'
        )
