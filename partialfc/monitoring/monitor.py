"""What one rank tells Prometheus about itself, and rank 0 about the run."""

import platform
import shutil
import socket
import ssl
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from partialfc.checkpoint import folder as checkpoint_folder
from partialfc.config import Config, ConfigError, config_hash
from partialfc.config.heads import each_head
from partialfc.distributed.agreement import collective_device
from partialfc.distributed.ranks import gather_rows, wait_seconds
from partialfc.monitoring.exporter import OF_EVERY_RANK, OF_RANK_0, Exported, Exporter
from partialfc.monitoring.targets import remove_targets, targets_path, write_targets
from partialfc.records.environment import package_version
from partialfc.records.ledger import Ledger, fault_codes, starts
from partialfc.records.metrics import TABLE, Values
from partialfc.records.unessential import unessential
from partialfc.runtime.process import Runtime, local_rank

_ADDRESS_BYTES = 256
_RECORDS = {metric.name: (metric.exported or metric.name, dict(metric.labels)) for metric in TABLE}
_OF_RECORDS = tuple(Exported(metric.exported or metric.name, metric.help) for metric in TABLE)


def _named_by_settings(name: str) -> tuple[str, dict[str, str]]:
    """Sets of images, and losses of plug-ins and of heads, have names that nobody knew."""
    if name.startswith("epoch_"):
        return "epoch_of_set", {"set": name.removeprefix("epoch_")}
    return "loss_of_plugin", {"loss": name.removeprefix("loss_")}


