"""The images of a run, opened as its settings name them, and the order in which they come."""

from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path

import numpy as np

from partialfc.config import Config, ConfigError
from partialfc.config.data import Data
from partialfc.config.heads import sets_of
from partialfc.config.sets import Set
from partialfc.data.arrangements import arrangement
from partialfc.data.arrays import open_arrays
from partialfc.data.dataset import DataSet, Part, most_of, open_dataset
from partialfc.data.joined import JoinedSets
from partialfc.data.label_file import LabelFileError
from partialfc.data.order import Order
from partialfc.data.order_of_sets import AnyOrder, OrderOfSets
from partialfc.data.skip_list import read_skip_lists
from partialfc.errors import in_words
from partialfc.head.options import Sets
from partialfc.keyed import key
from partialfc.model.heads import Numbering


def open_images(config: Config) -> DataSet:
    """Return the images that the settings name; of several sets a
    :class:`~partialfc.data.joined.JoinedSets`.

    Raises:
        ConfigError: If they cannot be opened; the message names the key or the file.
    """
    data, section, where = config.data, "data.", "data.train: "
    try:
        if not data.by_set:
            return _opened(data)
        sets = {}
        for name, one in data.by_set.items():
            section = f"data.sets.{name}."
            where = f"{section}train: "
            sets[name] = _opened(one)
        where = "data.skip: "
        sets = _without(sets, data.skip)
        if len(sets) == 1:
            return sets[name]
        where = ""
        return JoinedSets(sets, {name: one.map for name, one in data.by_set.items()})
    except LabelFileError as error:
        raise ConfigError(f"{section}{error.key}: {error}") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{where}{in_words(error)}") from error


def _opened(one: Data | Set) -> DataSet:
    if isinstance(one, Data) and one.shape is not None and one.labels is not None:
        return open_arrays(
            one.train,
            one.shape,
            one.labels,
            weights=one.label_weights,
            num_identities=one.identities,
        )
    return open_dataset(
        one.train,
        one.skip,
        labels=one.labels,
        weights=one.label_weights,
        num_identities=one.identities,
    )


def _without(sets: dict[str, DataSet], skip: Sequence[Path]) -> dict[str, DataSet]:
    """The sets without the images of lists that name those of any of them."""
    if not skip:
        return sets
    listed = iter(read_skip_lists(skip, [pack for one in sets.values() for pack in one.packs]))
    skipped = {
        name: [np.union1d(one.skipped_of(n), next(listed)) for n in range(len(one.packs))]
        for name, one in sets.items()
    }
    return {name: DataSet(one.packs, skipped[name], one.own_labels) for name, one in sets.items()}


def order_of(config: Config, dataset: DataSet) -> AnyOrder:
    """Return the order in which a run sees its images.

    Raises:
        ConfigError: If the settings and the number of images do not go together.
    """
    data, seed = config.data, config.run.seed
    uneven_by = config.optimizer.accumulation if data.uneven else None
    images, parts, orders = data.images_of_sets, dataset.parts, []
    where = "data.train: "
    try:
        for number, part in enumerate(parts):
            if len(parts) > 1:
                where = f"data.sets.{part.name}, {images[number]} images of a batch: "
            orders.append(
                Order(
                    len(part.samples),
                    images[number],
                    seed if len(parts) == 1 else key(seed, "set", number),
                    data.last_batch,
                    arrangement(
                        dataset,
                        part.samples,
                        images_per_identity=data.images_per_identity,
                        block=data.block,
                        block_window=data.block_window,
                    ),
                    uneven_by=uneven_by,
                )
            )
    except (OSError, ValueError) as error:
        raise ConfigError(f"{where}{in_words(error)}") from error
    if len(orders) == 1:
        return orders[0]
    return OrderOfSets(tuple(orders), seed, data.images_per_identity or 1, uneven_by)


def numberings(config: Config, dataset: DataSet) -> dict[str, Numbering]:
    """Return how each head numbers the identities of a run, by its name."""
    if not dict(config.heads):
        whole = (range(dataset.num_identities),)
        return {"": Numbering(whole, sets_of_identities(config, dataset), dataset.most)}
    parts = dict(zip(config.data.by_set, dataset.parts, strict=True))
    _refuse_maps_to_other_heads(config, dataset, parts)
    return {
        head: Numbering(
            tuple(parts[name].identities for name in names),
            sets_of_identities(config, dataset, names),
            most_of([parts[name].most for name in names]),
        )
        for head, names in sets_of(config).items()
    }


def _refuse_maps_to_other_heads(
    config: Config, dataset: DataSet, parts: Mapping[str, Part]
) -> None:
    for head, names in sets_of(config).items():
        for name in names:
            if not config.data.by_set[name].map or not isinstance(dataset, JoinedSets):
                continue
            left = dataset.mapped_of([*parts].index(name))
            for other in names:
                its = parts[other].identities
                left = left[(left < its.start) | (left >= its.stop)]
            if len(left):
                raise ConfigError(
                    f"data.sets.{name}.map: it gives {len(left):,} identities the numbers of a set "
                    f"that heads.{head} does not train on. Add that set to heads.{head}.sets, or "
                    "remove the map."
                )


def sets_of_identities(
    config: Config, dataset: DataSet, names: Sequence[str] | None = None
) -> Sets | None:
    """Return which identities of a head may be the same people unknown; ``None`` if none may.

    Args:
        config: Of the run.
        dataset: Its images.
        names: Of the sets of the head; all of them by default.
    """
    sets = zip(config.data.by_set.items(), dataset.parts, strict=False)
    found = {name: (one.same_people == "unknown", part) for (name, one), part in sets}
    own = [found[name] for name in (found if names is None else names)]
    pairs = [pair for pair in combinations(range(len(own)), 2) if any(own[n][0] for n in pair)]
    sizes = tuple(len(part.identities) for _, part in own)
    return Sets(sizes=sizes, may_share=tuple(pairs)) if pairs else None
