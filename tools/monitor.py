"""See the monitoring at work: a demo run, Prometheus and the status page beside it.

    make monitor

Renders the demo's faces, or takes the pack of ``data.train=``, trains on them with two processes,
starts Prometheus with configs/monitoring on 127.0.0.1, and prints where to look. Ctrl-C ends all of
it.
"""

import argparse
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

import yaml

from partialfc.cores import usable_cores
from partialfc.status.run import has_run
from tools.demo import ROOT, render

_RUN = "run.folder"
_OURS = {"run", "targets", "data", "prometheus.yml"}
"""What is in --folder, and goes when it is emptied."""


def main(arguments: list[str]) -> int:
    """Run until Ctrl-C; return the exit code of the training, 0 if it was stopped."""
    parser = argparse.ArgumentParser(
        prog="python tools/monitor.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("override", nargs="*", help="settings of the run, e.g. run.epochs=3")
    parser.add_argument("--folder", type=Path, default=Path("runs/monitor"), help="emptied before")
    parser.add_argument("--metrics-port", type=int, default=9400, help="(default 9400)")
    parser.add_argument("--prometheus-port", type=int, default=9090, help="(default 9090)")
    parser.add_argument("--page-port", type=int, default=8765, help="(default 8765)")
    options = parser.parse_args(arguments)
    keys = [word.partition("=")[0] for word in options.override]
    if _RUN in keys:
        parser.error(f"{_RUN}: the run is in --folder, beside what Prometheus keeps.")
    folder, port = options.folder.absolute(), options.prometheus_port
    if folder.exists() and not _is_ours(folder):
        parser.error(f"--folder = {str(folder)!r}: it would be emptied, and is not ours.")
    for name in ("metrics_port", "prometheus_port", "page_port"):
        if not _is_free(getattr(options, name)):
            option = f"--{name.replace('_', '-')}"
            parser.error(f"{option} = {getattr(options, name)}: it is taken. Choose another one.")
    os.chdir(ROOT)
    if "data.train" not in keys:
        render()
    shutil.rmtree(folder, ignore_errors=True)
    for name in ("run", "targets"):
        (folder / name).mkdir(parents=True)
    train = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
        *("launch/train.py", "configs/demo.toml", f"{_RUN}={folder / 'run'}"),
        *(f"monitor.port={options.metrics_port}", f"monitor.targets={folder / 'targets'}"),
        *options.override,
    ]
    page = ["launch/status.py", str(folder / "run"), f"--port={options.page_port}"]
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with ExitStack() as running:
        training = running.enter_context(_process(*train))
        try:
            while training.poll() is None and not has_run(folder / "run"):
                time.sleep(0.1)  # the page is of a run that has begun
            running.enter_context(_process(sys.executable, *page, quiet=True))
            print(f"\nstatus page   http://127.0.0.1:{options.page_port}")
            if shutil.which("prometheus"):
                running.enter_context(_process(*_prometheus(folder, port), quiet=True))
                site = f"http://127.0.0.1:{port}"
                print(f"Prometheus    {site}/alerts and /graph?g0.expr=partialfc_loss")
                print(f"Grafana       import configs/monitoring/dashboard.json, source {site}")
            else:
                print("Prometheus    not installed: apt-get install prometheus, or prometheus.io")
            print(f"metrics       http://127.0.0.1:{options.metrics_port}/metrics\n", flush=True)
            code = training.wait()
            print("The run has ended; Ctrl-C ends Prometheus and the page too.", flush=True)
            signal.pause()
        except KeyboardInterrupt:
            code = training.poll() or 0
    print("All of it has ended; the run and its numbers are in", options.folder, flush=True)
    return code


def _is_ours(folder: Path) -> bool:
    """Whether nothing is lost with what is in a folder; a folder of runs may have targets too."""
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else {""}
    return not names or "targets" in names <= _OURS


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def _prometheus(folder: Path, port: int) -> list[str]:
    """The shipped configuration, with the targets of this run, looked at more often."""
    shipped = (ROOT / "configs" / "monitoring").absolute()
    config = yaml.safe_load((shipped / "prometheus.yml").read_text(encoding="utf-8"))
    config["global"] = {"scrape_interval": "5s", "evaluation_interval": "5s"}
    config["rule_files"] = [str(shipped / name) for name in config["rule_files"]]
    (files,) = config["scrape_configs"][0]["file_sd_configs"]
    files |= {"files": [str(folder / "targets" / "*.json")], "refresh_interval": "5s"}
    path = folder / "prometheus.yml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return [
        "prometheus",
        f"--config.file={path}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]


@contextmanager
def _process(*command: str, quiet: bool = False) -> Iterator["subprocess.Popen[str]"]:
    """A process that ends with the block, and says no more from then on.

    In a session of its own, so that a Ctrl-C reaches this program alone: torchrun answers one, and
    the end of its ranks, with two pages of stack traces.
    """
    process = subprocess.Popen(
        command,
        env={"OMP_NUM_THREADS": str(max(1, usable_cores() // 2)), **os.environ},
        stdout=subprocess.DEVNULL if quiet else None,
        stderr=subprocess.DEVNULL if quiet else subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    ending = threading.Event()
    if process.stderr is not None:
        threading.Thread(target=_pass_on, args=(process.stderr, ending), daemon=True).start()
    try:
        yield process
    finally:
        ending.set()
        if process.poll() is None:
            process.terminate()  # under nohup a background job ignores Ctrl-C, and its children too
            process.wait(60)


def _pass_on(lines: IO[str], ending: threading.Event) -> None:
    for line in lines:
        if not ending.is_set():
            print(line, end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:  # while it was being set up
        sys.exit(130)
