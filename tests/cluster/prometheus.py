"""A real Prometheus beside a test, with the shipped rules and alerts."""

import json
import subprocess
import time
import urllib.parse
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import yaml

from partialfc.monitoring.exporter import Exporter
from tests.support.places import ROOT
from tests.support.ports import free_port
from tests.support.waiting import wait_for

MONITORING = ROOT / "configs" / "monitoring"


def close_all(exporters: list[Exporter]) -> None:
    """Each takes up to half a second to notice."""
    with ThreadPoolExecutor(len(exporters)) as pool:
        list(pool.map(Exporter.close, exporters))


class Prometheus:
    """Prometheus with its own data; the shipped configuration, only faster."""

    def __init__(self, folder: Path, **scrape) -> None:
        self.targets = folder / "targets"
        self.url = f"http://127.0.0.1:{free_port()}"
        config = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
        config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        config["rule_files"] = [str(MONITORING / name) for name in config["rule_files"]]
        (job,) = config["scrape_configs"]
        (files,) = job["file_sd_configs"]
        files["files"] = [str(folder / name) for name in files["files"]]
        files["refresh_interval"] = "1s"
        job |= scrape
        self.targets.mkdir()
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        self._command = [
            "prometheus",
            f"--config.file={folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address={self.url.removeprefix('http://')}",
        ]
        self._log = (folder / "prometheus.log").open("w")

    def __enter__(self) -> "Prometheus":
        self._process = subprocess.Popen(self._command, stderr=self._log)
        wait_for(self._ready)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(120)
        self._log.close()

    def query(self, text: str) -> list[dict]:
        """The samples of an instant query."""
        url = f"{self.url}/api/v1/query?{urllib.parse.urlencode({'query': text})}"
        with urllib.request.urlopen(url, timeout=120) as reply:
            answer = json.load(reply)
        assert answer["status"] == "success", answer
        return answer["data"]["result"]

    def value(self, text: str) -> float | None:
        samples = self.query(text)
        return float(samples[0]["value"][1]) if samples else None

    def _ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/-/ready", timeout=2) as reply:
                return reply.status == 200
        except OSError:
            assert self._process.poll() is None, "prometheus has ended"
            time.sleep(0.1)
            return False
