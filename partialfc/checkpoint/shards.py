"""How many ranks can go on from a run's checkpoints."""

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from partialfc.checkpoint.folder import read_manifest, steps
from partialfc.config import Config, ConfigError
from partialfc.config.heads import ranks_of_centers
from partialfc.errors import CheckpointError


def kept_shards(config: Config) -> dict[str, int]:
    """Return the canonical shards of each head in the checkpoint that a run goes on from, by name;
    none if it begins anew.

    By the newest manifest that can be read: all checkpoints of a run have the same number.
    """
    paths = [*reversed(steps(config.run.folder / "checkpoints"))]
    if config.run.resume_from is not None:
        paths.append(config.run.resume_from)
    for path in paths:
        with suppress(CheckpointError):
            return shards_in(read_manifest(path))
    return {}


def shards_in(manifest: Mapping[str, Any]) -> dict[str, int]:
    """Return the canonical shards of each head by its name, as a manifest says."""
    heads = manifest.get("heads") or {"": manifest}
    return {name: int(one["canonical_shards"]) for name, one in heads.items()}


def refuse_more_ranks(config: Config, kept: Mapping[str, int], ranks: int) -> None:
    """Refuse to go on from the canonical shards of any head with more ranks.

    Raises:
        ConfigError: If there are more.
    """
    for name, wanted in ranks_of_centers(config, ranks).items():
        shards = kept.get(name, 0)
        if 0 < shards < wanted:
            raise ConfigError(
                f"run.folder = {str(config.run.folder)!r}: its checkpoints have {shards} canonical "
                f"shards, for at most as many ranks, and there are {wanted}. Go on with fewer, or "
                "begin a new run in another folder, with run.start_from for what was trained."
            )
