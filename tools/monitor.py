"""See the monitoring at work: a demo run, Prometheus and the status page beside it.

    make monitor

Renders the demo's faces, trains on them with two processes, starts
Prometheus with configs/monitoring on 127.0.0.1, and prints where to look. Ctrl-C ends all of it.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, not this folder

import yaml

from tools.demo import ROOT, render

_FOLDER = Path("runs/monitor")


def main(arguments: list[str]) -> int:
    """Run until Ctrl-C; return the exit code of the training."""
    parser = argparse.ArgumentParser(
        prog="python tools/monitor.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("override", nargs="*", help="settings of the run, e.g. run.epochs=3")
    parser.add_argument("--prometheus-port", type=int, default=9090, help="(default 9090)")
    parser.add_argument("--page-port", type=int, default=8765, help="(default 8765)")
    options = parser.parse_args(arguments)
    os.chdir(ROOT)
    render()
    shutil.rmtree(_FOLDER, ignore_errors=True)
    (_FOLDER / "targets").mkdir(parents=True)
    train = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
        *("launch/train.py", "configs/demo.toml", f"run.folder={_FOLDER / 'run'}"),
        *("monitor.port=9400", f"monitor.targets={_FOLDER / 'targets'}", *options.override),
    ]
    (_FOLDER / "run").mkdir()
    page = ["launch/status.py", str(_FOLDER / "run"), f"--port={options.page_port}"]
    with ExitStack() as running:
        running.enter_context(_process(sys.executable, *page))
        print(f"\nstatus page   http://127.0.0.1:{options.page_port}")
        if shutil.which("prometheus"):
            port = options.prometheus_port
            running.enter_context(_process(*_prometheus(port), quiet=True))
            print(f"Prometheus    http://127.0.0.1:{port}/alerts and /graph?g0.expr=partialfc_loss")
            print(f"Grafana       import configs/monitoring/dashboard.json, with :{port} as source")
        else:
            print("Prometheus    not installed: apt-get install prometheus, or prometheus.io")
        print("metrics       http://127.0.0.1:9400/metrics\n", flush=True)
        training = running.enter_context(
            _process(*train, environment={"OMP_NUM_THREADS": "1", **os.environ})
        )
        try:
            code = training.wait()
            print("The run has ended; Ctrl-C ends Prometheus and the page too.", flush=True)
            signal.pause()
        except KeyboardInterrupt:
            code = training.poll() or 0
    return code


def _prometheus(port: int) -> list[str]:
    """The shipped configuration, with the targets of this run, looked at more often."""
    shipped = (ROOT / "configs" / "monitoring").absolute()
    config = yaml.safe_load((shipped / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "5s", "evaluation_interval": "5s"}
    config["rule_files"] = [str(shipped / name) for name in config["rule_files"]]
    (files,) = config["scrape_configs"][0]["file_sd_configs"]
    files |= {"files": [str((_FOLDER / "targets").absolute() / "*.json")], "refresh_interval": "5s"}
    path = _FOLDER / "prometheus.yml"
    path.write_text(yaml.safe_dump(config))
    return [
        "prometheus",
        f"--config.file={path}",
        f"--storage.tsdb.path={_FOLDER / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]


@contextmanager
def _process(
    *command: str, quiet: bool = False, environment: dict[str, str] | None = None
) -> Iterator["subprocess.Popen[bytes]"]:
    """A process that ends with the block."""
    output = subprocess.DEVNULL if quiet else None
    process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            process.wait(60)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
