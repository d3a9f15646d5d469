"""What is not as it was when a run goes on, in words: settings, and the learning rate's jump."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from partialfc.checkpoint import CONFIG_HASH
from partialfc.checkpoint.folder import read_manifest
from partialfc.config import Config, config_hash
from partialfc.config.tree import changes, written
from partialfc.data.order_of_sets import AnyOrder
from partialfc.definitions import plugins
from partialfc.training.data import steps_of
from partialfc.training.schedule import learning_rate


def what_changed(found: Path, config: Config, order: AnyOrder) -> Iterator[str]:
    """Yield a sentence for what a run does otherwise than the checkpoint that it goes on from.

    Args:
        found: The checkpoint.
        config: Settings of this start.
        order: Of the images.
    """
    manifest = read_manifest(found)
    yield from _plugins_changed(found, manifest["versions"])
    if manifest["facts"].get(CONFIG_HASH) == config_hash(config):
        return
    before = written(str(manifest["settings"]))
    if before is None:
        yield f"{found}: going on with settings that are not those it was written with."
        return
    if changed := changes(before, config):
        yield f"{found}: going on with other settings: {'; '.join(changed)}."
    was, now = (_rate(one, manifest["step"], order) for one in (before, config))
    if was != now:
        yield (
            f"the learning rate goes on at {now:.3g}; by the checkpoint's settings it was "
            f"{was:.3g}."
        )


def _plugins_changed(found: Path, versions: Any) -> Iterator[str]:
    kept = versions.get("plugins") if isinstance(versions, dict) else None
    before, now = kept if isinstance(kept, dict) else {}, plugins.versions()
    for name in sorted(before.keys() & now.keys()):
        if before[name] != now[name]:
            yield (
                f"{found}: the plug-in {name} is another one: {now[name]}, was {before[name]}. "
                "What it computes may differ."
            )
    for name in sorted(now.keys() - before.keys()):
        yield f"{found}: it was written without the plug-in {name}, {now[name]}."


def _rate(config: Config, step: int, order: AnyOrder) -> float:
    total = steps_of(config, order)
    return learning_rate(
        min(step, total),
        peak=config.optimizer.lr,
        total_steps=total,
        **config.schedule.model_dump(),
    )
