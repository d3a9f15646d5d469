"""MLflow. Its environment says the rest: MLFLOW_TRACKING_URI, MLFLOW_TRACKING_TOKEN and others."""

import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Param

from partialfc.records.metrics import Values
from partialfc.records.sinks.run_sink import Opening

_PARAMS_A_REQUEST, _LONGEST_PARAM = 100, 500
"""What every server takes."""


class Mlflow:
    """One run of MLflow. Its parameters, which never change there, are those of the first start."""

    def __init__(self, opening: Opening) -> None:
        self._client = MlflowClient(opening.tracking_uri)
        if opening.id is not None:
            self.id = opening.id
            self._client.update_run(self.id, status="RUNNING")
            return
        project = opening.project or os.environ.get("MLFLOW_EXPERIMENT_NAME", "partialfc")
        found = self._client.get_experiment_by_name(project)
        experiment = found.experiment_id if found else self._client.create_experiment(project)
        name = opening.name or opening.folder.name
        self.id = self._client.create_run(experiment, run_name=name).info.run_id
        params = [Param(key, str(value)[:_LONGEST_PARAM]) for key, value in _flat(opening.settings)]
        for start in range(0, len(params), _PARAMS_A_REQUEST):
            self._client.log_batch(self.id, params=params[start : start + _PARAMS_A_REQUEST])

    def record(self, step: int, values: Values) -> None:
        """Log all values in one request."""
        now = int(time.time() * 1000)
        metrics = [Metric(name, value, now, step) for name, value in values.items()]
        self._client.log_batch(self.id, metrics=metrics)

    def picture(self, step: int, path: Path) -> None:
        """Keep it among the artifacts, where MLflow shows it."""
        self._client.log_artifact(self.id, str(path))

    def artifact(self, path: Path) -> None:
        """Keep it among the artifacts; a folder with its name."""
        self._client.log_artifact(self.id, str(path))

    def close(self, *, done: bool) -> None:
        """End the run; one that was stopped counts as killed until it goes on."""
        self._client.set_terminated(self.id, "FINISHED" if done else "KILLED")


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
