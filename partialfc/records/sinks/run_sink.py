"""What a sink of another program is, and where a name leads to one."""

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from partialfc.definitions import plugins
from partialfc.records.metrics import Values

SINKS = {
    "wandb": "partialfc.records.sinks.wandb:Wandb",
    "mlflow": "partialfc.records.sinks.mlflow:Mlflow",
}
"""Where a name leads: ``module:Class``, imported by who asks for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Opening:
    """What a sink is opened with.

    Attributes:
        folder: The run's.
        settings: All settings of the run, by section.
        id: What the sink was named by (its ``id``) when this run began, or ``None`` for a new run.
        project: What the run belongs to, or ``None`` for what the program's own environment says.
        name: The run's for people, or ``None`` in the same way.
        tracking_uri: Server or store, or ``None`` in the same way.
    """

    folder: Path
    settings: Mapping[str, Any]
    id: str | None = None
    project: str | None = None
    name: str | None = None
    tracking_uri: str | None = None


class RunSink(Protocol):
    """Follows one run; ``__init__`` takes an :class:`Opening` and begins or goes on with it.

    All is called from one thread that training does not wait for. An error costs the record.
    """

    id: str
    """Goes on with the run when it is given to another one."""

    def record(self, step: int, values: Values) -> None:
        """Record numbers, named as TensorBoard shows them: ``train/loss``."""

    def picture(self, step: int, path: Path) -> None:
        """Show a PNG."""

    def artifact(self, path: Path) -> None:
        """Keep a copy of a file or a folder."""

    def close(self, *, done: bool) -> None:
        """Send what is left. Without ``done`` the run was stopped, and may go on."""


def refuse_unknown(name: str) -> None:
    """Refuse a name that leads to no sink: it is one of ``SINKS``, a plug-in's or a place.

    Raises:
        ValueError: If there is none of this name.
    """
    if name in SINKS or plugins.place_of(name) or plugins.find("sink", name) is not None:
        return
    raise ValueError(
        f'sinks = "{name}": must be one of {", ".join(sorted(SINKS))}, or a class of your own '
        'as "my.module:Class".'
    )


def find(names: Sequence[str]) -> dict[str, Any]:
    """Import the classes of sinks, by name.

    Raises:
        ModuleNotFoundError: If a program is not installed.
        ConfigError: If a class is not where its name says.
    """
    found = {}
    for name in names:
        if name in SINKS:
            module, _, kind = SINKS[name].partition(":")
            found[name] = getattr(importlib.import_module(module), kind)
            continue
        if place := plugins.place_of(name):
            plugins.load(place[:1])
        found[name] = plugins.find("sink", name)
    return found