class Monitor:
    """Serves the numbers of this rank; nothing that goes wrong with it stops the training.

    Collective: one all-gather of addresses, so that rank 0 can write where Prometheus finds them.

    Args:
        config: Settings of the run; ``monitor.port`` is set.
        runtime: This rank.
        ledger: Where the time goes.
        total_steps: Steps of the run.

    Raises:
        ConfigError: If a certificate cannot be used.
    """

    def __init__(self, config: Config, runtime: Runtime, ledger: Ledger, total_steps: int) -> None:
        self._config, self._runtime, self._ledger = config, runtime, ledger
        self._run = config.run.folder.name
        self._steps = self._images = self._images_of_a_step = 0
        self.enter(config)
        self._exporter = self._serve()
        if self._exporter is not None:
            self._describe(self._exporter, total_steps)
        self._targets: Path | None = None
        addresses = self._addresses()
        if config.monitor.targets is not None and runtime.leads:
            self._announce(targets_path(config.monitor.targets, config.run.folder), addresses)

    def enter(self, config: Config) -> None:
        """Count the images of a step as these settings have them, as a stage does that begins."""
        ranks = self._runtime.ranks
        self._images_of_a_step = config.shares(ranks.size).sizes[ranks.rank]

    def stepped(self, step: int) -> None:
        """Note that this rank ended a step; for no device."""
        self._steps += 1
        self._images += self._images_of_a_step
        if self._exporter is not None:
            self._exporter.set("step", step)
            self._exporter.set("steps_total", self._steps)
            self._exporter.set("images_total", self._images)
            self._exporter.set("last_step_timestamp_seconds", time.time())

    def write(self, step: int, values: Values) -> None:
        """Take over a record: on rank 0 all of it, on others what is theirs."""
        exporter = self._exporter
        if exporter is None:
            return
        for phase, seconds in self._ledger.spent().items():
            if phase not in ("wasted", "recovery"):  # they are of the run, not of a process
                exporter.set("phase_seconds_total", seconds, phase=phase)
        for kind, seconds in wait_seconds().items():
            exporter.set("collective_wait_seconds_total", seconds, collective=kind)
        for name, value in values.items():
            if self._runtime.leads or name == "peak_memory_bytes":
                exported, labels = _RECORDS.get(name) or _named_by_settings(name)
                exporter.set(exported, value, **labels)

    def close(self) -> None:
        """Stop serving, and take the run out of Prometheus' targets."""
        if self._targets is not None:
            with unessential(self._targets):
                remove_targets(self._targets)
        if self._exporter is not None:
            self._exporter.close()

    def _serve(self) -> Exporter | None:
        settings = self._config.monitor
        assert settings.port is not None
        port = settings.port + local_rank() if settings.port else 0
        table = (*OF_EVERY_RANK, *OF_RANK_0, *_OF_RECORDS)
        try:
            exporter = Exporter(
                tuple({entry.name: entry for entry in table}.values()),
                settings.host,
                port if port <= 65535 else 0,
                certificate=settings.certificate,
                key=settings.key,
                client_ca=settings.client_ca,
            )
        except (ssl.SSLError, FileNotFoundError, PermissionError) as error:
            raise ConfigError(
                f'monitor.certificate = "{settings.certificate}", monitor.key = "{settings.key}", '
                f'monitor.client_ca = "{settings.client_ca}": {error}. They must be PEM files that '
                "go together."
            ) from error
        except OSError as error:
            self._say(f"metrics are not served on {settings.host}:{port}: {error}.")
            return None
        if port not in (0, exporter.port):
            self._say(f"port {port} is taken; metrics are on port {exporter.port}.")
        return exporter

    def _describe(self, exporter: Exporter, total_steps: int) -> None:
        config = self._config
        exporter.set(
            "build_info",
            1,
            version=package_version(),
            torch=torch.__version__,
            python=platform.python_version(),
        )
        exporter.set(
            "run_info",
            1,
            backbone=config.backbone.name,
            margin=", ".join(one.head.margin.name for one in each_head(config).values()),
            device=self._runtime.device.type,
            config_hash=config_hash(config),
        )
        if not self._runtime.leads:
            return
        before = self._ledger.before
        exporter.set("planned_steps", total_steps)
        exporter.set("ranks", self._runtime.ranks.size)
        exporter.set("starts", len(starts(before)) + 1)
        failures = fault_codes(before)
        exporter.set("failed_starts", len(failures))
        if failures:
            exporter.set("last_failure_info", 1, code=failures[-1])
        exporter.set("checkpoint_interval_steps", config.checkpoint.interval(total_steps))
        exporter.look(lambda: _look_at(config.run.folder))

    def _addresses(self) -> list[str]:
        """``host:port`` of every rank that serves, by rank."""
        own = ""
        if self._exporter is not None:
            host = self._config.monitor.host
            host = socket.gethostname() if host in ("0.0.0.0", "::", "") else host
            own = (
                f"[{host}]:{self._exporter.port}"
                if ":" in host
                else f"{host}:{self._exporter.port}"
            )
        ranks = self._runtime.ranks
        text = np.frombuffer(own.encode()[:_ADDRESS_BYTES].ljust(_ADDRESS_BYTES), np.uint8)
        row = torch.from_numpy(text.copy()).unsqueeze(0)
        if ranks.size > 1:
            row = gather_rows(row.to(collective_device(ranks)), ranks).cpu()
        return [bytes(address.numpy()).decode().rstrip() for address in row]

    def _announce(self, path: Path, addresses: list[str]) -> None:
        scheme = "https" if self._config.monitor.certificate else "http"
        try:
            write_targets(path, addresses, run=self._run, scheme=scheme)
        except OSError as error:
            self._say(f"monitor.targets: Prometheus is not told of this run: {error}.")
        else:
            self._targets = path

    def _say(self, text: str) -> None:
        print(f"rank {self._runtime.ranks.rank}: {text} Training goes on.", flush=True)


def _look_at(folder: Path) -> Mapping[str, float]:
    """The newest checkpoint and the space that is left, as the disk says at this moment."""
    found: dict[str, float] = {}
    try:
        disk = shutil.disk_usage(folder)
        found |= {"folder_free_bytes": disk.free, "folder_size_bytes": disk.total}
        newest = checkpoint_folder.steps(folder / "checkpoints")[-1]
        files = [path.stat() for path in newest.iterdir()]
        found["checkpoint_last_step"] = checkpoint_folder.step_of(newest)
        found["checkpoint_last_timestamp_seconds"] = max(file.st_mtime for file in files)
        found["checkpoint_size_bytes"] = sum(file.st_size for file in files)
    except (OSError, IndexError):
        pass  # none yet, or deleted while it was looked at
    return found
