"""What a checkpoint's run and a run that goes on from it must have in common."""

from partialfc.checkpoint import CONFIG_HASH
from partialfc.checkpoint.loading import LABELS
from partialfc.checkpoint.peers.run import Peers
from partialfc.checkpoint.shards import kept_shards, refuse_more_ranks, shards_in
from partialfc.checkpoint.teacher import Teacher
from partialfc.config import Config, config_hash
from partialfc.config.heads import each_head, labelled_of, section_of_head, sets_of
from partialfc.data.dataset import DataSet
from partialfc.distributed.agreement import from_leader
from partialfc.runtime.process import Runtime


def must_match(
    config: Config, dataset: DataSet, teacher: Teacher | None = None
) -> dict[str, object]:
    """Return what must be the same for a run to go on from a checkpoint; all else may change.

    Args:
        config: Settings of the run.
        dataset: Its images.
        teacher: Left out where a run is only looked at.
    """
    facts: dict[str, object] = {
        CONFIG_HASH: config_hash(config),
        "pack": dataset.fingerprint,
        LABELS: dataset.labels_fingerprint,
        "run.seed": config.run.seed,
        "data.global_batch": config.data.global_batch,
        "data.last_batch": config.data.last_batch,
        "data.images_per_identity": config.data.images_per_identity,
        "data.block": config.data.block,
        "data.block_window": config.data.block_window,
        "data.image_size": config.data.image_size,
        "backbone.name": config.backbone.name,
        "backbone.options": _options(config),
        "backbone.embedding_dim": config.backbone.embedding_dim,
        "backbone.freeze": sorted({*config.backbone.freeze})
        or None,  # as before there was such a setting
        "backbone.lora": _lora(config),
        "precision.compute": config.precision.compute,
        "optimizer.name": config.optimizer.name,
        **{
            f"{section_of_head(name)}.{key}": value
            for name, one in each_head(config).items()
            for key, value in _of_a_head(one).items()
        },
        **{f"heads.{name}.sets": [*sets] for name, sets in sets_of(config).items()},
        "losses": config.losses.model_dump(mode="json", exclude={"teacher"}),
    }
    if len(sets := config.data.by_set) > 1:  # the fingerprints say which images
        facts["data.sets"] = [
            {"images": images, "same_people": one.same_people}
            for images, one in zip(config.data.images_of_sets, sets.values(), strict=True)
        ]
    if config.data.shape is not None:
        facts["data.shape"] = [*config.data.shape]
    for name, one in each_head(config).items():
        if labelled_of(config, name):
            facts[f"{section_of_head(name)}.several"] = one.head.several.model_dump(mode="json")
    settings = config.losses.teacher
    if teacher is not None:  # wherever it lies
        settings_of_it = settings.model_dump(mode="json", exclude={"from"})
        return {**facts, "losses.teacher": settings_of_it | {"digest": teacher.digest}}
    return facts if settings.weight else {**facts, "losses.teacher": None}


def _of_a_head(config: Config) -> dict[str, object]:
    head = config.head
    return {
        "optimizer.name": head.optimizer.name,
        "optimizer.momentum_format": getattr(head.optimizer, "momentum_format", None),
        "optimizer.unsampled": _unsampled(config),
        "sample_rate": head.sample_rate,
        "negatives": _negatives(config),
        "compute": head.compute,
        "center_format": head.center_format,
        "margin": head.margin.model_dump(mode="json"),
    }


def _options(config: Config) -> dict[str, object] | None:
    """What a backbone takes besides, if not the defaults: a new option changes no older run."""
    return config.backbone.options.model_dump(mode="json", exclude_defaults=True) or None


def _lora(config: Config) -> dict[str, object] | None:
    """The adapters; their lists name parts of the network, in any order."""
    lora = config.backbone.lora
    lists = {name: sorted({*getattr(lora, name)}) for name in ("targets", "also_train")}
    return lora.model_dump(mode="json") | lists if lora.rank else None


def agreed_shards(config: Config, runtime: Runtime, peers: Peers | None = None) -> dict[str, int]:
    """Return the canonical shards of each head in what to go on from; none if there is nothing, or
    it has not this head. Collective.

    Raises:
        ConfigError: If there are more ranks than shards.
    """
    if peers is not None and peers.found is not None:
        kept = shards_in(peers.found.manifest)
    else:
        kept = kept_shards(config) if runtime.leads else {}
    shards = {name: from_leader(kept.get(name, 0), runtime.ranks) for name in each_head(config)}
    refuse_more_ranks(config, shards, runtime.ranks.size)
    return shards


def _negatives(config: Config) -> object:
    """What a sampled one counts for, if not itself: older checkpoints have no such fact."""
    head = config.head
    if head.negatives == "uniform":
        return None
    near = head.negatives == "nearest"
    return {"nearest": head.nearest.model_dump(mode="json")} if near else head.negatives


def _unsampled(config: Config) -> str | None:
    """What happens to centers that no step samples; at a sample rate of 1 they stay, all none."""
    unsampled: str | None = getattr(config.head.optimizer, "unsampled", None)
    return "stay" if unsampled and config.head.sample_rate == 1 else unsampled
