"""What is in a checkpoint: the live tensors by file, and all that is no tensor.

One place says it for every medium: the files of :mod:`partialfc.checkpoint.saving`, and copies in
the memory of other hosts.
"""

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from partialfc.checkpoint.optimizer_states import named_states
from partialfc.checkpoint.parts import AVERAGE, centers_of, head_of, statistics_of
from partialfc.definitions import plugins
from partialfc.distributed.ranks import Ranks
from partialfc.errors import CheckpointError
from partialfc.head.drift import drifted
from partialfc.model.batch_norm import mean_over_ranks, mean_statistics, statistics
from partialfc.model.build import Model
from partialfc.model.heads import Heads

Files = dict[str, dict[str, Tensor]]
"""Tensors by name by file, without its ending."""


@dataclass(frozen=True, slots=True)
class Content:
    """The live tensors of a checkpoint that one rank has.

    Attributes:
        own: Which this rank writes alone: its rows, of the first copy of the class centers, and its
            BatchNorm statistics.
        backbone: The backbone, its optimizer and its average: with ``model.shards`` this rank's
            rows, otherwise the same on every rank.
        heads: What all ranks share of the heads.
    """

    own: Files
    backbone: Files
    heads: Files


def content_of(model: Model, ranks: Ranks) -> Content:
    """Return what a checkpoint of a model has.

    Collective: one all-reduce of BatchNorm's statistics, and one of their averages; where a head
    has several copies of its class centers, their comparison.

    Raises:
        CheckpointError: On every rank, if two copies differ.
    """
    own: Files = {}
    for head in model.heads.values():
        head.optimizer.settle()
        rows = {"centers": head.centers, **head.optimizer.states()}
        if problem := drifted(rows, head.copies):
            raise CheckpointError(f"copies of the class centers are not the same. {problem}.")
    average = model.average
    means = mean_statistics(model.backbone, ranks)
    averages = average.statistics() if average else {}
    mean_averages = mean_over_ranks(averages, ranks)
    if means and ranks.size > 1:
        named = {AVERAGE + key: value for key, value in averages.items()}
        own[statistics_of(ranks.rank)] = {**statistics(model.backbone), **named}
    whole = {**model.state(), **means}
    kept = whole.keys() if model.own is None else model.own
    backbone = {
        "backbone": {name: whole[name] for name in whole if name in kept},
        "optimizer": named_states(model.optimizer, model.parameters()),
    }
    if average:
        backbone["average"] = {**average.tensors, **mean_averages}
    heads: Files = {}
    for name, head in model.heads.items():
        if shared := head.shared_state():
            heads[head_of(name)] = shared
        if len(head.owned) and head.copies.first:
            file = centers_of(name, head.owned_rows.start)
            own[file] = {"centers": head.centers, **head.optimizer.states(), **head.lists()}
    return Content(own, backbone, heads)


def about(
    step: int, model: Model, ranks: Ranks, facts: Mapping[str, Any], settings: str
) -> dict[str, Any]:
    """Return what a manifest says besides its files; a host synchronisation for the loss scale."""
    return {
        "step": step,
        "world_size": ranks.size,
        **sizes_of(model.heads),
        "facts": dict(facts),
        "scaler": model.scaler.state_dict(),  # host sync
        "settings": settings,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
            **({"plugins": code} if (code := plugins.versions()) else {}),
        },
    }


def parts_of_model(model: Model, ranks: Ranks) -> dict[str, Any]:
    """Return what a manifest says of the files that each rank writes for itself."""
    has_statistics = ranks.size > 1 and bool(statistics(model.backbone))
    return {
        "statistics": ranks.size if has_statistics else 0,
        "centers": {
            name: {
                "ranks": len(head.sharding.holders or range(head.sharding.world_size)),
                "rows_per_identity": head.centers_per_identity,
            }
            for name, head in model.heads.items()
        },
    }


def sizes_of(heads: Heads) -> dict[str, Any]:
    """Return what a manifest says of the identities: of one head, or summed and of each."""
    each = {
        name: {
            "num_identities": head.sharding.num_identities,
            "canonical_shards": head.sharding.canonical_shards,
        }
        for name, head in heads.items()
    }
    if "" in each:
        return each[""]
    return {
        "num_identities": sum(one["num_identities"] for one in each.values()),
        "canonical_shards": min(one["canonical_shards"] for one in each.values()),
        "heads": each,
    }
