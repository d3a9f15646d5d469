"""What is not as it was when a run goes on, in words: settings, and the learning rate's jump."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from partialfc.checkpoint import CONFIG_HASH
from partialfc.checkpoint.folder import read_manifest
from partialfc.config import Config, config_hash
from partialfc.config.tree import changes, written
from partialfc.definitions import plugins
from partialfc.training.data import steps_of
from partialfc.training.stages import Stage


def what_changed(found: Path, stage: Stage) -> Iterator[str]:
    """Yield a sentence for what a run does otherwise than the checkpoint that it goes on from.

    Args:
        found: The checkpoint.
        stage: The one that it is of, as this start has it.
    """
    manifest = read_manifest(found)
    yield from _plugins_changed(found, manifest["versions"])
    if manifest["facts"].get(CONFIG_HASH) == config_hash(stage.config):
        return
    before = written(str(manifest["settings"]))
    if before is None:
        yield f"{found}: going on with settings that are not those it was written with."
        return
    if changed := changes(before, stage.config):
        yield f"{found}: going on with other settings: {'; '.join(changed)}."
    was, now = (_rate(one, manifest["step"], stage) for one in (before, stage.config))
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


def _rate(config: Config, step: int, stage: Stage) -> float:
    data = replace(stage.data, steps=steps_of(config, stage.data.order))
    return replace(stage, config=config, data=data).rate(step)
